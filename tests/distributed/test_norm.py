"""Whitening normalizations in several processes: each has a part of the batch, and the statistics are of the whole."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map

from ..norm.cases import CHANNELS, KINDS, draw, make, state
from .runs import CUTS
from .world import run

SHAPE = (8, CHANNELS, 3, 2)


def passed(rank, ranks, momentum, steps=3, **options):
    """What a rank's part of some batches gives: output, input gradient, parameter gradients, buffers, of every kind."""
    results = []
    part = slice(CUTS[ranks][rank], CUTS[ranks][rank + 1])
    for kind in KINDS:
        layer = make(kind, draw(SHAPE), momentum=momentum, group_size=3, **options)
        if kind == "swbn":
            layer.step_size.fill_(0.05)
        for step in range(steps):
            x = draw(SHAPE, seed=step)[part].requires_grad_()
            output = layer(x)
            layer.zero_grad()
            output.backward(draw(SHAPE, seed=100 + step)[part])
        results.append((output.detach(), x.grad, [p.grad for p in layer.parameters()], state(layer)))
    return tree_map(
        lambda tensor: tensor.numpy(), results
    )  # a tensor would be sent as shared memory, and its process may be gone


@pytest.mark.parametrize("ranks, momentum", [(2, 0.1), (4, None)])  # one of four has nothing
def test_ranks_follow_one_process(ranks, momentum):
    together = tree_map(torch.as_tensor, run(passed, ranks, ranks, momentum))
    for number, (output, grad, gradients, buffers) in enumerate(tree_map(torch.as_tensor, passed(0, 1, momentum))):
        parts = [results[number] for results in together]
        close = {"rtol": 1e-9, "atol": 1e-9}
        torch.testing.assert_close(torch.cat([part[0] for part in parts]), output, **close)
        torch.testing.assert_close(torch.cat([part[1] for part in parts]), grad, **close)
        for index, gradient in enumerate(gradients):
            torch.testing.assert_close(sum(part[2][index] for part in parts), gradient, **close)
        for part in parts:
            assert all(torch.equal(part[3][name], parts[0][3][name]) for name in buffers)
            torch.testing.assert_close(part[3], buffers, **close)


def alone(rank):
    """Statistics of a rank's own, by either way to ask for them."""
    own = [dist.new_group([other]) for other in range(2)][rank]
    x = draw(SHAPE, seed=rank)
    outputs = []
    for options in ({"synchronize": False}, {"process_group": own}):
        outputs.append(make("iter_norm", x, **options)(x).tolist())
    return [*outputs, make("iter_norm", x)(x).tolist()]


def test_statistics_of_a_rank_or_a_group_alone():
    for rank, (unsynchronized, grouped, together) in enumerate(run(alone, 2)):
        x = draw(SHAPE, seed=rank)
        expected = make("iter_norm", x)(x).tolist()
        assert unsynchronized == grouped == expected != together


def twice(rank):
    x = draw(SHAPE, seed=rank).requires_grad_()
    messages = []
    for options in ({}, {"synchronize": False}):
        (gradient,) = torch.autograd.grad(make("iter_norm", x, **options)(x).sin().sum(), x, create_graph=True)
        try:
            gradient.square().sum().backward()
            messages.append("")
        except RuntimeError as error:
            messages.append(str(error))
    return messages


def test_a_second_derivative_needs_statistics_of_one_process():
    for together, alone in run(twice, 2):
        assert "differentiate twice" in together and not alone


def under_ddp(rank):
    torch.manual_seed(rank)
    model = nn.Sequential(nn.Linear(CHANNELS, 6), *(kinds[0](6) for kinds in KINDS.values()), nn.BatchNorm1d(6))
    for layer in model[1:4]:
        layer.running_mean += rank  # what one rank alone has read from a checkpoint
    model[3].step_size += rank
    wrapped = DistributedDataParallel(model)
    first = [float(layer.running_mean[0]) for layer in model[1:4]]
    wrapped(draw((8, CHANNELS), rank, torch.float32)).square().sum().backward()
    return first, len(wrapped.modules_buffers), [b.sum().item() for layer in model[1:4] for b in layer.buffers()]


def in_groups_of_the_wrapper(rank):
    own = [dist.new_group([other]) for other in range(2)][rank]
    x = draw((8, CHANNELS), rank, torch.float32)
    torch.manual_seed(0)
    apart = DistributedDataParallel(nn.Sequential(nn.Linear(CHANNELS, 6), KINDS["swbn"][0](6)), process_group=own)
    apart(x).sum().backward()
    layer = KINDS["iter_norm"][0](CHANNELS, process_group=own, momentum=None)
    copied = copy.deepcopy(DistributedDataParallel(layer).module)
    copied(x)
    return apart.module[1].running_mean.tolist(), copied.running_mean.tolist()


def test_the_processes_are_the_wrappers_or_those_that_were_given():
    results = run(in_groups_of_the_wrapper, 2)
    for rank, (_, mean) in enumerate(results):
        assert mean == pytest.approx(draw((8, CHANNELS), rank, torch.float32).mean(0).tolist(), rel=1e-5)
    assert results[0][0] != results[1][0]


def test_ddp_sends_their_state_once_and_keeps_their_buffers_to_themselves():
    (first, sent, state), (first_other, sent_other, other) = run(under_ddp, 2)
    assert first == first_other == [0.0] * 3
    assert sent == sent_other == 3  # those of the plain batch normalization
    assert state == other
