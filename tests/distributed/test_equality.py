"""So many processes with a part of the batch each follow the one that has it whole."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from whiten_layers import FeatureWhitening, WhitenedConv2d, WhitenedLinear, whiten

from ..helpers import mostly_slow
from .runs import (
    ALIKE,
    CUTS,
    TRANSFORMS,
    batch,
    digest,
    distance,
    loss,
    network,
    optimizer,
    parallel,
    plain,
    train,
    weights,
)
from .world import needs_fsdp2, run

STEPS = 50


def follow(rank, kind, transform, options, steps=STEPS):
    model = network(transform)
    before = {name: buffer.data_ptr() for name, buffer in model.named_buffers()}
    trained = train(parallel(model, kind, **options), range(steps))
    # Neither sharded nor moved, nor copied.
    after = {name: buffer.data_ptr() for name, buffer in model.named_buffers() if name in before}
    assert after == before
    assert not any(isinstance(buffer, DTensor) for buffer in model.buffers())
    return weights(trained), digest(model)


@pytest.mark.parametrize(
    "kind, ranks, transform",
    [
        *mostly_slow(
            [("DDP", 2, transform) for transform, options in TRANSFORMS.items() if ALIKE.items() <= options.items()],
            [("DDP", 2, transform) for transform in ("alike", "both sides", "whitened, then scaled")],
        ),
        ("DDP", 4, "both sides"),
        pytest.param("FSDP2", 2, "both sides", marks=needs_fsdp2),
        pytest.param("FSDP2", 4, "alike", marks=needs_fsdp2),
        pytest.param("FSDP2", 2, "whitened, then scaled", marks=needs_fsdp2),
    ],
)
def test_ranks_follow_one_process(kind, ranks, transform):
    results = run(follow, ranks, kind, transform, {})
    expected = weights(train(network(transform), range(STEPS)))
    # Sums in another order: rounding alone, in float64.
    assert all(distance(result, expected) < 1e-9 for result, _ in results)
    assert len({state for _, state in results}) == 1  # to the last bit
    assert distance(expected, weights(network(transform))) > 0.1


@pytest.mark.parametrize("kind, ranks", [("DDP", 2), ("DDP", 4), pytest.param("FSDP2", 2, marks=needs_fsdp2)])
def test_ranks_scale_the_whole_gradient_as_one_process_does(kind, ranks):
    """Fewer steps, since eigenvectors of close values turn far by a little rounding."""
    results = run(follow, ranks, kind, "eigenbases", {}, 20)
    expected = weights(train(network("eigenbases"), range(20)))
    assert all(distance(result, expected) < 1e-9 for result, _ in results)
    assert len({state for _, state in results}) == 1
    assert distance(expected, weights(network("eigenbases"))) > 0.1


@pytest.mark.parametrize("kind, ranks", [("DDP", 2), ("DDP", 4), pytest.param("FSDP2", 2, marks=needs_fsdp2)])
def test_with_the_defaults_ranks_agree_and_stay_near_one_process(kind, ranks):
    """Each measures effective rows, components and norms of its own part, which tell less than the whole does."""
    results = run(follow, ranks, kind, "default", {})
    one = weights(train(network(), range(STEPS)))
    apart = distance(one, weights(train(plain(), range(STEPS))))
    assert len({state for _, state in results}) == 1  # to the last bit
    assert all(distance(result, one) < 0.5 * apart for result, _ in results)


@pytest.mark.parametrize("option", ["gradient_as_bucket_view", "static_graph", "find_unused_parameters"])
def test_options_of_ddp(option):
    results = run(follow, 2, "DDP", "alike", {option: True})
    expected = weights(train(network("alike"), range(STEPS)))
    assert all(distance(result, expected) < 1e-9 for result, _ in results)


def accumulate(rank, ranks):
    model = network("alike")
    wrapped = DistributedDataParallel(model) if ranks > 1 else model
    optimiser = optimizer(model)
    for step in range(0, STEPS, 2):
        optimiser.zero_grad()
        if ranks > 1:
            with wrapped.no_sync():
                loss(wrapped, *batch(step, CUTS[ranks], rank), ranks).backward()
        else:
            loss(wrapped, *batch(step)).backward()
        loss(wrapped, *batch(step + 1, CUTS[ranks], rank), ranks).backward()
        optimiser.step()
    return weights(model)


def test_accumulation_without_synchronisation():
    results = run(accumulate, 2, 2)
    assert all(distance(result, accumulate(0, 1)) < 1e-9 for result in results)


def by_hand(rank):
    convolution, linear = (FeatureWhitening(**ALIKE) for _ in range(2))
    layers = [WhitenedConv2d(3, 4, 3, transform=convolution), nn.Flatten(), WhitenedLinear(144, 5, transform=linear)]
    model = nn.Sequential(*layers).double()
    return weights(train(nn.Sequential(model) if rank is None else DistributedDataParallel(model), range(STEPS)))


def test_layers_made_by_hand():
    torch.manual_seed(0)
    expected = by_hand(None)
    assert all(distance(result, expected) < 1e-9 for result in run(by_hand, 2))


def attention(rank, kind):
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = whiten(nn.Sequential(nn.Flatten(1, 2), encoder, nn.Flatten(), nn.Linear(192, 5)).double(), **ALIKE)
    trained = train(model if rank is None else parallel(model, kind), range(20))
    assert model[1].self_attn.transform.num_batches_tracked == 20
    return weights(trained)


@pytest.mark.parametrize("kind", ["DDP", pytest.param("FSDP2", marks=needs_fsdp2)])
def test_attention_follows_one_process(kind):
    expected = attention(None, kind)
    assert all(distance(result, expected) < 1e-9 for result in run(attention, 2, kind))


def hybrid(rank, shared_by):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model = network("alike", process_group=None if shared_by == "all" else mesh.get_group("shard"))
    trained = train(parallel(model, "FSDP2", mesh=mesh), range(20))
    return weights(trained), digest(model)


@needs_fsdp2
@pytest.mark.parametrize("shared_by", ["all", "half"])
def test_hybrid_sharding(shared_by):
    results = run(hybrid, 4, shared_by)
    states = [state for _, state in results]
    if shared_by == "all":
        expected = weights(train(network("alike"), range(20)))
        assert all(distance(result, expected) < 1e-9 for result, _ in results)
        assert len(set(states)) == 1
    else:  # each half whitens by what it has seen, and all have the same weights
        assert states[0] == states[1] != states[2] == states[3]
        assert all(result == results[0][0] for result, _ in results)


def alone(rank):
    groups = [dist.new_group([0]), dist.new_group([1])]
    model = network(process_group=groups[rank])
    for step in range(10 * (rank + 1)):  # not even as many passes
        loss(model, *batch(step + 100 * rank)).backward()
    return digest(model)


def test_a_group_of_one_process_is_no_group():
    states = run(alone, 2)
    assert states[0] != states[1]
