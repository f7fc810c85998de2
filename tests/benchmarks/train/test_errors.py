"""What cannot be used ends the program with one line that says what to do, status 2, and nothing overwritten."""

import errno
import http.server
import multiprocessing
import os
import shutil
import subprocess
import sys
import threading
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks.train import datasets
from benchmarks.train.__main__ import main
from benchmarks.train.run import Run

from .test_resume import assert_same_run, at_turn, interrupt_at
from .tiny import know, options

PROGRAM = "python -m benchmarks.train: "


def fails(arguments, capsys):
    """The one line that the program ends with."""
    capsys.readouterr()
    try:
        status = main(arguments)
    except SystemExit as ended:
        status = ended.code
    # What a terminal shows: a bar that was wiped is followed by a carriage return; that of a download stays.
    shown = [line.rpartition("\r")[2].strip() for line in capsys.readouterr().err.split("\n")]
    said = [line for line in shown if line and not line.endswith("B/s]")]
    assert status == 2 and len(said) == 1 and said[0].startswith(PROGRAM), said
    return said[0].removeprefix(PROGRAM)


def copied(tree, tmp_path):
    return shutil.copytree(tree, tmp_path / "data")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--dataset", "mnist"], "argument --dataset: invalid choice: 'mnist'"),
        (["--preset", "cifar10-resnet21"], "argument --preset: invalid choice: 'cifar10-resnet21'"),
        (["--model", "resnet21"], "argument --model: invalid choice: 'resnet21'"),
        (["--epoch", "3"], "unrecognized arguments: --epoch 3"),
        (["--lr", "0"], "argument --lr: invalid positive float value: '0'"),
        (["--epochs", "1.5"], "argument --epochs: invalid positive int value: '1.5'"),
        (["--momentum", "1"], "argument --momentum: invalid number in [0, 1) value: '1'"),
        (["--weight-decay", "-1"], "argument --weight-decay: invalid number of at least 0 value: '-1'"),
        (["--workers", "-1"], "argument --workers: invalid int of at least 0 value: '-1'"),
        (["--seed", str(2**63)], "argument --seed: invalid int of at least 0 value"),
        (["--power", "2"], "power=2.0 is not possible: give a number in [0, 1]"),
        (["--model", "resnet20", "--power", "1"], "--power: resnet20 is not whitened; --model whitened_… is"),
        (["--model", "resnet20", "--no-center"], "--center: resnet20 is not whitened; --model whitened_… is"),
        (["--optimizer", "adam", "--momentum", "0"], "--momentum: only for --optimizer sgd and rmsprop"),
        (["--model", "resnet20", "--psi"], "--psi: resnet20 is not whitened; --model whitened_… is"),
        (["--model", "resnet20", "--exact"], "--exact: resnet20 is not whitened"),
        (["--batch-size", "10", "--accumulate", "4"], "--batch-size 10: has to be twice as many as processes × --acc"),
        (["--batch-size", "4", "--accumulate", "4"], "--batch-size 4: has to be twice as many as processes × --acc"),
        (["--schedule", "step"], "--schedule step: needs --milestones EPOCH …"),
        (["--milestones", "3"], "--milestones: only for --schedule step"),
        (["--gamma", "0.5"], "--gamma: only for --schedule step"),
        (
            ["--schedule", "step", "--milestones", "3", "20"],
            "--milestones 20: the run has 20 epochs; give earlier ones",
        ),
        (["--preset", "cifar10-resnet20", "--epochs", "20"], "--milestones 82: the run has 20 epochs"),
        (["--optimizer", "adam", "--momentum", "0.8"], "--momentum: only for --optimizer sgd and rmsprop"),
        (["--crop-size", "32"], "--crop-size: only for --dataset imagenet"),
        (["--psi", "--norm", "iter_norm"], "--psi: "),
        (["--epochs", "3", "--warmup-epochs", "3"], "--warmup-epochs 3: the run has 3 epochs; give fewer"),
        (["--optimizer", "adamw", "--nesterov"], "--nesterov: only for --optimizer sgd and a --momentum above 0"),
        (["--auto-augment", "augmix"], "--auto-augment: only for --dataset cifar10, cifar100 and imagenet"),
        (["--download"], "--download: only for --dataset cifar10 and cifar100"),
        (
            ["--dataset", "ucf101"],
            "--model whitened_resnet20: ucf101 has videos; take one of mfcd_net, mfnet3d, whitened_",
        ),
        (["--model", "mfnet3d"], "--model mfnet3d: digits has images; take another one"),
        (["--frames", "8"], "--frames: only for --dataset ucf101 and hmdb51"),
        (["--dataset", "hmdb51", "--model", "mfnet3d", "--mixup", "0.2"], "--mixup: only for images"),
        (["--dataset", "hmdb51", "--model", "mfnet3d", "--random-erasing", "0.2"], "--random-erasing: only for images"),
        (["--distill-weight", "0.3"], "--distill-weight: only for a run with a --teacher"),
        (["--batch-size", "5000"], "--batch-size 5000: digits has 1348 training images"),
    ],
)
def test_a_wrong_option(arguments, message, tmp_path, capsys):
    assert message in fails([*arguments, "--out", str(tmp_path / "run")], capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_no_gpu(capsys):
    assert fails(["--device", "cuda"], capsys).startswith("--device cuda: there is none; take --device cpu")


def test_no_folder(tmp_path, capsys):
    nowhere = tmp_path / "nowhere"
    for dataset, message in {
        "cifar10": f"{nowhere}/cifar-10-batches-py/data_batch_1 is not there: name torchvision's folder with --data",
        "cifar100": f"{nowhere}/cifar-100-python/train is not there: name torchvision's folder with --data, or",
        "imagenet": f"{nowhere}/train is to hold a folder of images for each class: ",
    }.items():
        assert message in fails(options(dataset, nowhere, tmp_path / "run"), capsys)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_file_of_cifar(data, tmp_path, capsys):
    root = copied(data("cifar100"), tmp_path)
    file = root / "cifar-100-python" / "test"
    file.write_bytes(file.read_bytes()[:-1])
    assert f"{file} is damaged: name torchvision's folder" in fails(options("cifar100", root, tmp_path / "run"), capsys)
    assert not (tmp_path / "run").exists()


class Silent(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A folder, and the address at which it is served."""
    monkeypatch.setenv("no_proxy", "*")
    (tmp_path / "served").mkdir()
    handler = partial(Silent, directory=tmp_path / "served")
    with http.server.ThreadingHTTPServer(("localhost", 0), handler) as server:
        server.handle_error = lambda *_: None  # whoever fetches may hang up
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield tmp_path / "served", f"http://localhost:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # torchvision closes no connection
def test_an_archive_is_fetched_and_a_damaged_one_is_an_error(data, served, tmp_path, capsys):
    root, archive = data("cifar10"), "cifar-10-python.tar.gz"
    (source, address), target = served, tmp_path / "target"
    know(root, address)
    arguments = options("cifar10", target, tmp_path / "run", "--epochs", "1", "--download")
    assert f"{archive} could not be fetched into {target}" in fails(arguments, capsys)  # not there at all
    whole = (root / archive).read_bytes()
    (source / archive).write_bytes(whole[: len(whole) // 2])
    assert f"{archive} could not be fetched into {target}" in fails(arguments, capsys)
    assert not (tmp_path / "run").exists()
    (source / archive).write_bytes(whole)
    assert main(arguments) == 0


def test_imagenet_with_a_class_too_few(data, tmp_path, capsys):
    root = copied(data("imagenet"), tmp_path)
    shutil.rmtree(root / "val" / "n00000002")
    assert "class n00000002 is only in one of train/ and val/" in fails(
        options("imagenet", root, tmp_path / "run"), capsys
    )
    (root / "val" / "n00000002").mkdir()
    assert "Found no valid file for the classes n00000002" in fails(options("imagenet", root, tmp_path / "run"), capsys)
    shutil.rmtree(root / "val")
    assert f"{root}/val is to hold a folder of images" in fails(options("imagenet", root, tmp_path / "run"), capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("part, workers", [("train", "0"), ("train", "2"), ("val", "1")])
def test_a_damaged_image_is_named_and_the_run_goes_on_when_it_is_mended(part, workers, data, tmp_path, capsys):
    root = copied(data("imagenet"), tmp_path)
    image = next((root / part).glob("*/3.JPEG"))
    whole = image.read_bytes()
    image.write_bytes(whole[: len(whole) // 2])
    arguments = options(
        "imagenet", root, tmp_path / "run", "--workers", workers, "--epochs", "1", "--model", "resnet18"
    )
    message = fails(arguments, capsys)
    assert message.startswith(f"{image} cannot be read as an image: ")
    assert message.endswith("; mend it and --resume, or remove it and begin again")
    assert multiprocessing.active_children() == []
    stopped = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert stopped["epoch"] == 0 and (stopped["step"] == 5) == (part == "val")
    image.write_bytes(whole)
    assert main([*arguments, "--resume"]) == 0


def test_a_worker_that_is_killed(data, tmp_path, capsys, monkeypatch):
    at_turn(monkeypatch, 3, lambda: multiprocessing.active_children()[0].kill())
    arguments = options("cifar10", data("cifar10"), tmp_path / "run", "--workers", "1", "--epochs", "50")
    assert "a process that loads images has died" in fails(arguments, capsys)
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("error", [ConnectionResetError, EOFError])
def test_a_worker_that_is_killed_while_it_sends_images(error, data, tmp_path, capsys, monkeypatch):
    def broken(self, batches):
        raise error

    monkeypatch.setattr(Run, "_parts", broken)
    arguments = options("cifar10", data("cifar10"), tmp_path / "run", "--workers", "1")
    assert "a process that loads images has died" in fails(arguments, capsys)


def test_an_error_of_the_program_itself_ends_its_workers(data, tmp_path, monkeypatch):
    """Else multiprocessing waits for them at exit, for ever."""

    def fail(self, parts):
        raise ValueError("not foreseen")

    monkeypatch.setattr(Run, "_step", fail)
    with pytest.raises(ValueError, match="not foreseen"):
        main(options("cifar10", data("cifar10"), tmp_path / "run", "--workers", "2"))
    assert multiprocessing.active_children() == []


@contextmanager
def small_disk(path, size):
    path.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", path], capture_output=True)
    if made.returncode:
        pytest.skip("a disk of its own cannot be mounted here")
    try:
        yield path
    finally:
        subprocess.run(["umount", path], check=True)


def test_a_full_disk_at_the_start(data, tmp_path, capsys):
    with small_disk(tmp_path / "disk", "1m") as disk:
        message = fails(options("cifar10", data("cifar10"), disk / "run"), capsys)
        assert message.startswith(f"{disk}/run/checkpoint.pt cannot be written: No space left on device")
        assert list((disk / "run").iterdir()) == []


def test_a_full_disk_on_the_way(data, tmp_path, capsys):
    """What was saved before stays whole, and the run goes on from there when there is room."""
    root = data("cifar10")
    assert main(options("cifar10", root, tmp_path / "whole")) == 0
    # Of the first epoch: later ones may be larger, since they hold what was observed since the last refresh.
    assert main(options("cifar10", root, tmp_path / "first", "--epochs", "1")) == 0
    size = (tmp_path / "first" / "checkpoint.pt").stat().st_size
    with small_disk(tmp_path / "disk", str(size * 5 // 4)) as disk:  # no room for the new one beside the old one
        arguments = options("cifar10", root, disk / "run")
        assert "checkpoint.pt cannot be written: No space left on device" in fails(arguments, capsys)
        assert torch.load(disk / "run" / "checkpoint.pt", weights_only=True)["epoch"] == 0
        assert {path.name for path in (disk / "run").iterdir()} == {"checkpoint.pt", "results.json"}
        subprocess.run(["mount", "-o", "remount,size=50m", disk], check=True)
        assert main([*arguments, "--resume"]) == 0
        assert_same_run(disk / "run", tmp_path / "whole")


@pytest.mark.parametrize("write", range(1, 7))
def test_a_full_disk_at_any_write(write, data, tmp_path, capsys, monkeypatch):
    """Of an epoch's six, without a disk of its own: checkpoint, figures, checkpoint, weights, curves, figures."""
    root, writes, sync = data("cifar10"), [], os.fsync
    arguments = options("cifar10", root, tmp_path / "run", "--epochs", "1")

    def full(file):
        writes.append(file)
        if len(writes) == write:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(file)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert "cannot be written: No space left on device; make it possible and --resume" in fails(arguments, capsys)
    assert main([*arguments, "--resume"] if write > 1 else arguments) == 0
    assert main(options("cifar10", root, tmp_path / "whole", "--epochs", "1")) == 0
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_a_folder_that_cannot_be_made(data, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    message = fails(options("cifar10", data("cifar10"), tmp_path / "file" / "run"), capsys)
    assert "cannot be written: Not a directory; make it possible and --resume, or give another --out" in message


def test_a_folder_without_permission(data, tmp_path, capsys, monkeypatch):
    def exists(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    arguments = options("cifar10", data("cifar10"), tmp_path / "run")
    with monkeypatch.context() as patch:  # root may enter any
        patch.setattr(Path, "exists", exists)
        message = fails(arguments, capsys)
    assert message == f"{tmp_path}/run/checkpoint.pt cannot be looked at: Permission denied; give another --out"


def test_a_file_without_permission(data, tmp_path, capsys, monkeypatch):
    def check_integrity(path, digest):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    arguments = options("cifar10", data("cifar10"), tmp_path / "run")
    monkeypatch.setattr(datasets, "check_integrity", check_integrity)
    message = fails(arguments, capsys)
    assert message.endswith("data_batch_1 cannot be read: Permission denied; name another folder with --data")


@pytest.fixture
def stopped(data, tmp_path, monkeypatch):
    """The arguments of a run that was stopped in its first epoch."""
    arguments = options("cifar10", data("cifar10"), tmp_path / "run")
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3)
        assert main(arguments) == 0
    return arguments


def test_a_checkpoint_of_another_run(stopped, data, tmp_path, capsys):
    path = tmp_path / "run" / "checkpoint.pt"
    before = path.read_bytes()
    for more, message in {
        ("--model", "whitened_resnet32"): "--model was whitened_resnet20 there and is whitened_resnet32 here",
        ("--lr", "0.5"): "--lr was 0.02 there and is 0.5 here",
        ("--power", "1"): "--power was None there and is 1.0 here",
        ("--epochs", "4"): "--epochs was 3 there and is 4 here",
    }.items():
        said = fails([*stopped, *more, "--resume"], capsys)
        assert said.startswith(f"{path} is of another run: {message}; give the same options, or another --out")
    said = fails(options("cifar100", data("cifar100"), tmp_path / "run", "--resume"), capsys)
    assert "classes was 10 there and is 100 here" in said
    assert path.read_bytes() == before


def test_a_run_is_not_begun_over_another(stopped, tmp_path, capsys):
    path = tmp_path / "run" / "checkpoint.pt"
    before = path.read_bytes()
    assert "holds a run already (checkpoint.pt): go on with it by --resume, or give another --out" in fails(
        stopped, capsys
    )
    path.write_bytes(before[:100])  # damaged, but somebody's
    assert "holds a run already (checkpoint.pt)" in fails(stopped, capsys)
    path.write_bytes(before)
    path.rename(tmp_path / "run" / "results.json")
    assert "holds a run already (results.json)" in fails(stopped, capsys)
    assert (tmp_path / "run" / "results.json").read_bytes() == before


def test_a_run_that_took_no_step_can_be_begun_again(data, tmp_path, monkeypatch):
    arguments = options("cifar10", data("cifar10"), tmp_path / "run", "--epochs", "1")
    with monkeypatch.context() as patch:
        interrupt_at(patch, 1)
        assert main([*arguments, "--norm", "swbn"]) == 0
    assert main(arguments) == 0


def test_nothing_to_go_on_with(data, tmp_path, capsys):
    message = fails(options("cifar10", data("cifar10"), tmp_path / "run", "--resume"), capsys)
    assert "checkpoint.pt is not there, so there is nothing to --resume; leave that out to begin" in message
    assert not (tmp_path / "run").exists()


def test_a_damaged_checkpoint(stopped, tmp_path, capsys):
    path = tmp_path / "run" / "checkpoint.pt"
    whole = path.read_bytes()
    for content in (b"", b"not a checkpoint", whole[: len(whole) // 2]):
        path.write_bytes(content)
        assert f"{path} cannot be read as a checkpoint" in fails([*stopped, "--resume"], capsys)
        assert path.read_bytes() == content
    torch.save({"state_dict": {}}, path)
    assert fails([*stopped, "--resume"], capsys) == f"{path} is no checkpoint of this program"
    torch.save({"format": Ellipsis, "module": torch.nn.Linear(1, 1)}, path)  # a pickle that runs code when it is read
    assert f"{path} cannot be read as a checkpoint" in fails([*stopped, "--resume"], capsys)


def test_tensorboard_is_not_installed(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    message = fails(options("cifar10", data("cifar10"), tmp_path / "run", "--tensorboard"), capsys)
    assert message.startswith("--tensorboard: it is not installed; pip install 'whiten-layers[tensorboard]'")
