"""The main job on a few steps: table, results.json, plot; interrupted; wrong options."""

import pytest

from benchmarks import convergence
from benchmarks.training import Curve

from . import results

QUICK = ["--epochs", "3", "--batch-size", "128", "--seeds", "0"]  # thirty steps


def test_a_run_leaves_a_table_a_file_and_a_plot(tmp_path, capsys):
    assert convergence.main([*QUICK, "--out", str(tmp_path), "--power", "1"]) == 0
    output = capsys.readouterr().out
    assert "steps to plain" in output and "whitened" in output
    result = results(tmp_path)
    plain, whitened = result["rows"]
    assert (plain["variant"], whitened["variant"]) == ("plain", "whitened")
    assert plain["steps"] == whitened["steps"] == 30
    assert plain["training_loss"] != whitened["training_loss"]
    assert plain["steps_to_plain"] <= 30 and plain["test_accuracy"] > 0.1
    assert len(result["curves"][0]["losses"]) == 30
    # The same weights and the same batch: the first step's loss is the same to the last bit.
    assert result["curves"][0]["losses"][0] == result["curves"][1]["losses"][0]
    assert result["environment"]["torch"] and result["transforms"]["whitened"]["power"] == 1.0
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_an_interrupt_keeps_what_was_measured(tmp_path, capsys, monkeypatch):
    def interrupted(network, data, *, curve, **options):
        curve.losses, curve.seconds = [1.0] * 30, [float(i) for i in range(30)]
        if len(started) == 3:
            raise KeyboardInterrupt
        started.append(1)

    started = [1]
    monkeypatch.setattr(convergence, "train", interrupted)
    assert convergence.main(["--seeds", "0", "1", "--out", str(tmp_path)]) == 130
    result = results(tmp_path)
    assert result["interrupted"] and len(result["rows"]) == 3
    assert "interrupted" in capsys.readouterr().err


def test_the_best_rate_of_the_plain_network_is_used_for_both(tmp_path, monkeypatch):
    def train(network, data, *, lr, curve, **options):
        loss = float("nan") if lr == 3 else 1 + abs(lr - 0.2)
        curve.losses, curve.seconds = [loss] * 30, [0.0] * 30

    monkeypatch.setattr(convergence, "train", train)
    convergence.main(["--lr", "3", "0.1", "0.2", "--seeds", "0", "1", "--out", str(tmp_path)])
    result = results(tmp_path)
    assert result["lr"] == 0.2
    assert [row["lr"] for row in result["rows"] if row["variant"] == "whitened"] == [0.2, 0.2]
    assert len(result["rows"]) == 8


def test_several_transforms_in_one_run(tmp_path, capsys, monkeypatch):
    def train(network, data, *, curve, **options):
        curve.losses, curve.seconds = [1.0] * 30, [0.0] * 30
        seen.append(getattr(getattr(network.fc, "transform", None), "method", None))

    seen = []
    monkeypatch.setattr(convergence, "train", train)
    more = [f"method=cholesky,block-size={size}" for size in (2, 4, 8, 16)]
    names = ["method=cholesky", "method=recursive,rank=8", *more]
    arguments = ["--compare", *names, "--power", "1", "--seeds", "0", "1", "--out", str(tmp_path)]
    assert convergence.main(arguments) == 0
    assert seen == [None, "cholesky", "recursive", *["cholesky"] * 4] * 2
    assert [row["variant"] for row in results(tmp_path)["medians"]] == ["plain", *names]
    assert results(tmp_path)["transforms"]["method=recursive,rank=8"]["rank"] == 8


def test_gains_beside_whitening(tmp_path, capsys, monkeypatch):
    def train(network, data, *, curve, **options):
        curve.losses, curve.seconds = [1.0] * 30, [0.0] * 30
        transform = getattr(network.fc, "transform", None)
        seen.append([] if transform is None else [type(part).__name__ for part in transform.parts()])

    seen = []
    monkeypatch.setattr(convergence, "train", train)
    names = ["transform=whitening", "transform=optimal_gain", "transform=whitening+optimal_gain,gain-damping=0.1"]
    arguments = ["--power", "1", "--seeds", "0", "--compare", *names, "--out", str(tmp_path)]
    assert convergence.main(arguments) == 0
    alone = [["FeatureWhitening"], ["OptimalInputGain"], ["Chain", "FeatureWhitening", "OptimalInputGain"]]
    assert seen == [[], *alone]
    chosen = results(tmp_path)["transforms"]
    assert chosen[names[1]]["damping"] == 10.0 and "power" not in chosen[names[1]]
    whitening, gains = chosen[names[2]]["0"], chosen[names[2]]["1"]
    assert whitening["power"] == 1.0 and whitening["damping"] == 0.03 and gains["damping"] == 0.1
    assert "optimal gains, damping=0.1" in capsys.readouterr().out


@pytest.mark.slow
def test_whitened_sgd_reaches_the_plain_loss_in_fewer_steps(tmp_path):
    """The README's table of crops, with one seed: there the median of ten takes 0.65 of plain's steps.

    A single run scatters, by a tenth between one thread and two. Hence three quarters.
    """
    assert convergence.main(["--dataset", "crops", "--seeds", "0", "--out", str(tmp_path)]) == 0
    plain, whitened = results(tmp_path)["rows"]
    assert whitened["steps_to_plain"] <= 0.75 * plain["steps_to_plain"]


def test_a_curve_finds_when_a_loss_is_reached():
    curve = Curve([10.0] * 25 + [0.0] * 25, [float(step) for step in range(50)])
    assert curve.final_loss == 0.0
    assert curve.steps_until(10.0) == 25
    assert curve.steps_until(5.0) == 38  # 13 of 25 are zero: a mean of 4.8
    assert curve.steps_until(-1.0) is None
    assert Curve([1.0]).smoothed() == []
