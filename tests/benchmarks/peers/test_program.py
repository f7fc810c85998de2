"""The benchmark against other methods: its tasks, its methods, what it writes; resumed; interrupted."""

import importlib
import json
import math

import pytest
import torch
from torch import nn

if not hasattr(torch.optim, "Muon"):
    pytest.skip("this torch has no Muon", allow_module_level=True)

from benchmarks.peers import runs
from benchmarks.peers.methods import METHODS, find
from benchmarks.peers.runs import Setting, Store, evaluate, height, start, updates, version_of
from benchmarks.peers.tasks import TASKS

from .. import results

program = importlib.import_module("benchmarks.peers.__main__")
SMALL = ["--tasks", "mlp-diamonds", "--steps", "10", "--seeds", "0", "1"]


@pytest.mark.parametrize("name", TASKS)
def test_a_task_is_trained_and_tested_on_other_samples(name):
    task = TASKS[name]
    network, training = start(task, "adamw", METHODS["adamw"].lr, 0.0, 0)
    assert all(math.isfinite(loss) for loss in updates(task, network, training, 2, 0))
    (inputs, _), *held_out = task.data()
    assert abs(len(held_out[0][0]) - len(held_out[1][0])) <= 1 and len(inputs) > 2 * len(held_out[0][0]) > 0
    kept = {row.numpy().tobytes() for row in inputs} if name != "transformer-source" else set()
    for others, targets in held_out:
        assert inputs.shape[1:] == others.shape[1:] and len(others) == len(targets)
        assert not any(row.numpy().tobytes() in kept for row in others)
    found = evaluate(task, network)
    assert min(found["valid_loss"], found["test_loss"]) > 0
    assert (found["test_accuracy"] is None) == targets.is_floating_point()


@pytest.mark.parametrize("name", ["mlp-diamonds", "autoencoder-digits"])
def test_features_are_standardised_by_the_training_samples(name):
    (inputs, _), (others, _), _ = TASKS[name].data()
    deviation = inputs.std(0)
    torch.testing.assert_close(inputs.mean(0), torch.zeros(inputs.shape[1]), rtol=0, atol=1e-4)
    torch.testing.assert_close(deviation, deviation.round(), rtol=0, atol=1e-4)
    assert others.mean(0).abs().max() > 1e-3


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", METHODS)
def test_a_method_trains_every_parameter(name):
    torch.manual_seed(0)
    convolutions = [nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 8)]
    network = nn.Sequential(*convolutions, nn.LayerNorm(8), nn.Linear(8, 2))
    assert METHODS[name].suits(network) and METHODS[name].suits(nn.Linear(2, 2)) == (name != "iter-norm")
    training = METHODS[name].make(network, METHODS[name].lr, METHODS[name].decay)
    before = {key: parameter.detach().clone() for key, parameter in network.named_parameters()}
    for _ in range(30):
        network.zero_grad()
        network(torch.randn(8, 3, 6, 6)).square().mean().backward()
        training.step()
    assert all(p.isfinite().all() for p in network.parameters())
    assert all(not torch.equal(p, before[key]) for key, p in network.named_parameters())


def test_options_of_a_whitened_method():
    network = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    find("whitened-adamw:power=1,output-power=0.25").make(network, 0.1, 0.0)
    assert (network[0].transform.power, network[0].transform.output_power) == (1.0, 0.25)
    assert find("kfac:damping=0.5").make(nn.Linear(2, 2), 0.1, 0.0).precondition.damping == 0.5


@pytest.mark.parametrize("name", ["kfac:clip=1", "kfac:damping=x", "sgd:power=1", "whitened-sgd:power=-1", "spam"])
def test_a_method_that_does_not_exist_is_named(name, capsys):
    with pytest.raises(SystemExit):
        program.main([*SMALL, "--methods", name])
    assert name in capsys.readouterr().err


def test_the_version_of_a_method_is_what_it_does(monkeypatch):
    first = version_of("mlp-diamonds", "kfac")
    assert version_of("mlp-diamonds", "kfac") == first != version_of("mlp-diamonds", "sgd")
    assert version_of("mlp-diamonds", "kfac:damping=0.1") != first
    monkeypatch.setattr("benchmarks.peers.curvature.INTERVAL", 5)
    assert version_of("mlp-diamonds", "kfac") != first


def test_the_learning_rate_rises_and_falls():
    heights = [height(step, 100) for step in range(100)]
    assert heights[0] == pytest.approx(0.1) and heights[9] == heights[10] == 1 and heights[-1] < 0.001
    assert heights[10:] == sorted(heights[10:], reverse=True)


def test_a_run_repeats_and_one_that_comes_apart_is_infinite():
    setting = Setting("mlp-diamonds", "whitened-sgd", 0.01, 0.0, 3, 10, "1")
    first, second = runs.run(setting), runs.run(setting)
    assert first == second and 0 < first["loss"] < 10 and first["test_accuracy"] is None
    wild = runs.run(Setting("mlp-diamonds", "sgd", 1e6, 0.0, 3, 10, "1"))
    assert wild["loss"] == wild["valid_loss"] == wild["test_loss"] == math.inf


def test_a_store_goes_on_after_a_line_that_was_cut_short(tmp_path):
    made = []

    def compute(setting):
        made.append(setting)
        return {**vars(setting), "loss": math.inf, "valid_loss": 1.0, "test_loss": 1.0, "test_accuracy": None}

    one, other = (Setting("t", "m", 0.1, 0.0, 0, 5, version) for version in ("1.2", "1.3"))
    store = Store(tmp_path / "runs" / "t.jsonl")
    assert store.get(one, compute) is store.get(one, compute)
    with open(store.path, "a") as file:
        file.write('{"task": "t", "meth')
    store = Store(store.path)
    assert store.get(one, compute)["loss"] == math.inf and made == [one]
    store.get(other, compute)
    assert set(Store(store.path).found) == {one, other} and made == [one, other]


def test_a_run_of_the_program_leaves_tables_a_file_and_a_plot(tmp_path, capsys):
    arguments = [*SMALL, "--methods", "sgd", "adamw", "whitened-sgd", "--out", str(tmp_path)]
    assert program.main(arguments) == 0
    output = capsys.readouterr().out
    assert "in equal seconds" in output and program.SUMMARY_TITLE in output
    result = results(tmp_path)
    assert [row["method"] for row in result["rows"]] == ["sgd", "adamw", "whitened-sgd"]
    sgd, _, whitened = result["rows"]
    assert sgd["pace"] == 1 and sgd["equal_steps"] == 10 and sgd["equal_seconds"] == sgd["loss"]
    assert whitened["least"] <= whitened["loss"] <= whitened["most"] and whitened["is_inside"] in (True, False)
    (summary,) = program.summarise(result["rows"])
    assert summary["tuned"] and summary["loss_ours"] == "whitened-sgd" and summary["loss_theirs"] in ("sgd", "adamw")
    theirs = min(row["loss"] for row in result["rows"][:2])
    assert summary["loss_ratio"] == pytest.approx(whitened["loss"] / theirs)
    assert (tmp_path / "peers.png").read_bytes().startswith(b"\x89PNG")
    lines = (tmp_path / "runs" / "mlp-diamonds.jsonl").read_text().splitlines()
    assert {json.loads(line)["seed"] for line in lines} == {0, 1, *program.SEARCHED}
    assert program.main(arguments) == 0  # nothing is trained again
    assert (tmp_path / "runs" / "mlp-diamonds.jsonl").read_text().splitlines() == lines
    assert results(tmp_path)["rows"] == result["rows"]


def test_an_interrupt_keeps_the_runs(tmp_path, monkeypatch, capsys):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(program, "search", interrupted)
    assert program.main([*SMALL, "--methods", "sgd", "--out", str(tmp_path)]) == 130
    assert results(tmp_path)["interrupted"] and results(tmp_path)["rows"] == []


def test_a_missing_package_is_named(monkeypatch, capsys):
    def missing(*arguments):
        raise ModuleNotFoundError("No module named 'singd'", name="singd")

    monkeypatch.setattr(program, "timings", missing)
    with pytest.raises(SystemExit):
        program.main(SMALL)
    assert "singd is missing: pip install 'whiten-layers[bench,peers]'" in capsys.readouterr().err
