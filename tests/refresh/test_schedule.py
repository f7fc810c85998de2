"""Which backward pass it is: what counts as one, who counts together, what is due."""

import copy
import itertools
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from whiten_layers import FeatureWhitening, GradientTransform, WhitenedLinear, whiten
from whiten_layers.refresh.schedule import (
    is_due,
    last_due,
    last_observed,
    last_refresh,
    observation_interval,
    refresh_interval,
)
from whiten_layers.refresh.update import cost
from whiten_layers.statistics.whitening_factor import WhiteningFactor


def test_what_is_due_comes_early_and_then_at_the_interval():
    assert [batch for batch in range(1, 10) if is_due(batch, 10)] == [1, 2, 4, 8]
    assert [batch for batch in range(1, 8) if is_due(batch, 1)] == [1, 2, 3, 4, 5, 6, 7]
    for interval in (1, 3, 10, 64, 1000):
        due = [batch for batch in range(1, 5000) if is_due(batch, interval)]
        assert due[0] == 1 and max(b - a for a, b in itertools.pairwise(due)) < 2 * interval
        stretches = [batch // interval for batch in due if batch >= interval]  # one in each; the last may be cut off
        assert stretches == list(range(1, 1 + len(stretches))) and len(stretches) >= 4999 // interval - 1
        assert [last_due(batch, interval) for batch in range(5000)] == [
            max([d for d in due if d <= batch], default=0) for batch in range(5000)
        ]


def test_refreshes_become_rarer_in_a_long_training():
    often = [batch for batch in range(1, 5000) if is_due(batch, 10)]
    turns = [[batch for batch in range(1, 5000) if last_refresh(batch, "auto", turn) == batch] for turn in range(4)]
    for turn, due in enumerate(turns):
        assert [batch for batch in due if batch < 500] == [batch for batch in often if batch < 500]
        for start, end, interval in ((500, 1000, 20), (1000, 5000, 40)):
            assert sum(start <= batch < end for batch in due) == (end - start) // interval
            assert refresh_interval(start, "auto") == refresh_interval(end - 1, "auto") == interval
        assert max(b - a for a, b in itertools.pairwise(due)) < 50
        assert [last_refresh(batch, "auto", turn) for batch in range(5000)] == [
            max([d for d in due if d <= batch], default=0) for batch in range(5000)
        ]
    late = [batch for due in turns for batch in due if batch >= 1000]
    assert sorted(late) == [batch for batch in often if batch >= 1000]
    assert [last_refresh(batch, 10, 3) for batch in range(5000)] == [last_due(batch, 10) for batch in range(5000)]


def test_inverses_take_turns_once_they_are_rare(monkeypatch):
    """No step refreshes much more than its part, so that none is much slower than the others."""
    sizes = (64, 32, 32, 64, 32, 64, 32, 64, 16)
    model = whiten(nn.ModuleList([nn.Linear(size, 2) for size in sizes]))
    factors = [layer.transform.inputs for layer in model]
    model[0].transform.schedule.batch = 2000
    copied = copy.deepcopy(model)
    committed, seen = [], []
    monkeypatch.setattr(WhiteningFactor, "commit", lambda self, result: committed.append(self))
    for both in (model, copied):
        batches = []
        for _ in range(2001, 2041):
            committed.clear()
            sum(layer(torch.randn(8, layer.in_features)).sum() for layer in both).backward()
            batches.append(list(committed))
        places = {layer.transform.inputs: place for place, layer in enumerate(both)}
        seen.append([[places[factor] for factor in batch] for batch in batches])
    assert seen[0] == seen[1]
    assert sorted(place for batch in seen[0] for place in batch) == list(range(len(sizes)))
    costs = list(map(cost, factors))
    assert max(sum(costs[place] for place in batch) for batch in seen[0]) <= sum(costs) / 4 + max(costs)


def test_fewer_batches_are_observed_in_a_long_training():
    due = [batch for batch in range(1, 5000) if last_observed(batch, "auto") == batch]
    assert due[:500] == list(range(1, 501))
    for start, end, interval in ((500, 1000, 2), (1000, 5000, 4)):
        assert sum(start <= batch < end for batch in due) == (end - start) // interval
        assert observation_interval(start, "auto") == observation_interval(end - 1, "auto") == interval
    assert [last_observed(batch, "auto") for batch in range(5000)] == [
        max([d for d in due if d <= batch], default=0) for batch in range(5000)
    ]
    assert [last_observed(batch, 3) for batch in range(5000)] == [last_due(batch, 3) for batch in range(5000)]


def test_norms_are_measured_and_renewed_as_often_as_ever(monkeypatch):
    """Gradients that become longer and stay so, as of a scaled loss, are held back only until the limit follows."""
    layer = whiten(nn.Sequential(nn.Linear(3, 2)))[0]
    layer.transform.schedule.batch = 2000
    now, seen = [2000], {"inputs": [], "norms": []}
    for name, method in (("inputs", "observe_rows"), ("norms", "observe_gradient")):
        child, batches = getattr(layer.transform, name), seen[name]
        original = getattr(child, method)
        monkeypatch.setattr(child, method, lambda *a, o=original, b=batches: (b.append(now[0]), o(*a))[1])
    inverses, limits, batches = [], [], range(2001, 2121)
    for now[0] in batches:
        before = layer.transform.inputs.num_refreshes.clone(), layer.transform.norms.limit.clone()
        layer(torch.randn(5, 3)).square().sum().backward()
        if layer.transform.inputs.num_refreshes != before[0]:
            inverses.append(now[0])
        if layer.transform.norms.limit != before[1]:
            limits.append(now[0])
    assert seen["norms"] == list(batches)
    assert seen["inputs"] == [batch for batch in batches if last_observed(batch, "auto") == batch]
    assert limits == [batch for batch in batches if is_due(batch, 10)] and len(limits) == 12
    assert inverses == [batch for batch in batches if last_refresh(batch, "auto") == batch] and len(inverses) == 3


@pytest.mark.parametrize("interval", [4, 5, 6, 9, 10, 12, 50])
@pytest.mark.parametrize("period", [2, 3, 4, 5])
def test_what_is_due_is_in_step_with_no_loop(interval, period):
    """A GAN's two passes, accumulation, tasks in turn: each phase of the loop is seen about as often."""
    due = [batch for batch in range(interval, interval * 2000) if is_due(batch, interval)]
    phases = torch.tensor([batch % period for batch in due]).bincount()
    assert len(phases) == period and phases.min() > 0.8 * len(due) / period  # five standard deviations and more


def test_every_call_in_a_pass_counts_once():
    layer = WhitenedLinear(3, 3)
    for batch in range(1, 4):
        layer(layer(torch.randn(5, 3))).sum().backward()
        assert layer.transform.num_batches_tracked == batch
    # Batch 1, both calls; batches 1 and 2; and 4 is still to come.
    assert layer.transform.inputs.num_refreshes == 2
    assert layer.transform.inputs.running_count == pytest.approx(10 * 0.99 + 10)


def test_layers_of_one_model_share_a_schedule_and_others_do_not():
    model = whiten(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)))
    alone = WhitenedLinear(2, 2)
    for _ in range(3):
        alone(model(torch.randn(5, 3))).sum().backward()
    model[0](torch.randn(5, 3)).sum().backward()
    assert model[0].transform.schedule is model[1].transform.schedule is not alone.transform.schedule
    assert (model[0].transform.schedule.batch, alone.transform.schedule.batch) == (4, 3)
    assert {transform.name for transform in model[0].transform.schedule.members()} == {"0", "1"}
    whiten(nn.Sequential(model, alone))
    assert alone.transform.schedule is model[0].transform.schedule and alone.transform.schedule.batch == 4


def test_a_copy_counts_with_its_own():
    model = whiten(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)))
    model(torch.randn(5, 3)).sum().backward()
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        schedule = clone[0].transform.schedule
        assert clone[0].transform.attendance.engine_pass is None  # a number of this process
        assert schedule is clone[1].transform.schedule is not model[0].transform.schedule
        assert set(schedule.members()) == {clone[0].transform, clone[1].transform}
        clone(torch.randn(5, 3)).sum().backward()
        assert schedule.batch == 2
    assert model[0].transform.schedule.batch == 1


def test_passes_within_a_pass_count_as_one_and_refresh_at_its_end():
    layers = [WhitenedLinear(4, 4) for _ in range(4)]
    model = whiten(nn.Sequential(*layers))
    for batch in range(1, 5):
        x = torch.randn(6, 4, requires_grad=True)
        for layer in layers[:3]:
            x = checkpoint(layer, x, use_reentrant=True)
        model[3](x).sum().backward()
        assert model[0].transform.schedule.batch == batch
    assert {layer.transform.num_batches_tracked for layer in layers} == {4}
    assert {layer.transform.inputs.num_refreshes.item() for layer in layers} == {3}


def test_a_pass_that_ends_in_an_error_does_not_stop_the_refreshes():
    layer = WhitenedLinear(3, 2, transform=FeatureWhitening(update_interval=1, statistics_interval=1))

    def fail():
        x = torch.randn(5, 3, requires_grad=True) * 1
        x.register_hook(lambda grad: 1 / 0)  # comes after the layer's own gradients
        with pytest.raises(ZeroDivisionError):
            layer(x).sum().backward()

    fail()
    assert layer.transform.inputs.num_refreshes == 0
    layer(torch.randn(5, 3)).sum().backward()
    assert layer.transform.inputs.num_refreshes == 1 and layer.transform.inputs.running_count == 10
    # Not even where a checkpoint has set the batch back to the one that failed.
    saved = copy.deepcopy(layer.state_dict())
    fail()
    layer.load_state_dict(saved)
    layer(torch.randn(5, 3)).sum().backward()
    assert layer.transform.inputs.num_refreshes == 2


@pytest.mark.parametrize("way", ["reset", "load"])
def test_a_layer_that_sets_the_number_back_does_not_stop_the_others(way):
    model = whiten(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)))
    saved = copy.deepcopy(model[1].state_dict())
    for _ in range(60):
        model(torch.randn(5, 3)).sum().backward()
    before = model[0].transform.inputs.num_refreshes.item()
    if way == "reset":
        model[1].reset_parameters()
    else:
        model[1].load_state_dict(saved)
    for _ in range(30):
        model(torch.randn(5, 3)).sum().backward()
    assert model[0].transform.schedule.batch == 30
    assert model[0].transform.inputs.num_refreshes == before + sum(is_due(batch, 10) for batch in range(1, 31))


def test_passes_within_a_pass_that_is_not_known_refresh_only_what_they_reach():
    options = {"method": "recursive", "power": 1.0, "rank": 2, "update_interval": 1, "statistics_interval": 1}
    model = whiten(nn.Sequential(*[nn.Linear(4, 4) for _ in range(3)]), FeatureWhitening(**options))
    for _ in range(4):
        x = torch.randn(6, 4, requires_grad=True)
        for layer in model:
            x = checkpoint(layer, x, use_reentrant=True)
        x.sum().backward()
    assert model[0].transform.schedule.batch == 4
    assert {layer.transform.inputs.num_refreshes.item() for layer in model} == {4}


class Doubled(GradientTransform):
    """The least that a transform of one's own is."""

    def bind(self, geometry, *, device, dtype):
        self.bind_counters(device)
        return self

    def transform(self, grad_weight, grad_bias, weight):
        return 2 * grad_weight, grad_bias

    def observe(self, input, grad_weight):
        self.schedule.begin_batch(self)

    def reset_state(self):
        self.reset_counters()


def test_a_transform_of_ones_own_stays_in_sync_with_the_others():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    plain = copy.deepcopy(model)
    whiten(whiten(model, Doubled(), include="0"), FeatureWhitening(power=0.0))
    for batch in range(1, 13):
        x = torch.randn(5, 3)
        for network in (model, plain):
            network.zero_grad()
            network(x).sum().backward()
        torch.testing.assert_close(model[0].weight.grad, 2 * plain[0].weight.grad)
        assert {layer.transform.num_batches_tracked for layer in model} == {batch}


def test_after_a_reset_a_layer_trains_as_a_new_one():
    torch.manual_seed(0)
    layer = WhitenedLinear(4, 3, transform=FeatureWhitening(update_interval=10, statistics_interval=3))
    new = copy.deepcopy(layer)

    def train(one, seeds):
        for seed in seeds:
            one.zero_grad()
            one(torch.randn(6, 4, generator=torch.Generator().manual_seed(seed))).square().sum().backward()

    train(layer, range(45))
    layer.transform.reset_state()
    train(layer, range(100, 133))
    train(new, range(100, 133))
    assert layer.transform.num_batches_tracked == 33
    torch.testing.assert_close(layer.state_dict(), new.state_dict(), rtol=0, atol=0)
    assert torch.equal(layer.weight.grad, new.weight.grad)
