"""A whole run on each data set, and every way of running that an option chooses."""

import dataclasses

import pytest
import torch
import whiten_layers.models

import benchmarks.data
from benchmarks.train.__main__ import main
from benchmarks.train.batches import Shares, shares_of_test
from benchmarks.train.command_line import parse
from benchmarks.train.datasets import open_data
from benchmarks.train.world import World

from .. import results
from .tiny import TEST, TRAIN, options, scalars


def rows(out):
    return results(out)["epochs"]


def first_images(made):
    def few():
        images = made()
        parts = [[part[:number] for part in both] for both, number in ((images.train, TRAIN), (images.test, TEST))]
        return dataclasses.replace(images, train=tuple(parts[0]), test=tuple(parts[1]))

    return few


@pytest.mark.parametrize("dataset", ["digits", "crops", "cifar10", "cifar100", "imagenet", "ucf101"])
def test_a_whole_run(dataset, data, tmp_path, capsys, monkeypatch):
    for name in ("digits", "crops"):
        monkeypatch.setattr(benchmarks.data, name, first_images(getattr(benchmarks.data, name)))
    arguments = options(dataset, data(dataset), tmp_path / "run")
    assert main(arguments) == 0
    chosen, opened = parse(arguments), open_data(parse(arguments))
    result = results(tmp_path / "run")
    assert result["finished"] and len(result["epochs"]) == chosen.optimization.epochs
    assert result["training images"] == len(opened.train) and result["environment"]["torch"]
    assert (len(opened.train), len(opened.test)) == (TRAIN, TEST)
    assert (tmp_path / "run" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "images/s" in capsys.readouterr().out
    # The weights are those of the plain network, which tests as the whitened one did.
    plain = getattr(whiten_layers.models, chosen.network.model.removeprefix("whitened_"))(
        num_classes=opened.num_classes
    )
    plain.load_state_dict(torch.load(tmp_path / "run" / "weights.pt", weights_only=True))
    images, labels = zip(*(opened.test[0, i] for i in range(len(opened.test))), strict=True)
    with torch.no_grad():
        outputs = plain.eval()(torch.stack(images))
    accuracy = (outputs.argmax(1) == torch.tensor(labels)).double().mean().item()
    assert accuracy == pytest.approx(result["epochs"][-1]["test_accuracy"], abs=1.5 / len(opened.test))


def test_it_learns(tmp_path):
    arguments = ["--dataset", "digits", "--epochs", "3", "--batch-size", "64", "--lr", "0.1", "--device", "cpu"]
    assert main([*arguments, "--out", str(tmp_path / "run"), "--workers", "0"]) == 0
    assert rows(tmp_path / "run")[-1]["test_accuracy"] > 0.8


def test_the_number_of_workers_makes_no_difference(data, tmp_path):
    losses = []
    for workers in ("0", "2"):
        out = tmp_path / workers
        assert main(options("cifar10", data("cifar10"), out, "--workers", workers, "--epochs", "2")) == 0
        losses.append([row["train_loss"] for row in rows(out)])
    assert losses[0] == losses[1]


def place(rank, processes):
    return World(rank, rank, processes, torch.device("cpu"))


@pytest.mark.parametrize("accumulate, processes", [(1, 1), (4, 1), (1, 2), (2, 4)])
def test_a_step_takes_the_same_images_however_they_are_dealt_out(accumulate, processes):
    def of_step(step, accumulate, processes):
        taken = []
        for rank in range(processes):
            shares = Shares(50, 16, accumulate, place(rank, processes), seed=3)
            shares.epoch, shares.start = 7, step
            assert len(list(shares)) == len(shares) == (3 - step) * accumulate
            taken += [key for share in list(shares)[:accumulate] for key in share]
        return sorted(taken)

    for step in range(3):
        whole = of_step(step, 1, 1)
        assert len(set(whole)) == 16 and {epoch for epoch, _ in whole} == {7}
        assert of_step(step, accumulate, processes) == whole
    assert of_step(0, 1, 1) != of_step(1, 1, 1)


def test_tensorboard_gets_every_figure_of_an_epoch(data, tmp_path):
    assert main(options("cifar10", data("cifar10"), tmp_path / "run", "--tensorboard", "--epochs", "2")) == 0
    last = rows(tmp_path / "run")[-1]
    for name, value in {"train/loss": last["train_loss"], "test/accuracy": last["test_accuracy"]}.items():
        told = scalars(tmp_path / "run", name)
        assert [step for step, _ in told] == [1, 2] and told[-1][1] == pytest.approx(value)


@pytest.mark.parametrize("images, size, processes", [(12, 4, 1), (12, 5, 2), (3, 2, 4), (9, 3, 2)])
def test_each_test_image_is_one_process_s_and_all_take_as_many_turns(images, size, processes):
    shares = [shares_of_test(images, size, place(rank, processes)) for rank in range(processes)]
    assert len({len(share) for share in shares}) == 1
    numbers = [number for share in shares for part in share for _, number in part]
    assert sorted(numbers) == list(range(images))
    assert all(len(part) <= size for share in shares for part in share)
