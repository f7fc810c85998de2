"""Who refreshes what, when: nothing is sent in other steps, no rank waits for ever, and a disagreement is an error."""

import os
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from whiten_layers import WhitenedLinear, convert_batchnorm, unwhiten, whiten
from whiten_layers.inverse import METHODS
from whiten_layers.refresh import collectives
from whiten_layers.refresh.schedule import is_due, last_due
from whiten_layers.refresh.update import cost
from whiten_layers.statistics.whitening_factor import WhiteningFactor

from .runs import digest, network, parallel, train
from .world import needs_fsdp2, outcomes, run

DUE = last_due(19, 10)  # the first batch from the tenth on in which a refresh is due


class Branches(nn.Module):
    """A trunk and two branches, one of which a rank may leave out."""

    def __init__(self):
        super().__init__()
        self.trunk, self.left, self.right = nn.Linear(4, 4), nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x, takes_left):
        x = self.trunk(x).tanh()
        return self.left(x) + self.right(x) if takes_left else self.right(x)


def skipping(rank, whole):
    torch.manual_seed(0)
    model = whiten(Branches())
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    for step in range(45):
        # The first rank leaves the branch out in most steps in which a refresh is due, and all do so for a while.
        takes_left = (step % 5 != 4 if rank == 0 else True) and not 20 < step < 35
        if whole:
            takes_left = rank == 1
        wrapped(torch.randn(5, 4), takes_left).square().sum().backward()
    counts = [int(layer.transform.inputs.num_refreshes) for layer in (model.trunk, model.left, model.right)]
    return counts, digest(nn.ModuleList([model]))


@pytest.mark.parametrize("whole", [False, True], ids=["at times", "always"])
def test_a_layer_that_one_rank_skips(whole):
    (counts, state), *others = run(skipping, 2, whole)
    due = sum(is_due(batch, 10) for batch in range(1, 46))
    assert counts[0] == counts[2] == due and 5 <= counts[1] <= due
    assert others == [(counts, state)]


def disagreeing(rank):
    torch.manual_seed(0)
    trunk, branch = WhitenedLinear(4, 4), WhitenedLinear(4, 3)
    x = trunk(torch.randn(5, 4))
    (branch(x) if rank == 0 else x).sum().backward()  # each on a schedule of its own


def test_ranks_that_disagree_get_an_error_that_names_the_layers():
    for end in outcomes(disagreeing, 2):
        assert end.status == 1
        assert "the ranks are to refresh different things, beside 2 that all have in common: " in end.error
        assert "rank 0: a FeatureWhitening without a name (4 features, eigh) at batch 1, " in end.error
        assert "; rank 1: nothing" in end.error


def absent(rank, way):
    model = whiten(Branches(), include="left")
    wrapped = DistributedDataParallel(model, find_unused_parameters=True) if way == "goes on" else model
    for step in range(DUE if rank == 0 or way == "goes on" else DUE - 1):
        wrapped(torch.randn(5, 4), rank == 0 or step != DUE - 1).sum().backward()
    if rank == 1 and way == "goes on":
        wrapped(torch.randn(5, 4), True).sum().backward()
    if rank == 1 and way == "ends":
        os._exit(0)


@pytest.mark.parametrize("way", ["ends", "waits", "goes on"])
def test_a_rank_that_does_not_come_is_an_error_within_the_groups_timeout(way):
    """In a batch in which a refresh is due, the second rank reaches no whitened layer, or has stopped."""
    first, _ = outcomes(absent, 2, way, patience=1, timeout=25)
    assert first.status == 1
    assert f"rank 0 is to refresh left (4 features, eigh) at batch {DUE}, " in first.error
    assert ", and another rank has not come" in first.error


def differently_whitened(rank):
    DistributedDataParallel(whiten(Branches(), skip="left" if rank else None))


def test_ranks_that_whiten_different_layers_are_told_when_ddp_takes_the_model():
    for end in outcomes(differently_whitened, 2):
        assert end.status == 1
        assert "the ranks are to take on different things, beside 2 that all have in common: rank 0: left." in end.error


def uneven(rank, kind, whitened_first):
    model = Branches()
    model = convert_batchnorm(nn.Sequential(model, nn.BatchNorm1d(3)), "iter_norm") if kind == "norms" else model
    if kind == "layers" and whitened_first:
        whiten(model)
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    if kind == "layers" and not whitened_first:
        whiten(model)
    if kind == "plain again":
        unwhiten(whiten(model))
    with wrapped.join():
        wrapped.eval()
        if kind != "norms":
            wrapped(torch.randn(5, 4), True)  # evaluation needs no other process
        wrapped.train()
        for _ in range(2 + rank):
            wrapped(torch.randn(5, 4), True).square().sum().backward()


@pytest.mark.parametrize(
    ("kind", "whitened_first"), [("layers", True), ("layers", False), ("norms", True)], ids=["before", "after", "norms"]
)
def test_training_with_uneven_inputs_is_refused(kind, whitened_first):
    for end in outcomes(uneven, 2, kind, whitened_first):
        assert end.status == 1 and "DistributedDataParallel.join() cannot train whitened layers" in end.error


def tensor_parallel(rank):
    mesh = dist.init_device_mesh("cpu", (2,))
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    model = whiten(parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()}))
    with torch.no_grad():
        model(torch.randn(3, 4))
    with pytest.raises(TypeError, match=r"^0 cannot train with tensor parallelism"):
        model(torch.randn(3, 4))
    model.requires_grad_(False)(torch.randn(3, 4))
    return True


def test_layers_of_tensor_parallelism_train_with_an_error_that_says_so():
    assert run(tensor_parallel, 2) == [True, True]


@pytest.mark.parametrize("kind", ["plain", "plain again"])
def test_plain_networks_train_with_uneven_inputs(kind):
    assert all(end.status == 0 for end in outcomes(uneven, 2, kind, False))


def counting(rank, kind, transform):
    """What is sent in each step beside DDP's gradients and FSDP2's parameters and gradients."""
    sent = []

    def counted(name):
        call = getattr(dist, name)

        def wrapped(*arguments, **options):
            sent.append(name)
            return call(*arguments, **options)

        return wrapped

    for name in ("all_reduce", "broadcast", "all_gather_object", "all_gather", "new_group"):
        setattr(dist, name, counted(name))
    model = parallel(network(transform), kind)
    steps = []
    for step in range(25):
        sent.clear()
        train(model, range(step, step + 1))
        steps.append(list(sent))
    return steps


@pytest.mark.parametrize("kind", ["DDP", pytest.param("FSDP2", marks=needs_fsdp2)])
def test_nothing_is_sent_but_when_a_refresh_is_due(kind):
    for steps in run(counting, 2, kind, "default"):
        assert [number for number, sent in enumerate(steps, 1) if sent] == [1, 2, 4, 8, DUE]
        # Who is there and what is wanted; means and triangles; an outcome from each.
        assert steps[DUE - 1] == ["all_reduce"] * 4 + ["broadcast"] * 2


def test_transforms_without_statistics_send_nothing_at_their_own_interval():
    for steps in run(counting, 2, "DDP", "rarely, then scaled"):
        assert [number for number, sent in enumerate(steps, 1) if sent] == [1, 2, 4, 8, 16]


def sharing(rank):
    """Multiplications of this rank's inverses, and of all that were due."""
    done = 0
    for name, method in METHODS.items():

        def counted(covariance, *rest, method=method):
            nonlocal done
            done += len(covariance) * covariance.shape[1] ** 3
            return method.inverse(covariance, *rest)

        METHODS[name] = method._replace(inverse=counted)
    torch.manual_seed(0)
    sizes = [24, 24, 24, 24, 16, 16, 16, 16, 8, 8, 8, 8, 8]
    model = whiten(nn.ModuleList([nn.Linear(size, 2) for size in sizes]))
    sum(layer(torch.randn(30, layer.in_features)).sum() for layer in model).backward()
    return done, sum(size**3 for size in sizes), digest(nn.ModuleList([model]))


def test_each_of_four_ranks_does_a_quarter_of_the_work():
    results = run(sharing, 4)
    total = results[0][1]
    assert sum(done for done, _, _ in results) == total
    assert all(0.8 <= done / (total / 4) <= 1.2 for done, _, _ in results)
    assert len({state for *_, state in results}) == 1


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_a_quarter_of_the_work_of_a_resnet(name):
    import torchvision

    with torch.device("meta"):
        model = whiten(getattr(torchvision.models, name)())
    costs = [cost(factor) for factor in model.modules() if isinstance(factor, WhiteningFactor)]
    owners = collectives.share(costs, 4)
    loads = [sum(c for c, owner in zip(costs, owners, strict=True) if owner == rank) for rank in range(4)]
    assert max(loads) <= 1.2 * sum(costs) / 4 and min(loads) >= 0.8 * sum(costs) / 4


def groups_beside(rank):
    timeouts = []
    for group in (dist.group.WORLD, dist.new_group([0, 1], timedelta(seconds=7))):
        collectives.check_ranks_agree("see", ["one"], [rank == 1], group)
        control = collectives._control_groups[group]
        assert control is not group and collectives._control_group(group) is control
        timeouts.append(control._get_backend(torch.device("cpu")).options._timeout.total_seconds())
    return timeouts


def test_what_is_agreed_upon_never_meets_another_message():
    """In a group of its own, on the CPU also where the other knows only GPUs, with the other's timeout."""
    assert run(groups_beside, 2) == [[30, 7]] * 2


def wrapped_again(rank, folder):
    model = network()
    train(DistributedDataParallel(model), range(3))
    dist.destroy_process_group()
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    train(DistributedDataParallel(model), range(3, 25))
    return digest(model)


def test_the_last_wrapper_decides_about_the_group(tmp_path):
    first, second = run(wrapped_again, 2, str(tmp_path))
    assert first == second


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 8])
def test_a_triangle_is_a_symmetric_matrix(size):
    matrices = torch.randn(3, size, size, dtype=torch.float64)
    matrices = matrices + matrices.mT
    packed = collectives.triangle(matrices)
    assert packed.shape == (3, size * (size + 1) // 2)
    assert torch.equal(collectives.symmetric(packed), matrices)
