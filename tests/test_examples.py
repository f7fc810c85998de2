"""The examples, each on a few steps of its own data; and none is too long to be read at once."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
ARGUMENTS = {
    "tabular.py": ["--steps", "3", "--rows", "3000"],
    "resnet.py": ["--steps", "3"],
    "transformer.py": ["--steps", "3"],
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_an_example_runs(name, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name, *ARGUMENTS[name]])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    printed = capsys.readouterr().out
    results = [
        float(one) for one in re.findall(r"^(?:plain|whitened|auto|eigenbasis):? +(?:loss )?([\d.]+)", printed, re.M)
    ]
    assert len(results) >= 2 and all(0 < result < 10 for result in results)
    assert "whitened layers: " in printed
    if name == "resnet.py":
        assert (tmp_path / "resnet20.pt").exists()


def test_the_example_of_several_processes_runs(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    arguments = [str(EXAMPLES / "ddp.py"), "--steps", "50"]
    done = subprocess.run(
        [*command, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "step 50: loss " in done.stdout and "whitened layers: 3" in done.stdout
    assert (tmp_path / "model.pt").exists()


def test_every_example_is_run_and_short():
    files = {path.name: path.read_text() for path in EXAMPLES.glob("*.py")}
    assert files.keys() == {*ARGUMENTS, "ddp.py"}
    assert all(len(text.splitlines()) < 80 for text in files.values())
