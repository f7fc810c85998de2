"""State in several processes: what DDP sends, checkpoints of one number of ranks for another, a rank that dies."""

import os
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.nn.parallel import DistributedDataParallel

from whiten_layers import FeatureWhitening, WhitenedLinear, whiten
from whiten_layers.refresh import collectives

from .runs import batch, digest, distance, network, optimizer, parallel, plain, train, weights
from .world import needs_fsdp2, outcomes, run


def sent_at_once():
    """What is sent from the first rank from now on, tensor by tensor; DDP's own, which goes another way, is not."""
    sent, send = [], dist._broadcast_coalesced

    def broadcast(group, tensors, *options):
        sent.extend(tensors)
        send(group, tensors, *options)

    dist._broadcast_coalesced = broadcast
    return sent


def buffers_that_ddp_sends(rank, way):
    windows = FeatureWhitening(update_interval=100)
    if way == "by hand":
        model = nn.ModuleList([WhitenedLinear(4, 3)])
    else:
        model = nn.Sequential(plain(), nn.BatchNorm1d(5).double())
    if way in ("within a model", "in chains"):
        whiten(model[0], windows, psi="*" if way == "in chains" else False)
    sent = sent_at_once()
    wrapped = DistributedDataParallel(model)
    if way == "layer by layer":
        whiten(model, windows, include="0.0")
        whiten(nn.Linear(3, 2))  # of no wrapper
    if way in ("whitened afterwards", "layer by layer"):
        whiten(model, windows)
    assert sent and (way == "layer by layer" or len({id(tensor) for tensor in sent}) == len(sent))
    if way not in ("by hand", "in chains"):
        for step in range(6):  # a window is open after the last
            wrapped(batch(step + 100 * rank)[0]).sum().backward()
        window = model[0][0].transform.inputs.window.mean.clone()
        wrapped(batch(0)[0])
        assert torch.equal(model[0][0].transform.inputs.window.mean, window)
    wrapped._assign_modules_buffers()
    return len(wrapped.modules_buffers), len(list(model.buffers()))


@pytest.mark.parametrize("way", ["within a model", "in chains", "whitened afterwards", "layer by layer", "by hand"])
def test_ddp_sends_no_buffer_of_a_transform(way):
    for sent, held in run(buffers_that_ddp_sends, 2, way):
        assert sent == (0 if way == "by hand" else 3) and held > 8


def first_ranks_state(rank, folder):
    model = network("alike")
    if rank == 0:  # the one that has read a checkpoint
        model.load_state_dict(torch.load(Path(folder, "model.pt"), weights_only=True))
    trained = train(DistributedDataParallel(model), range(8, 30))
    return weights(trained), digest(model), model[0].transform.num_batches_tracked


def test_ddp_starts_from_the_first_ranks_state(tmp_path):
    model = train(network("alike"), range(8))
    torch.save(model.state_dict(), tmp_path / "model.pt")
    train(model, range(8, 30))
    for result, _, batches in run(first_ranks_state, 2, str(tmp_path)):
        assert batches == 30
        assert distance(result, weights(model)) < 1e-9


def saved(rank, folder, kind):
    model = network("observed at refreshes")
    wrapped = parallel(model, kind)
    optimiser = optimizer(wrapped)
    train(wrapped, range(21), optimiser)
    states = get_state_dict(wrapped, optimiser)
    dcp.save({"model": states[0], "optimizer": states[1]}, checkpoint_id=folder)
    return digest(model), weights(train(wrapped, range(21, 30), optimiser)), digest(model)


def resumed(rank, folder, kind):
    model = network("observed at refreshes")
    wrapped = parallel(model, kind)
    optimiser = optimizer(wrapped)
    states = get_state_dict(wrapped, optimiser)
    state = {"model": states[0], "optimizer": states[1]}
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(wrapped, optimiser, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return digest(model), weights(train(wrapped, range(21, 30), optimiser)), digest(model)


@pytest.mark.parametrize("kind, others", [("DDP", 1), pytest.param("FSDP2", 4, marks=needs_fsdp2)])
def test_a_distributed_checkpoint_goes_on_with_as_many_ranks_bit_for_bit_and_with_others(tmp_path, kind, others):
    whole = run(saved, 2, str(tmp_path), kind)
    assert run(resumed, 2, str(tmp_path), kind) == whole
    for state, result, _ in run(resumed, others, str(tmp_path), kind):
        assert state == whole[0][0]
        assert distance(result, whole[0][1]) < 1e-9


def killed(rank, folder, during):
    model = network("observed at refreshes")
    wrapped = DistributedDataParallel(model)
    optimiser = optimizer(model)
    file = Path(folder, "checkpoint.pt")
    begun = 0
    if file.exists():
        state = torch.load(file, weights_only=True)
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimizer"])
        begun = state["step"]
    for step in range(begun, 40):
        if rank == 1 and not begun and not file.with_name("whole").exists() and step == (19 if during else 23):
            if during:  # the refresh of the twentieth batch, when the others wait for what comes of a share
                collectives.exchange = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
            else:
                os.kill(os.getpid(), signal.SIGKILL)
        train(wrapped, range(step, step + 1), optimiser)
        if step % 7 == 6 and rank == 0:
            state = {"model": model.state_dict(), "optimizer": optimiser.state_dict(), "step": step + 1}
            torch.save(state, file.with_suffix(".new"))
            file.with_suffix(".new").rename(file)
    return weights(model), digest(model)


@pytest.mark.parametrize("during", [False, True], ids=["between refreshes", "during one"])
def test_when_a_rank_is_killed_the_others_end_and_the_run_goes_on_bit_for_bit(tmp_path, during):
    first, second = outcomes(killed, 2, str(tmp_path), during, timeout=40, patience=20)
    assert second.status == -signal.SIGKILL and first.status == 1  # and neither was left hanging
    continued = run(killed, 2, str(tmp_path), during)
    for file in tmp_path.iterdir():
        file.unlink()
    (tmp_path / "whole").touch()
    assert continued == run(killed, 2, str(tmp_path), during)
