"""Printing tables, and writing a JSON file and figures, at the end of a benchmark or at Ctrl-C."""

import json
import math
import os
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .environment import environment
from .options import chosen

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# A heading, and a format of the row's items such as "{loss:.3f}", or a function of the row.
Column = tuple[str, str | Callable[[Any], str]]


def cells(columns: Sequence[Column], rows: Iterable[Any]) -> list[list[str]]:
    """Format the cells of a table: the headings of the columns, then a line for each row."""
    lines = [[cell(row) if callable(cell) else cell.format(**row) for _, cell in columns] for row in rows]
    return [[heading for heading, _ in columns], *lines]


def aligned(lines: list[list[str]], width: int = 0) -> str:
    """Format lines of cells as text: every column is as wide as its widest cell, and at least `width`."""
    widths = [max(width, *map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.rjust(n) for cell, n in zip(line, widths, strict=True)) for line in lines)


def show(result: dict[str, Any], title: str, lines: list[list[str]]) -> None:
    """Print a table under a title, and keep its cells in the result for `benchmarks.tables`."""
    print(f"\n{title}\n{aligned(lines)}")
    result.setdefault("tables", []).append({"title": title, "cells": lines})


def medians(rows: Sequence[dict[str, Any]], keys: Sequence[str]) -> list[dict[str, Any]]:
    """The median over seeds of every figure, for all rows that have the same keys; None counts as infinite."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)

    def median(name: str, members: list[dict[str, Any]]) -> float:
        return statistics.median(math.inf if row[name] is None else row[name] for row in members)

    return [
        {**dict(zip(keys, group, strict=True)), "seed": "median"}
        | {name: median(name, members) for name in members[0] if name not in (*keys, "seed")}
        for group, members in groups.items()
    ]


def annotate(panel: "Axes", x: str = "", y: str = "", *, legend: bool = True) -> None:
    """Name the axes of a panel, and add a grid and a legend, which lists lines of the same label once."""
    panel.set(xlabel=x, ylabel=y)
    panel.grid(alpha=0.3)
    handles, labels = panel.get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))
    if once and legend:
        panel.legend(list(once.values()), list(once))


@contextmanager
def interruptible(result: dict[str, Any]) -> Iterator[None]:
    """Let Ctrl-C end a block early, and note that in the result, so that earlier measurements are still written."""
    result["interrupted"] = False
    try:
        yield
    except KeyboardInterrupt:
        result["interrupted"] = True
        print("\ninterrupted: what follows is what was measured until then", file=sys.stderr)


def finite(value: Any) -> Any:
    """Copy a value with None for every NaN and infinity, which JSON does not know."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def replace(path: Path, content: bytes | memoryview) -> None:
    """Write a file whole or not at all: what was there before stays if this fails, or is killed, on the way."""
    part = path.with_name(f"{path.name}.part")
    try:
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def encoded(result: dict[str, Any]) -> bytes:
    """The content of a ``results.json``."""
    return json.dumps(finite(result), indent=1).encode()


def write(options: Any, result: dict[str, Any], figures: "dict[str, Callable[[], Figure]] | None" = None) -> int:
    """Write ``results.json``, with the environment and the options, and the figures (by name) into the folder `out`.

    Returns:
        The exit status of the program: 130 if the measurement was interrupted, otherwise 0.
    """
    folder, figures = options.out, figures or {}
    of_the_run = {name: given for name, given in chosen(options).items() if name != "out"}
    folder.mkdir(parents=True, exist_ok=True)
    replace(folder / "results.json", encoded({"environment": environment(), "options": of_the_run, **result}))
    for name, draw in figures.items():
        draw().savefig(folder / f"{name}.png", dpi=120)
    print("written:", ", ".join(str(folder / name) for name in ["results.json", *(f"{n}.png" for n in figures)]))
    return 130 if result.get("interrupted") else 0
