"""Command lines made from dataclasses by tyro: an option for each field, and one line about a wrong value.

tyro reports a wrong value in a frame of many lines. The readers below therefore do not raise: they return `Wrong` in
the value's place, and `read` reports it, with the option's name, once tyro has made the dataclass.
"""

import math
import os
import sys
from collections.abc import Callable, Collection, Iterator
from dataclasses import fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypeVar, get_args

import tyro
from tyro.conf import DisallowNone, FlagCreatePairsOff, OmitArgPrefixes
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

T = TypeVar("T")
Reader = PrimitiveConstructorSpec[Any]
Switch = FlagCreatePairsOff[bool]  # has no --no- form


class Wrong(str):
    """Why an option cannot have a value, in the place of that value."""


def value(name: str, convert: Callable[[str], Any], metavar: str | None = None) -> Reader:
    """Read one value by a function that raises ValueError, or returns `Wrong`, for text that is no such value."""

    def read_one(texts: list[str]) -> Any:
        if len(texts) != 1:
            return Wrong("expected one argument")
        try:
            return convert(texts[0])
        except ValueError:
            return Wrong(f"invalid {name} value: {texts[0]!r}")

    return Reader("*", metavar or name.upper(), read_one, lambda _: True, lambda given: [str(given)])


def one_of(names: Collection[str], text: str) -> str | Wrong:
    """Return the text if it is one of the names."""
    return text if text in names else Wrong(f"invalid choice: {text!r} (choose from {', '.join(names)})")


def choice(names: Collection[str]) -> Reader:
    """Read one of several names."""
    return value("choice", partial(one_of, names), f"{{{','.join(names)}}}")


def number(name: str, kind: type[int] | type[float], allows: Callable[[Any], bool]) -> Reader:
    """Read a number within bounds."""

    def convert(text: str) -> float | Wrong:
        given = kind(text)
        return given if allows(given) else Wrong(f"invalid {name} value: {text!r}")

    return value(name, convert, kind.__name__.upper())


def several(kind: type, one: Reader, least: int = 1) -> Reader:
    """Read a list or tuple of values, `least` of them or more."""

    def read_all(texts: list[str]) -> Any:
        if len(texts) < least:
            return Wrong("expected at least one argument")
        return kind(one.instance_from_str([text]) for text in texts)

    def write_all(given: Any) -> list[str]:
        return [text for each in given or [None] for text in one.str_from_instance(each)]

    return Reader("*", f"{one.metavar} ...", read_all, lambda _: True, write_all)


POSITIVE_INT = number("positive int", int, lambda given: given > 0)
PositiveInt = Annotated[int, POSITIVE_INT]
PositiveFloat = Annotated[float, number("positive float", float, lambda given: 0 < given < math.inf)]
NotNegative = Annotated[float, number("number of at least 0", float, lambda given: 0 <= given < math.inf)]
Fraction = Annotated[float, number("number in [0, 1)", float, lambda given: 0 <= given < 1)]
Part = Annotated[float, number("number in [0, 1]", float, lambda given: 0 <= given <= 1)]
Count = Annotated[int, number("int of at least 0", int, lambda given: 0 <= given < 2**63)]

READERS = ConstructorRegistry()


@READERS.primitive_rule
def _reader(info: PrimitiveTypeInfo) -> Reader | None:
    """The reader of a field that is not annotated with one."""
    if info.type_origin is Literal:
        return choice(get_args(info.type))
    if info.type_origin in (list, tuple):
        one = ConstructorRegistry.get_primitive_spec(PrimitiveTypeInfo.make(get_args(info.type)[0], info.markers))
        return several(info.type_origin, one) if isinstance(one, PrimitiveConstructorSpec) else None
    return value(info.type.__name__, info.type) if info.type in (int, float, str, Path) else None


def dashed(name: str) -> str:
    """The option of a field, such as ``--batch-size``."""
    return f"--{name.replace('_', '-')}"


def leaves(options: Any) -> Iterator[tuple[str, Any]]:
    """Yield names and values of the fields of a dataclass and of the dataclasses in it."""
    for field in fields(options):
        given = getattr(options, field.name)
        if is_dataclass(given):
            yield from leaves(given)
        else:
            yield field.name, given


def chosen(options: Any) -> dict[str, Any]:
    """All options by name, as JSON can hold them."""
    return {name: str(given) if isinstance(given, Path) else given for name, given in leaves(options)}


def reject(program: str, message: str) -> NoReturn:
    """End the program with one line about what is wrong, and status 2."""
    if os.environ.get("LOCAL_RANK", "0") == "0":  # under torchrun all processes find the same
        print(f"{program}: {message} (--help lists what there is)", file=sys.stderr)
    sys.exit(2)


def read(default: T, program: str, description: str | None, arguments: list[str] | None) -> T:
    """Read a command line into a dataclass; options that are not given are as in `default`."""
    options, unknown = tyro.cli(
        type(default),
        prog=program,
        description=description,
        args=arguments,
        default=default,
        return_unknown_args=True,
        config=(OmitArgPrefixes, DisallowNone),
        registry=READERS,
    )
    if unknown:
        reject(program, f"unrecognized arguments: {' '.join(unknown)}")
    for name, given in leaves(options):
        for one in given if isinstance(given, list | tuple) else [given]:
            if isinstance(one, Wrong):
                reject(program, f"argument {dashed(name)}: {one}")
    return options
