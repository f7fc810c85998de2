"""The search for a learning rate and a weight decay."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.peers.search import RADIUS, best_rate, best_setting


@given(optimum=st.floats(-6, 6), start=st.sampled_from([1e-3, 1.0]), ceiling=st.floats(0, 4))
def test_the_best_rate_has_others_on_each_side(optimum, start, ceiling):
    """Of a loss with one minimum, which diverges some way above it."""
    tried = []

    def measure(lr, decay):
        power = math.log2(lr / start)
        tried.append(round(power))
        return {"loss": (power - optimum) ** 2 if power < optimum + ceiling + 1 else math.inf}

    best = math.log2(best_rate(measure, start, 0.1, "loss") / start)
    assert abs(best - optimum) <= 0.5 + 1e-9
    assert {round(best) + place for place in range(-RADIUS, RADIUS + 1)} <= set(tried)
    assert len(tried) == len(set(tried))


@pytest.mark.parametrize("loss", [lambda lr: lr, lambda lr: 1 / lr, lambda lr: math.inf])
def test_a_search_without_a_best_ends(loss):
    with pytest.raises(ArithmeticError, match="no best among"):
        best_rate(lambda lr, decay: {"loss": loss(lr)}, 1.0, 0.0, "loss")


@pytest.mark.parametrize(("optimum", "expected"), [(0.0, 0.0), (0.008, 0.01), (0.09, 0.1), (0.9, 1.0), (30.0, 10.0)])
def test_the_decay_is_at_no_upper_edge(optimum, expected):
    tried = set()

    def measure(lr, decay):
        tried.add(decay)
        return {"test_loss": abs(math.log2(lr)) + abs(decay - optimum)}

    assert best_setting(measure, 4.0, 0.1, "test_loss") == (1.0, pytest.approx(expected))
    assert max(tried) > expected and {0.0, 0.1} <= tried
