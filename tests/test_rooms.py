"""Imports run one way through the rooms of the library, as docs/architecture.md lists them, and in no circle."""

import ast
import graphlib
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
LIBRARY = ROOT / "whiten_layers"
FILES = {path.relative_to(LIBRARY).with_suffix("").parts: path for path in LIBRARY.rglob("*.py")}


def imported(name, path):
    """The library's own files that a file imports, under TYPE_CHECKING and inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        absolute = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        absolute += [str(node.module)] if isinstance(node, ast.ImportFrom) and not node.level else []
        assert not any(module.startswith("whiten_layers") for module in absolute), name  # relative ones are followed
        if isinstance(node, ast.ImportFrom) and node.level:
            base = name[: len(name) - node.level] + tuple((node.module or "").split(".") if node.module else ())
            for target in ((*base, alias.name) for alias in node.names):
                yield next(place for place in (target, base, (*base, "__init__")) if place in FILES)


IMPORTS = {name: set(imported(name, path)) for name, path in FILES.items()}


def test_no_file_is_in_a_circle():
    assert len(IMPORTS) > 40 and ("transforms", "base") in IMPORTS["autograd",]
    list(graphlib.TopologicalSorter(IMPORTS).static_order())  # raises the circle


def test_no_import_leads_up_the_list_of_rooms():
    page = (ROOT / "docs" / "architecture.md").read_text().split("## Where things are")[1].split("\n## ")[0]
    rows = [
        re.findall(r"`(\w+)(?:\.py|/)`", line.split("|")[1]) for line in page.splitlines() if line.startswith("| `")
    ]
    floors = {room: floor for floor, rooms in enumerate(rows) for room in rooms}
    assert floors.keys() == {name[0] for name in FILES}
    for name, targets in IMPORTS.items():
        for target in targets:
            assert name[0] == target[0] or floors[name[0]] < floors[target[0]], (name, target)
