"""An interrupted run, resumed, is the run that was not interrupted, bit for bit."""

import contextlib
import io
import os
import re
import signal
import time
from tempfile import TemporaryDirectory

import pytest
import torch
import torch.distributed as dist
from torch.utils._pytree import tree_flatten_with_path

from benchmarks.train import world
from benchmarks.train.__main__ import main
from benchmarks.train.record import Record
from benchmarks.train.run import Run
from tests.distributed.world import free_port, run

from ...helpers import mostly_slow
from .. import results
from .tiny import know, options, scalars, start

MEASURED = re.compile("seconds|images_per_second")


def checkpoint(out):
    """All that a checkpoint holds, by its place in it, but for what a clock measured."""
    leaves, _ = tree_flatten_with_path(torch.load(out / "checkpoint.pt", weights_only=True))
    named = {"".join(map(str, path)): leaf for path, leaf in leaves}
    return {name: leaf for name, leaf in named.items() if not MEASURED.search(name)}


def assert_same_run(out, whole):
    ours, theirs = checkpoint(out), checkpoint(whole)
    assert ours.keys() == theirs.keys()
    for name, leaf in ours.items():
        same = torch.equal(leaf, theirs[name]) if isinstance(leaf, torch.Tensor) else leaf == theirs[name]
        assert same, name
    both = [results(folder) for folder in (out, whole)]
    figures = [[{k: v for k, v in row.items() if not MEASURED.search(k)} for row in r["epochs"]] for r in both]
    assert figures[0] == figures[1] and both[0]["finished"]
    weights = [torch.load(folder / "weights.pt", weights_only=True) for folder in (out, whole)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])


def at_turn(monkeypatch, turn, action):
    """Do something at the program's `turn`-th look for a signal."""
    look, turns = world.Stop.agreed, []

    def agreed(self, error=None):
        turns.append(1)
        if len(turns) == turn:
            action()
        return look(self, error)

    monkeypatch.setattr(world.Stop, "agreed", agreed)


def interrupt_at(monkeypatch, turn, number=signal.SIGTERM):
    """Send this process a signal at the program's `turn`-th look for one."""
    at_turn(monkeypatch, turn, lambda: os.kill(os.getpid(), number))


RECIPES = {
    "whitened": [],
    "plain": ["--model", "resnet20", "--nesterov", "--schedule", "step", "--milestones", "1", "--deterministic"],
    # Statistics more often than refreshes: what was observed since the last refresh is part of the state, too.
    "both-sides": ["--power", "1", "--output-power", "0.5", "--statistics-interval", "1", "--update-interval", "4"],
    "recursive": ["--method", "recursive", "--rank", "4", "--optimizer", "adamw", "--clip-norm", "1"],
    "swbn": ["--norm", "swbn", "--psi", "--optimizer", "rmsprop", "--lr", "1e-3", "--warmup-epochs", "1"],
    "mixed": ["--mixup", "0.4", "--cutmix", "1", "--label-smoothing", "0.1", "--auto-augment", "trivialaugment"],
    "averaged": ["--ema", "0.9", "--accumulate", "2", "--channels-last", "--random-erasing", "0.5"],
    "fp16": ["--precision", "fp16", "--epochs", "1"],  # slow on a CPU
    "compiled": ["--compile"],
    "bf16": ["--precision", "bf16", "--schedule", "linear", "--norm-weight-decay", "0", "--workers", "1"],
}


# An epoch is five steps and two turns of testing: before the first, in the second epoch, in its test, at the end.
@pytest.mark.parametrize("recipe", mostly_slow(RECIPES, ["whitened", "mixed", "averaged"]))
def test_stopped_by_sigterm_anywhere(recipe, data, tmp_path, monkeypatch, capsys):
    turns = {"whitened": [1, 10, 14, 21], "fp16": [3]}.get(recipe, [10])
    root = data("cifar10")
    assert main(options("cifar10", root, tmp_path / "whole", *RECIPES[recipe])) == 0
    for turn in turns:
        out = tmp_path / str(turn)
        arguments = options("cifar10", root, out, *RECIPES[recipe])
        with monkeypatch.context() as patch:
            interrupt_at(patch, turn)
            assert main(arguments) == 0
        assert "SIGTERM: stopped and saved" in capsys.readouterr().out
        assert not (out / "weights.pt").exists()
        assert main([*arguments, "--resume"]) == 0
        assert_same_run(out, tmp_path / "whole")


@pytest.mark.parametrize("what", [(Run, "save"), (Record, "epoch"), (Record, "close")], ids=["save", "record", "close"])
def test_killed_between_what_is_written_at_the_end(what, data, tmp_path, monkeypatch):
    """The last checkpoint, the last figures and the weights are three writes; a kill may fall between any two."""
    root, out = data("cifar10"), tmp_path / "run"
    assert main(options("cifar10", root, tmp_path / "whole", "--tensorboard")) == 0

    class Killed(BaseException):
        pass

    def at_the_end(self, *arguments):
        rows = arguments[0] if arguments else self.rows
        if len(rows) == 3:
            raise Killed
        return done(self, *arguments)

    done = getattr(*what)
    with monkeypatch.context() as patch:
        patch.setattr(*what, at_the_end)
        with pytest.raises(Killed):
            main(options("cifar10", root, out, "--tensorboard"))
    assert not results(out)["finished"]
    assert main(options("cifar10", root, out, "--tensorboard", "--resume")) == 0
    assert_same_run(out, tmp_path / "whole")
    assert [step for step, _ in scalars(out, "train/loss")] == [1, 2, 3]


def test_with_another_number_of_processes(data, tmp_path, monkeypatch):
    """What two processes have counted of an epoch is counted by the one that goes on."""
    # Between two refreshes nothing is observed, which would be dropped with the number of processes.
    rare = ["--statistics-interval", "10"]
    arguments = [*options("cifar10", data("cifar10"), tmp_path / "run"), *rare]
    assert main([*options("cifar10", data("cifar10"), tmp_path / "whole"), *rare]) == 0
    with monkeypatch.context() as patch:
        interrupt_at(patch, 10)
        assert main(arguments) == 0
    path = tmp_path / "run" / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    (one,) = state["processes"]
    assert one["sums"][2] == 16  # images
    state["processes"] = [{**one, "sums": one["sums"] / 4}, {**one, "sums": one["sums"] * 3 / 4}]
    torch.save(state, path)
    assert main([*arguments, "--resume"]) == 0
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_stopped_by_control_c(data, tmp_path, monkeypatch, capsys):
    arguments = options("cifar10", data("cifar10"), tmp_path)
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    interrupt_at(monkeypatch, 3, signal.SIGINT)
    assert main(arguments) == 130
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert "SIGINT: stopped and saved" in capsys.readouterr().out
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 2


def test_control_c_twice_interrupts_at_once(data, tmp_path, monkeypatch):
    def impatient(self, parts):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Run, "_step", impatient)
    with pytest.raises(SystemExit, match="130"):
        main(options("cifar10", data("cifar10"), tmp_path))
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 0


def test_a_signal_that_comes_while_processes_ask_one_another_is_for_the_next_step(monkeypatch):
    def all_reduce(told, how):
        if not signals:
            signals.append(os.kill(os.getpid(), signal.SIGTERM))

    signals = []
    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    with world.Stop(world.World(0, 0, 2, torch.device("cpu"))) as stop:
        assert not stop.agreed()
        assert stop.agreed() and stop.signal == signal.SIGTERM


def test_what_was_seen_is_in_the_checkpoint_and_not_drawn_again(data, tmp_path):
    """Two epochs of one run see other orders and other augmentations: the equality above is not one of constants."""
    assert main(options("cifar10", data("cifar10"), tmp_path, "--lr", "1e-30", "--model", "resnet20")) == 0
    rows = results(tmp_path)["epochs"]
    assert len({row["train_loss"] for row in rows}) == 3


def test_a_checkpoint_of_the_first_format_goes_on_unless_it_has_open_windows(data, tmp_path, monkeypatch, capsys):
    """It had windows in a list, without names."""
    arguments = [options("cifar10", data("cifar10"), tmp_path / name, "--epochs", "1") for name in ("whole", "old")]
    assert main(arguments[0]) == 0
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3)
        assert main(arguments[1]) == 0
    path = tmp_path / "old" / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    state["format"] = 1
    for windows in ([None, [torch.ones(1)] * 3], [None, None]):
        state["processes"][0]["windows"] = windows
        torch.save(state, path)
        assert main([*arguments[1], "--resume"]) == (2 if windows[1] else 0)
    assert "resume with whiten_layers 0.1.0" in capsys.readouterr().err
    assert_same_run(tmp_path / "old", tmp_path / "whole")


def test_another_seed_is_another_run(data, tmp_path):
    losses = []
    for seed in ("0", "1"):
        assert main(options("cifar10", data("cifar10"), tmp_path / seed, "--seed", seed, "--epochs", "1")) == 0
        losses.append(results(tmp_path / seed)["epochs"][0]["train_loss"])
    assert losses[0] != losses[1]


def wait_for(process, out, epochs):
    """Until a run has written the figures of so many epochs."""
    path, end = out / "results.json", time.monotonic() + 120
    while not path.exists() or len(results(out)["epochs"]) < epochs:
        if process.poll() is not None or time.monotonic() > end:
            process.kill()
            pytest.fail(str(process.communicate(timeout=60)))
        time.sleep(0.01)


def finish(process, status):
    output, errors = process.communicate(timeout=120)
    assert process.returncode == status, (output, errors)
    assert "Traceback" not in errors
    return output


@pytest.mark.parametrize("dataset", mostly_slow(["cifar10", "cifar100", "imagenet"], ["cifar10"]))
def test_stopped_and_killed_in_processes_of_their_own(dataset, data, tmp_path):
    """Stopped by SIGTERM, sent to all that the program started; resumed; killed by SIGKILL; resumed."""
    root = data(dataset)
    arguments = options(dataset, root, tmp_path / "run")
    process = start([*arguments, "--workers", "1"], root, pause=0.2, start_new_session=True)
    wait_for(process, tmp_path / "run", 1)
    os.killpg(process.pid, signal.SIGTERM)
    assert "SIGTERM: stopped and saved" in finish(process, 0)
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["epoch"] < 3
    process = start([*arguments, "--resume"], root, pause=0.2)
    wait_for(process, tmp_path / "run", 2)
    process.kill()  # before or after the epoch's checkpoint
    finish(process, -signal.SIGKILL)
    assert main([*arguments, "--resume"]) == 0
    assert main(options(dataset, root, tmp_path / "whole")) == 0
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def as_torchrun(rank, commands, tree, folder, ports):
    """The program in one of two processes, once for each command: its statuses and what it says."""
    dist.destroy_process_group()
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "localhost"}
    os.environ |= {name: str(value) for name, value in place.items()}
    know(tree)
    ended = []
    for arguments, port in zip(commands, ports, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            status = main(arguments)
        ended.append((status, said.getvalue()))
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)  # the caller's own
    return ended


def two_processes(tree, *commands, timeout=120):
    """How each command ends: a status and what is said, in each of two processes."""
    ports = [free_port() for _ in commands]
    with TemporaryDirectory() as folder:
        return list(zip(*run(as_torchrun, 2, commands, tree, folder, ports, timeout=timeout), strict=True))


def test_two_processes_stopped_and_resumed(data, tmp_path):
    """Under torchrun, which hands on the SIGTERM that it gets."""
    root, outs = data("cifar10"), (tmp_path / "run", tmp_path / "whole")
    # What was observed since the last refresh is each process's own.
    more = ["--update-interval", "4", "--statistics-interval", "1", "--accumulate", "2", "--ema", "0.9"]
    arguments = [options("cifar10", root, out, *more) for out in outs]
    process = start(arguments[0], root, processes=2, pause=0.3)
    wait_for(process, outs[0], 1)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)  # its status and a traceback are torchrun's own
    assert "SIGTERM: stopped and saved" in output
    stopped = torch.load(outs[0] / "checkpoint.pt", weights_only=True)
    assert stopped["epoch"] < 3 and len(stopped["processes"]) == 2
    for ended in two_processes(root, [*arguments[0], "--resume"], arguments[1]):
        assert [status for status, _ in ended] == [0, 0], ended
    assert_same_run(*outs)


def test_two_processes_follow_one(data, tmp_path):
    """With a normalization that is synchronised and every row observed, the same command is the same training.

    So it is without what each process measures of its own part. What cannot be used ends both with one line.
    """
    root, losses = data("cifar10"), []
    more = ["--norm", "iter_norm", "--max-rows", "1000000", "--lr", "1e-3", "--epochs", "2"]
    more += ["--no-shrink", "--no-rescale", "--bound", "1e9"]
    assert main(options("cifar10", root, tmp_path / "one", *more)) == 0
    nowhere = options("cifar10", tmp_path / "nowhere", tmp_path / "run")
    failed, ended = two_processes(root, nowhere, options("cifar10", root, tmp_path / "two", *more))
    assert [status for status, _ in failed] == [2, 2]
    assert failed[0][1].count("\n") == 1 and "is not there" in failed[0][1] and not failed[1][1]
    assert not (tmp_path / "run").exists()
    assert [status for status, _ in ended] == [0, 0]
    for out in (tmp_path / "one", tmp_path / "two"):
        losses.append([(row["train_loss"], row["test_loss"]) for row in results(out)["epochs"]])
    # Float32 rounding, amplified by ten steps of training (6e-5 was seen); other images would be off by parts in ten.
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=5e-4, atol=0)
    assert results(tmp_path / "two")["processes"] == 2


@pytest.mark.slow
def test_two_processes_compiled(data, tmp_path):
    arguments = options("cifar10", data("cifar10"), tmp_path, "--compile", "--epochs", "2", "--norm", "iter_norm")
    (ended,) = two_processes(data("cifar10"), arguments, timeout=500)
    assert [status for status, _ in ended] == [0, 0], ended


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(data, tmp_path, monkeypatch):
    more = ["--device", "cuda", "--deterministic", "--precision", "fp16", "--ema", "0.9", "--channels-last"]
    more += ["--workers", "1"]
    assert main(options("cifar10", data("cifar10"), tmp_path / "whole", *more)) == 0
    arguments = options("cifar10", data("cifar10"), tmp_path / "run", *more)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 10)
        assert main(arguments) == 0
    assert main([*arguments, "--resume"]) == 0
    assert_same_run(tmp_path / "run", tmp_path / "whole")
