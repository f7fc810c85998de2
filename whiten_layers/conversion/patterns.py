"""Selection of a model's layers: by glob patterns of their names, by type, or the modules themselves."""

import fnmatch
from collections.abc import Iterable
from typing import Any

from torch import nn

Selector = str | nn.Module | type[nn.Module]
Selection = Selector | Iterable[Selector] | None


def selectors(option: str, given: Selection) -> list[Selector] | None:
    """Turn one selector or several into a list; None stays None.

    Raises:
        TypeError: one of them is neither a name, a module nor a type of modules.
    """
    if given is None:
        return None
    # A container, such as nn.Sequential, is a module that can be iterated over.
    listed = [given] if isinstance(given, str | nn.Module | type) or not isinstance(given, Iterable) else list(given)
    for one in listed:
        if not isinstance(one, str | nn.Module) and not (isinstance(one, type) and issubclass(one, nn.Module)):
            choices = "names as glob patterns, modules, or types of modules"
            raise TypeError(f"{option}={_shown(one)} is not possible: give {choices}")
    return listed


def selected(option: str, chosen: list[Selector], model: nn.Module, layers: dict[str, Any], what: str) -> set[int]:
    """Return the ids of the layers that any of the selectors means: a module, or type, means all layers within too.

    Raises:
        ValueError: a selector means no layer.
    """
    ids: set[int] = set()
    of_layers = {id(layer) for layer in layers.values()}
    for one in chosen:
        if isinstance(one, str):
            found = {id(layer) for name, layer in layers.items() if fnmatch.fnmatchcase(name, one)}
        else:
            roots = [one] if isinstance(one, nn.Module) else [m for m in model.modules() if isinstance(m, one)]
            found = {id(module) for root in roots for module in root.modules()} & of_layers
        if not found:
            raise ValueError(f"{option}={_shown(one)} matches no {what}: {_cure(one, layers)}")
        ids |= found
    return ids


def chosen_layers(model: nn.Module, layers: dict[str, Any], include: Selection, skip: Selection, what: str) -> set[int]:
    """Return the ids of the layers to convert. A shared layer is skipped if any of its names is.

    Raises:
        TypeError, ValueError: as for `selectors` and `selected`.
    """
    included, skipped = selectors("include", include), selectors("skip", skip)
    ids = {id(layer) for layer in layers.values()}
    if included is not None:
        ids = selected("include", included, model, layers, what)
    return ids - selected("skip", skipped or [], model, layers, what)


def _shown(value: object) -> str:
    """Name a value in a line."""
    if isinstance(value, type):
        return value.__name__
    return type(value).__name__ if isinstance(value, nn.Module) else repr(value)


def _cure(one: Selector, layers: dict[str, Any]) -> str:
    if isinstance(one, str) and any(name.startswith(f"{one}.") for name in layers):
        return f"give {one + '.*'!r} for all within {one!r}"
    return f"there are {', '.join(name or 'the model itself' for name in layers) or 'none'}"
