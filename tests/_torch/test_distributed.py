"""The inside of process groups and of DDP, as far as the library relies on what PyTorch does not document."""

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from whiten_layers._torch.distributed import allows_uneven_inputs, broadcast_in_buckets, exclude_from_ddp, timeout_of

from ..distributed.world import run


def timeouts(rank):
    groups = (dist.group.WORLD, dist.new_group([0], timedelta(seconds=7)))
    return [timeout_of(group).total_seconds() for group in groups]


def test_a_groups_timeout():
    hint = "a ProcessGroup's _get_backend(_device_types[0]).options._timeout is to be its timeout"
    assert run(timeouts, 1) == [[30, 7]], hint


class Noted(DistributedDataParallel):
    """Excludes a buffer where the library does: after the wrapper has taken the model, before it looks at buffers."""

    def __setattr__(self, name, value):
        super().__setattr__(name, value)
        if name == "module":
            exclude_from_ddp(self, ["own"], [value.own])


def forward(rank):
    model = nn.Linear(2, 2)
    model.register_buffer("own", torch.full((2,), float(rank)))
    model.register_buffer("shared", torch.full((2,), float(rank)))
    Noted(model)(torch.ones(1, 2)).sum().backward()
    return model.own.tolist(), model.shared.tolist()


def test_excluded_buffers_stay_each_ranks_own():
    hint = "DDP is to leave out buffers in parameters_to_ignore, and those with _ddp_ignored: see exclude_from_ddp"
    assert run(forward, 2) == [([0, 0], [0, 0]), ([1, 1], [0, 0])], hint


def broadcast(rank):
    tensors = [torch.full((size,), float(rank)) for size in (1, 5)]
    broadcast_in_buckets(tensors, dist.group.WORLD)
    return [tensor.tolist() for tensor in tensors], os.getpid()


def test_a_broadcast_in_buckets():
    (first, one), (second, other) = run(broadcast, 2)
    hint = "torch.distributed._broadcast_coalesced(group, tensors, bytes, source) is to send the first rank's values"
    assert first == second == [[0.0], [0.0] * 5] and one != other, hint


def uneven(rank):
    wrapper = DistributedDataParallel(nn.Linear(2, 2))
    before = allows_uneven_inputs(wrapper)
    with wrapper.join():
        inside = allows_uneven_inputs(wrapper)
    after = allows_uneven_inputs(wrapper)
    with wrapper.join(enable=False):
        return before, inside, after, allows_uneven_inputs(wrapper)


def test_inside_of_join_a_wrapper_allows_uneven_inputs():
    hint = "DistributedDataParallel._join_config.enable is to tell whether the wrapper is inside of join()"
    assert run(uneven, 1) == [(False, True, True, False)], hint
