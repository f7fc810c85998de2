"""Command lines: a wrong option ends every program with one line that names it, and status 2."""

import importlib
from dataclasses import dataclass

import pytest
import torch

from benchmarks.options import Count, Switch, read

WRONG = {
    "complexity": [
        (["--sizes", "64", "--largest", "32"], "--largest 32: --sizes begins at 64"),
    ],
    "condition": [
        (["--sizes", "0"], "invalid positive int value: '0'"),
        (["--epochs", "-1"], "--epochs -1: give at least 0"),
        (["--sizes", "--epochs", "0"], "leave nothing to measure"),
    ],
    "convergence": [
        (["--power", "2"], r"power=2.0 is not possible: give a number in [0, 1]"),
        (["--dataset", "mnist"], "invalid choice: 'mnist'"),
        (["--compare", "method=eigh", "method=qr"], "method='qr' is not possible"),
        (["--compare", "rank=x"], "argument --rank: invalid int value: 'x'"),
        (["--compare", "ranks=3"], "unrecognized arguments: --ranks=3"),
        (["--method", "qr"], "method='qr' is not possible"),
        (["--compare", "transform=psi"], "argument --transform: invalid choice: 'psi'"),
        (["--epochs", "0"], "invalid positive int value: '0'"),
        (["--lr", "-0.1"], "invalid positive float value: '-0.1'"),
        (["--batch-size", "5000"], "--batch-size 5000: digits has 1348 training images"),
    ],
    "distributed": [
        (["--ranks", "0"], "argument --ranks: invalid positive int value: '0'"),
    ],
    "fewshot": [
        (["--dataset", "mnist"], "invalid choice: 'mnist'"),
        (["--norms", "LN"], "invalid choice: 'LN'"),
        (["--ways", "6"], "--ways 6: digits has 2 to 5 classes for an episode"),
        (["--dataset", "crops", "--shots", "1", "30"], "--shots 30: crops has 40 images of a class, 15 to ask"),
        (["--test-episodes", "1"], "--test-episodes 1: an interval takes at least 2"),
        (["--lr", "0"], "invalid positive float value: '0'"),
    ],
    "norms": [
        (["--only", "space"], "invalid choice: 'space'"),
        (["--shapes", "128"], "invalid shape value: '128'"),
        (["--shapes", "1x16x32"], "invalid shape value: '1x16x32'"),
        (["--step-size", "0"], "invalid positive float value: '0'"),
        (["--dataset", "mnist"], "invalid choice: 'mnist'"),
        (["--dataset", "digits", "--batch-size", "5000"], "--batch-size 5000: digits has 1348 training images"),
    ],
    "overhead": [
        (["--device", "tpu"], "'tpu': must be cpu, cuda or cuda:N"),
        (["--device", "cuda:99"], "CUDA devices that are here: "),
        (["--power", "-1"], "power=-1.0 is not possible"),
    ],
    "peers.__main__": [
        (["--tasks", "cifar"], "argument --tasks: invalid choice: 'cifar'"),
        (["--methods", "lion"], "argument --methods: invalid choice: 'lion'"),
        (["--methods", "sgd:power=1"], "argument --methods: invalid choice: 'sgd:power=1'"),
        (["--methods", "whitened-sgd:power=2"], "power=2.0 is not possible: give a number in [0, 1]"),
        (["--steps", "0"], "argument --steps: invalid positive int value: '0'"),
        (["--seeds", "0", "1001"], "--seeds 1001: the search has seen it"),
    ],
    "safety": [
        (["--tasks", "cifar"], "argument --tasks: invalid choice: 'cifar'"),
        (["--optimizer", "lion"], "argument --optimizer: invalid choice: 'lion'"),
        (["--steps", "0"], "argument --steps: invalid positive int value: '0'"),
        (["--factors", "-1"], "invalid positive float value: '-1'"),
        (["--power", "2"], "power=2.0 is not possible"),
        (["--compare", "ranks=3"], "unrecognized arguments: --ranks=3"),
        (["--compare", "method=qr"], "method='qr' is not possible"),
    ],
    "two_stage": [
        (["--sets", "boston"], "invalid choice: 'boston'"),
        (["--trainers", "adam"], "invalid choice: 'adam'"),
        (["--iterations", "0"], "invalid positive int value: '0'"),
        (["--seeds", "-1"], "--seeds -1: give at least 0"),
    ],
}


@pytest.mark.parametrize(
    "benchmark, arguments, message", [(name, *case) for name, cases in WRONG.items() for case in cases]
)
def test_a_wrong_option_ends_with_one_line(benchmark, arguments, message, capsys):
    if benchmark.startswith("peers") and not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"benchmarks.{benchmark}").main(arguments)
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.count("\n") == 1 and message in said


@dataclass(frozen=True)
class Inner:
    center: bool | None = None
    rate: float | None = None


@dataclass(frozen=True)
class Outer:
    inner: Inner = Inner()
    names: tuple[str, ...] = ()  # several names
    number: Count = 3
    quiet: Switch = False


def test_options_are_fields_however_deep(capsys):
    assert read(Outer(), "program", None, []) == Outer()
    given = ["--no-center", "--rate=-1.5", "--names", "a", "b", "--quiet"]
    assert read(Outer(number=4), "program", None, given) == Outer(Inner(False, -1.5), ("a", "b"), 4, True)
    with pytest.raises(SystemExit, match="0"):
        read(Outer(), "program", "What it does.", ["--help"])
    said = capsys.readouterr().out
    assert "What it does." in said and "--number INT" in said and "several names" in said


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--rate"], "argument --rate: expected one argument"),
        (["--rate", "1", "2"], "argument --rate: expected one argument"),
        (["--rate", "None"], "argument --rate: invalid float value: 'None'"),
        (["--names"], "argument --names: expected at least one argument"),
        (["--quiet=3"], "unrecognized arguments: 3"),
        (["--no-quiet", "loud"], "unrecognized arguments: --no-quiet loud"),
    ],
)
@pytest.mark.parametrize("rank", ["0", "1"])
def test_one_process_of_several_says_what_is_wrong(arguments, message, rank, capsys, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", rank)
    with pytest.raises(SystemExit, match="2"):
        read(Outer(), "program", None, arguments)
    assert capsys.readouterr().err == (f"program: {message} (--help lists what there is)\n" if rank == "0" else "")
