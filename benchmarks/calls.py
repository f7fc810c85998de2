"""How many of the library's functions does a training step of one convolution call, and how often does the file change?

Counted in the first batch from the tenth on that refreshes, and the one before: with the defaults both are observed.
"""

import itertools
import sys
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import whiten_layers
from whiten_layers import WhitenedConv2d
from whiten_layers.refresh.schedule import last_due

from .environment import describe
from .options import read
from .output import Column, cells, show, write

LIBRARY = str(Path(whiten_layers.__file__).parent)
COLUMNS: list[Column] = [("", "{step}"), ("calls", "{calls}"), ("changes of file", "{changes}")]


@dataclass(frozen=True)
class Options:
    """Options of the command line."""

    out: Path = Path("results/calls")  # folder for results.json


def files_called(layer: WhitenedConv2d) -> list[str]:
    """Train a step; return the library's file of every function that is called, in order."""
    files: list[str] = []

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(LIBRARY):
            files.append(frame.f_code.co_filename)

    layer.zero_grad()
    images = torch.randn(4, 8, 10, 10)
    before = sys.getprofile()
    sys.setprofile(note)
    try:
        layer(images).square().sum().backward()
    finally:
        sys.setprofile(before)
    return files


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; return the exit status."""
    options = read(Options(), "python -m benchmarks.calls", __doc__, arguments)
    print(describe())
    layer = WhitenedConv2d(8, 8, 3, padding=1)
    due = last_due(19, 10)  # the first from the tenth batch on
    steps = [files_called(layer) for _ in range(due)]
    rows = []
    for name, files in (("quiet step", steps[-2]), ("step with a refresh", steps[-1])):
        changes = sum(one != other for one, other in itertools.pairwise(files))
        rows.append({"step": name, "calls": len(files), "changes": changes})
    result: dict[str, Any] = {"rows": rows}
    show(result, "calls of whiten_layers' functions, forward and backward", cells(COLUMNS, rows))
    return write(options, result)


if __name__ == "__main__":
    sys.exit(main())
