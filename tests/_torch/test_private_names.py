"""No private name of PyTorch stands outside of `whiten_layers/_torch`, and the page that lists them is complete."""

import ast
import re
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

ROOT = Path(__file__).parent.parent.parent
ROOM = ROOT / "whiten_layers" / "_torch"
FOLDERS = (ROOT / "whiten_layers", ROOT / "models")
FILES = [ROOT / "hubconf.py", *(path for folder in FOLDERS for path in folder.rglob("*.py"))]
TREES = {path: ast.parse(path.read_text()) for path in FILES}
# Names that PyTorch's classes have as well: with one of these a class of the library would extend what is private.
TAKEN = {name for kind in (nn.Module, torch.autograd.Function, torch.optim.Optimizer) for name in dir(kind)}
STANDARD = {"_replace", "_getframe"}  # of a NamedTuple, and of sys


def is_private(name):
    return name.startswith("_") and not name.endswith("__") and name != "_"


def own_names():
    """Every private name that the library itself defines."""
    names = set()
    for tree in TREES.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                names.add(node.attr)
    return {name for name in names if is_private(name)}


def used_names(tree):
    """Private names that a file reads from elsewhere, imports, or defines as a method."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            yield node.attr
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "").endswith("attr"):  # getattr, setattr, …
            yield from (one.value for one in node.args if isinstance(one, ast.Constant) and is_private(str(one.value)))
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from (part for part in (node.module or "").split(".") if is_private(part))
            yield from (alias.name for alias in node.names if is_private(alias.name))
        elif isinstance(node, ast.Import):
            yield from (part for alias in node.names for part in alias.name.split(".") if is_private(part))
        elif isinstance(node, ast.FunctionDef) and is_private(node.name) and node.name in TAKEN:
            yield node.name


def foreign_names(path):
    own = own_names() - TAKEN
    return sorted({name for name in used_names(TREES[path]) if name not in own | STANDARD})


def test_no_private_name_stands_outside_of_its_room():
    found = {str(path.relative_to(ROOT)): foreign_names(path) for path in FILES if ROOM not in path.parents}
    assert not {path: names for path, names in found.items() if names}


def test_the_search_finds_what_it_is_for():
    program = "import torch._dynamo\nfrom torch.nn.modules.conv import _ConvNd\nmodule._buffers\ngetattr(x, '_spelt')\n"
    program += "class A:\n    def _apply(self, fn):\n        return torch._C._current_graph_task_id()\n"
    names = {"_dynamo", "_ConvNd", "_buffers", "_spelt", "_apply", "_C", "_current_graph_task_id"}
    assert set(used_names(ast.parse(program))) == names and not names & (own_names() - TAKEN - {"_apply"})


def test_the_page_lists_every_private_name_and_nothing_else_with_a_test_that_exists():
    page = (ROOT / "docs" / "architecture.md").read_text().split("## Private names of PyTorch")[1]
    names = {name for path in FILES if ROOM in path.parents for name in foreign_names(path)}
    listed = set()
    rows = [line.split("|")[1:-1] for line in page.splitlines() if line.startswith("| `") or line.startswith("| `nn")]
    assert len(rows) > 20
    for name, file, _, test in rows:
        private = {word for word in re.findall(r"\w+", name) if is_private(word)}
        text = (ROOM / file.strip(" `")).read_text()
        assert all(re.search(rf"\b{word}\b", text) for word in private), name
        listed |= private
        place, function = test.strip(" `").split("::")
        assert f"def {function}(" in (Path(__file__).parent / place).read_text(), test
    assert names <= listed and dist.is_available()  # else the names of distributed.py were not looked for
