"""The README's Python runs as it stands, and the tests that it names are there."""

import ast
import os
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from whiten_layers.statistics.whitening_factor import WhiteningFactor

from .distributed.world import free_port, needs_fsdp2, run

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
PARALLEL = [block for block in BLOCKS if "torch.distributed" in block]


@pytest.mark.parametrize("block", [block for block in BLOCKS if block not in PARALLEL])
def test_a_block_of_the_readme_runs(block, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(block, {})
    if "report(" in block:
        assert "MiB in all" in capsys.readouterr().out


def in_two_processes(rank, block, port):
    dist.destroy_process_group()
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    names = {}
    exec(block, names)
    torch.manual_seed(rank)
    names["model"](torch.randn(2, 3, 32, 32)).sum().backward()
    counts = [int(child.num_refreshes) for child in names["model"].modules() if isinstance(child, WhiteningFactor)]
    assert sum(counts) == 21, counts  # a layer's channels; its taps, about the channels' mean, come with the second


@pytest.mark.parametrize("block", [pytest.param(b, marks=needs_fsdp2 if "fsdp" in b else ()) for b in PARALLEL])
def test_a_block_of_the_readme_runs_in_several_processes(block):
    run(in_two_processes, 2, block, free_port())


def test_every_line_of_what_it_works_with_names_a_test_that_there_is():
    section = README.split("## What it works with")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")][2:]
    assert len(lines) > 20
    for line in lines:
        named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", line)
        assert named or "not measured" in line, line
        for file, test in named:
            tree = ast.parse((ROOT / file).read_text())
            assert test in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, test
