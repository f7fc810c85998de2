"""What every benchmark writes: an aligned table, a JSON file, a figure."""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def aligned(lines: list[list[str]]) -> str:
    """Rows of cells as text, every column as wide as its widest cell."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def finite(value: Any) -> Any:
    """The same with None for every NaN and infinity, which JSON does not know."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
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


def write(folder: Path, result: dict[str, Any], figures: "dict[str, Callable[[], Figure]]") -> None:
    """Write ``results.json``, then draw the figures, named without ending, into a folder that is made if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    replace(folder / "results.json", encoded(result))
    for name, draw in figures.items():
        draw().savefig(folder / f"{name}.png", dpi=120)
    print("written:", ", ".join(str(folder / name) for name in ["results.json", *(f"{n}.png" for n in figures)]))
