"""The search for a learning rate and a weight decay."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.peers.search import FINALISTS, MOST, RADIUS, search


@given(optimum=st.floats(-8, 8), start=st.sampled_from([1e-3, 1.0]), ceiling=st.floats(0, 4))
def test_the_best_rate_has_others_on_each_side(optimum, start, ceiling):
    """Of a loss with one minimum, which diverges some way above it."""

    def measure(lr, decay):
        power = math.log2(lr / start)
        return {"loss": (power - optimum) ** 2 if power < optimum + ceiling + 1 else math.inf}

    found = search(measure, start, 0.1)
    best = math.log2(found.best("loss")[0] / start)
    assert found.is_inside and abs(best - optimum) <= 0.5 + 1e-9
    tried = {round(math.log2(rate / start)) for rate, _ in found.tried}
    assert {round(best) + place for place in range(-RADIUS, RADIUS + 1)} <= tried


def test_a_second_minimum_does_not_end_the_search():
    losses = {-4: 5.0, -2: 1.0, -1: 2.0, 0: 3.0, 1: 2.0, 2: 1.0, 3: 0.5, 4: 2.0}

    def measure(lr, decay):
        return {"loss": losses.get(round(math.log2(lr)), 9.0)}

    # From 0 on, rates twice apart would walk down to either side; those four times apart see both.
    assert search(measure, 1.0, 0.1).best("loss")[0] == 0.25
    losses[2] = 0.9
    assert search(measure, 1.0, 0.1).best("loss")[0] == 8.0


@pytest.mark.parametrize("loss", [lambda lr: lr, lambda lr: 1 / lr, lambda lr: math.inf])
def test_a_search_without_a_best_ends_with_the_best_that_was_tried(loss):
    found = search(lambda lr, decay: {"loss": loss(lr)}, 1.0, 0.0)
    assert not found.is_inside and len({rate for rate, _ in found.tried}) <= MOST
    assert loss(found.best("loss")[0]) == min(loss(rate) for rate, _ in found.tried)


@pytest.mark.parametrize(("optimum", "expected"), [(0.0, 0.0), (0.008, 0.01), (0.09, 0.1), (0.9, 1.0), (30.0, 10.0)])
def test_the_decay_is_at_no_upper_edge(optimum, expected):
    found = search(lambda lr, decay: {"loss": abs(math.log2(lr)) + abs(decay - optimum)}, 4.0, 0.1)
    tried = {decay for _, decay in found.tried}
    assert found.best("loss") == (1.0, pytest.approx(expected))
    assert max(tried) > expected and {0.0, 0.1} <= tried


def test_another_criterion_chooses_among_what_was_tried():
    found = search(lambda lr, decay: {"loss": abs(math.log2(lr)), "valid_loss": abs(math.log2(lr) + 2)}, 1.0, 0.1)
    assert found.best("loss")[0] == 1.0 and found.best("valid_loss")[0] == 0.25


def test_a_second_seed_decides_between_the_best():
    losses = {0.25: 3.0, 0.5: 1.1, 1.0: 1.0, 2.0: 0.9, 4.0: 3.0}
    found = search(lambda lr, decay: {"loss": losses.get(lr, 9.0) + decay}, 1.0, 0.1)
    seen = []

    def again(lr, decay):
        seen.append((lr, decay))
        return {"loss": math.inf if lr == 2 else 1.05}

    assert found.best("loss") == (2.0, 0.0) and found.confirmed("loss", again) == (1.0, 0.1)
    assert seen == [(2.0, 0.0), (1.0, 0.1), (0.5, 0.1)] and len(seen) == FINALISTS
