"""What README.md and docs/ say holds: their Python runs, the tests and files they name are there."""

import ast
import os
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import whiten_layers
from whiten_layers.statistics.whitening_factor import WhiteningFactor

from .distributed.world import free_port, needs_fsdp2, run

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [
    pytest.param(block, id=f"{page.stem}-{number}", marks=needs_fsdp2 if "fsdp" in block else ())
    for page in PAGES
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL))
]
PARALLEL = [block for block in BLOCKS if "torch.distributed" in block.values[0]]


@pytest.mark.parametrize("block", [block for block in BLOCKS if block not in PARALLEL])
def test_a_block_runs(block, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(block, {})
    if "report(" in block:
        assert "MiB beside them" in capsys.readouterr().out


def in_two_processes(rank, block, port):
    dist.barrier()  # a rank that is still connecting would find the other one gone
    dist.destroy_process_group()
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    names = {}
    exec(block, names)
    torch.manual_seed(rank)
    names["model"](torch.randn(2, 3, 32, 32)).sum().backward()
    counts = [int(child.num_refreshes) for child in names["model"].modules() if isinstance(child, WhiteningFactor)]
    assert sum(counts) == 21, counts  # a layer's channels; its taps, about the channels' mean, come with the second


@pytest.mark.parametrize("block", PARALLEL)
def test_a_block_runs_in_several_processes(block):
    run(in_two_processes, 2, block, free_port())


def test_there_are_blocks_of_both_kinds_in_the_readme():
    readme = [block for block in BLOCKS if block.id.startswith("README")]
    assert len(readme) >= 5 and len([block for block in readme if block in PARALLEL]) == 2


@pytest.mark.parametrize(("page", "least"), [("compatibility", 50), ("faults", 20)])
def test_every_line_of_a_page_of_tests_names_a_test_that_there_is(page, least):
    text = re.sub(r"<!-- table: .*?<!-- end -->", "", (ROOT / "docs" / f"{page}.md").read_text(), flags=re.DOTALL)
    lines = re.findall(r"^\|(?!.*\| test \|$|---).*", text, flags=re.MULTILINE)
    assert len(lines) > least
    for line in lines:
        named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", line)
        assert named or "not measured" in line, line
        for file, test in named:
            assert (ROOT / file).is_file(), line
            tree = ast.parse((ROOT / file).read_text())
            assert test in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, line


def test_the_readme_is_short_and_shows_a_result_early():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 160
    early = "\n".join(lines[:80])
    assert "<!-- end -->" in early and "![" in early


def test_the_api_page_has_every_public_name():
    page = (ROOT / "docs" / "api.md").read_text()
    shown = {name.rpartition(".")[2] for name in re.findall(r"^::: ([\w.]+)$", page, flags=re.MULTILINE)}
    alike = {f"{name[:-2]}{dims}d" for name in shown if name.endswith("1d") for dims in (2, 3)}
    assert set(whiten_layers.__all__) <= shown | alike


@pytest.mark.parametrize("name", ["tabular", "resnet", "transformer", "ddp"])
def test_a_tutorial_shows_its_example(name):
    page = (ROOT / "docs" / "tutorials" / f"{name}.md").read_text()
    assert f'\n--8<-- "examples/{name}.py"\n```' in page  # the directive that MkDocs replaces; a formatter may spoil it
    assert (ROOT / "examples" / f"{name}.py").is_file()


def anchors(page):
    """The headings of a page, as GitHub makes links of them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    "page",
    [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "benchmarks" / "results" / "NOTES.md"],
    ids=lambda page: page.name,
)
def test_every_relative_link_leads_somewhere(page):
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"\w+:", target):
            continue
        file, _, anchor = target.partition("#")
        linked = (page.parent / file).resolve() if file else page
        assert linked.exists() and linked.is_relative_to(ROOT), target
        assert not anchor or anchor in anchors(linked), target
