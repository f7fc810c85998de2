"""A teacher's part in the loss against a slow truth, runs with one, and teachers that cannot be used."""

import shutil

import pytest
import torch

from benchmarks.train.__main__ import main
from benchmarks.train.distillation import open_teacher, soft_loss
from benchmarks.train.run import Run

from .. import results
from .test_errors import fails
from .test_resume import assert_same_run, interrupt_at
from .tiny import options


def test_soft_targets_are_hintons():
    generator = torch.Generator().manual_seed(0)
    outputs, taught = (3 * torch.randn(5, 4, dtype=torch.float64, generator=generator) for _ in range(2))
    temperature, total = 2.5, 0.0
    for own, wanted in zip(outputs.tolist(), taught.tolist(), strict=True):
        q, p = (torch.tensor(row).div(temperature).softmax(0).tolist() for row in (own, wanted))
        total += sum(b * (torch.tensor(b).log() - torch.tensor(a).log()).item() for a, b in zip(q, p, strict=True))
    expected = torch.tensor(temperature**2 * total / 5)
    torch.testing.assert_close(soft_loss(outputs, taught, temperature), expected, rtol=1e-5, atol=1e-6)  # float32
    assert soft_loss(taught, taught, temperature).abs() < 1e-6


@pytest.fixture
def teacher(data, tmp_path):
    """The checkpoint of a run on images, whose network is whitened and has norms of its own."""
    assert main(options("cifar10", data("cifar10"), tmp_path / "teacher", "--norm", "iter_norm", "--epochs", "1")) == 0
    return tmp_path / "teacher" / "checkpoint.pt"


def student(data, out, teacher, *more):
    return options("cifar10", data("cifar10"), out, "--model", "resnet20", "--teacher", str(teacher), *more)


def test_the_teacher_is_the_network_of_its_checkpoint(data, tmp_path, teacher):
    opened = open_teacher(teacher, torch.device("cpu"))
    weights = torch.load(teacher.parent / "weights.pt", weights_only=True)
    assert all(torch.equal(value, weights[name]) for name, value in opened.network.state_dict().items())
    assert not opened.network.training and not any(p.requires_grad for p in opened.network.parameters())
    assert (opened.num_classes, opened.clip) == (10, None)


def test_the_weight_of_the_teachers_part(data, tmp_path, teacher, monkeypatch):
    losses = {}
    for name, more in {
        "alone": ["--model", "resnet20"],
        "none": ["--model", "resnet20", "--teacher", str(teacher), "--distill-weight", "0"],
        "all": ["--model", "resnet20", "--teacher", str(teacher), "--distill-weight", "1", "--temperature", "2"],
        "half": ["--model", "resnet20", "--teacher", str(teacher), "--temperature", "2"],
    }.items():
        seen = []
        step = Run._step
        monkeypatch.setattr(
            Run, "_step", lambda self, parts, step=step, seen=seen: seen.append(step(self, parts)) or seen[-1]
        )
        assert main(options("cifar10", data("cifar10"), tmp_path / name, "--epochs", "1", *more)) == 0
        monkeypatch.setattr(Run, "_step", step)
        losses[name] = torch.stack(seen)
    assert torch.equal(losses["none"], losses["alone"])
    # The first step has the same weights in all runs.
    first = {name: loss[0] for name, loss in losses.items()}
    torch.testing.assert_close(first["half"], (first["alone"] + first["all"]) / 2, rtol=1e-6, atol=1e-6)
    assert not torch.isclose(first["all"], first["alone"])


@pytest.mark.parametrize(
    "recipe",
    [pytest.param([], marks=pytest.mark.slow), ["--mixup", "0.4", "--ema", "0.9", "--accumulate", "2"]],
    ids=["", "mixed"],
)
def test_a_run_with_a_teacher_is_resumed_bit_for_bit(recipe, data, tmp_path, teacher, monkeypatch, capsys):
    assert main(student(data, tmp_path / "whole", teacher, *recipe)) == 0
    with monkeypatch.context() as patch:
        interrupt_at(patch, 10)
        assert main(student(data, tmp_path / "run", teacher, *recipe)) == 0
    assert "SIGTERM: stopped and saved" in capsys.readouterr().out
    elsewhere = shutil.copytree(teacher.parent, tmp_path / "elsewhere") / "checkpoint.pt"
    assert main(student(data, tmp_path / "run", elsewhere, *recipe, "--resume")) == 0
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_a_student_of_residuals_with_a_teacher_of_frames_is_resumed_bit_for_bit(data, tmp_path, monkeypatch):
    root, teacher = data("ucf101"), tmp_path / "teacher"
    short = ["--model", "mfcd_net", "--batch-size", "16", "--channels-last"]
    assert main([*options("ucf101", root, teacher, *short), "--epochs", "1"]) == 0
    more = [*short, "--clip", "residual", "--teacher", str(teacher / "checkpoint.pt")]
    assert main(options("ucf101", root, tmp_path / "whole", *more)) == 0
    with monkeypatch.context() as patch:
        interrupt_at(patch, 5)  # the second epoch's first step
        assert main(options("ucf101", root, tmp_path / "run", *more)) == 0
    assert main(options("ucf101", root, tmp_path / "run", *more, "--resume")) == 0
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    known = open_teacher(teacher / "checkpoint.pt", torch.device("cpu"))
    assert known.clip == "rgb" and results(tmp_path / "run")["teacher's weights"] == known.digest()


def test_a_teacher_that_cannot_be_used(data, tmp_path, teacher, capsys):
    def said(dataset, *more):
        return fails([*options(dataset, data(dataset), tmp_path / "run"), *more], capsys)

    assert (
        said("cifar10", "--temperature", "2")
        == "--temperature: only for a run with a --teacher (--help lists what there is)"
    )
    assert "argument --distill-weight: invalid number in [0, 1] value: '2'" in said("cifar10", "--distill-weight", "2")
    nowhere = tmp_path / "nowhere.pt"
    assert said("cifar10", "--teacher", str(nowhere)) == (
        f"{nowhere} is not there, and --teacher takes the checkpoint.pt of a run"
    )
    broken = tmp_path / "broken.pt"
    broken.write_bytes(teacher.read_bytes()[:1000])
    assert "cannot be read as a checkpoint: " in said("cifar10", "--teacher", str(broken))
    assert said("cifar100", "--teacher", str(teacher)) == f"--teacher {teacher} knows 10 classes, and the data have 100"
    state = torch.load(teacher, weights_only=True)
    state["run"]["classes"] = 3
    torch.save(state, broken)
    assert f"{broken} does not fit a network of this version: " in said("cifar10", "--teacher", str(broken))
    state["run"] |= {"classes": 10, "model": "resnet21"}
    torch.save(state, broken)
    assert f"{broken} does not fit a network of this version: " in said("cifar10", "--teacher", str(broken))


def test_a_teacher_of_images_has_nothing_to_say_of_clips(data, tmp_path, teacher, capsys):
    state = torch.load(teacher, weights_only=True)
    state["run"]["classes"] = 3
    for name in ("fc.weight", "fc.bias"):
        state["network"][name] = state["network"][name][:3]
    torch.save(state, teacher)
    said = fails([*options("ucf101", data("ucf101"), tmp_path / "run"), "--teacher", str(teacher)], capsys)
    assert said == f"--teacher {teacher} was trained on images, not clips"


def test_a_run_is_not_resumed_with_another_teacher(data, tmp_path, teacher, capsys):
    assert main(student(data, tmp_path / "run", teacher, "--epochs", "1")) == 0
    state = torch.load(teacher, weights_only=True)
    state["network"]["fc.bias"] += 1
    torch.save(state, teacher)
    message = fails(student(data, tmp_path / "run", teacher, "--epochs", "1", "--resume"), capsys)
    assert "is of another run: teacher's weights was " in message
