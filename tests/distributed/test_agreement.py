"""Who refreshes what, when: nothing is sent in other steps, no rank waits for ever, and a disagreement is an error."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from whiten_layers import WhitenedLinear, distributed, refresh, whiten
from whiten_layers.factor import WhiteningFactor
from whiten_layers.inverse import METHODS

from .runs import digest, network, train
from .world import outcomes, run


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
    assert counts[0] == counts[2] == 8 and 5 <= counts[1] <= 8  # 1, 2, 4, 8, 10, 20, 30, 40
    assert others == [(counts, state)]


def disagreeing(rank):
    torch.manual_seed(0)
    trunk, branch = WhitenedLinear(4, 4), WhitenedLinear(4, 3)
    x = trunk(torch.randn(5, 4))
    (branch(x) if rank == 0 else x).sum().backward()  # on clocks of their own


def test_ranks_that_disagree_get_an_error_that_names_the_layers():
    for end in outcomes(disagreeing, 2):
        assert end.status == 1
        assert "the ranks are to refresh different things, beside 1 that all have in common: " in end.error
        assert "rank 0: a FeatureWhitening without a name (4 features, eigh) at batch 1; rank 1: nothing" in end.error


def absent(rank, way):
    model = whiten(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)))
    for _ in range(10 if rank == 0 else 9):
        model(torch.randn(5, 4)).sum().backward()
    if rank == 1 and way == "waits":
        dist.distributed_c10d._get_default_store().wait(["never"], timedelta(seconds=5))


@pytest.mark.parametrize("way", ["ends", "waits"])
def test_a_rank_that_does_not_come_is_an_error_within_the_groups_timeout(way):
    first, _ = outcomes(absent, 2, way, patience=1, timeout=25)
    assert first.status == 1
    named = "rank 0 is to refresh 0 (4 features, eigh) at batch 10, 1 (4 features, eigh) at batch 10, and another"
    assert named in first.error


def counting(rank):
    """How many messages a group that has nothing else to do has seen, after each step."""
    group = dist.new_group([0, 1])
    model = network(process_group=group)
    wrapped = DistributedDataParallel(model)
    seen = []
    for step in range(25):
        train(wrapped, range(step, step + 1))
        seen.append(group._get_sequence_number_for_group())
    return seen


def test_nothing_is_sent_but_when_a_refresh_is_due():
    for seen in run(counting, 2):
        steps = [step + 1 for step in range(25) if seen[step] != (seen[step - 1] if step else 0)]
        assert steps == [1, 2, 4, 8, 10, 20]
        # Who is there and what is wanted; means and triangles; an outcome from each.
        assert seen[0] == 2 + 2 + 2


def sharing(rank, world):
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
    results = run(sharing, 4, 4)
    total = results[0][1]
    assert sum(done for done, _, _ in results) == total
    assert all(0.8 <= done / (total / 4) <= 1.2 for done, _, _ in results)
    assert len({state for *_, state in results}) == 1


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_a_quarter_of_the_work_of_a_resnet(name):
    import torchvision

    with torch.device("meta"):
        model = whiten(getattr(torchvision.models, name)())
    costs = [refresh.cost(factor) for factor in model.modules() if isinstance(factor, WhiteningFactor)]
    owners = distributed.share(costs, 4)
    loads = [sum(c for c, owner in zip(costs, owners, strict=True) if owner == rank) for rank in range(4)]
    assert max(loads) <= 1.2 * sum(costs) / 4 and min(loads) >= 0.8 * sum(costs) / 4


def beside(rank):
    distributed._serves_cpu = lambda group: False  # as of a group that knows GPUs only
    model = network()
    train(DistributedDataParallel(model), range(5))
    (control,) = distributed._control_groups.values()
    assert control is not dist.group.WORLD
    return digest(model), control._get_backend(torch.device("cpu")).options._timeout.total_seconds()


def test_a_group_that_knows_only_gpus_agrees_through_one_beside_it():
    results = run(beside, 2)
    assert results[0] == results[1] and results[0][1] == 30


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_a_triangle_is_a_symmetric_matrix(size):
    matrices = torch.randn(3, size, size, dtype=torch.float64)
    matrices = matrices + matrices.mT
    packed = distributed.triangle(matrices)
    assert packed.shape == (3, size * (size + 1) // 2)
    assert torch.equal(distributed.symmetric(packed), matrices)
