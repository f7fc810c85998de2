"""The running covariance against all rows at once."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from whiten_layers.statistics.covariance import FeatureCovariance, merged, moments

from .. import reference


@pytest.mark.parametrize("center", [True, False])
def test_moments(center):
    rows = torch.randn(3, 11, 4, dtype=torch.float64) + 2
    number, _, mean, covariance = moments(rows, center)
    assert number.tolist() == [11, 11, 11]
    for group in range(3):
        expected = reference.moments(rows[group], center)
        torch.testing.assert_close((mean[group], covariance[group]), expected, rtol=1e-12, atol=1e-12)


@settings(deadline=None, max_examples=60)
@given(
    counts=st.lists(st.integers(1, 20), min_size=1, max_size=8),
    decay=st.sampled_from([0.0, 0.3, 0.95, 0.999]),
    features=st.integers(1, 6),
    offset=st.floats(-100, 100),
    seed=st.integers(0, 2**20),
)
def test_running_moments_are_the_weighted_moments_of_all_rows(counts, decay, features, offset, seed):
    generator = torch.Generator().manual_seed(seed)
    batches = [
        torch.randn(n, features, generator=generator, dtype=torch.float64) * (i + 1) + offset
        for i, n in enumerate(counts)
    ]
    running = FeatureCovariance(1, features, decay=decay, dtype=torch.float64)
    for batch in batches:
        assert running.observe(moments(batch[None]))
        running.close_window()
    mean, covariance = reference.weighted_moments(batches, decay)
    # The offset is squared in neither, so rounding is relative to it once.
    tolerance = {"rtol": 1e-10, "atol": 1e-10 * (1 + abs(offset))}
    torch.testing.assert_close(running.running_mean[0], mean, **tolerance)
    torch.testing.assert_close(running.running_covariance[0], covariance, **tolerance)


def test_batches_that_were_not_looked_at_age_the_past():
    batches = [torch.randn(7, 3, dtype=torch.float64) for _ in range(3)]
    running = FeatureCovariance(1, 3, decay=0.8, dtype=torch.float64)
    for batch, elapsed in zip(batches, (1, 4, 2), strict=True):
        running.observe(moments(batch[None]))
        running.close_window(elapsed)
    weights = torch.tensor([0.8**6, 0.8**2, 1.0], dtype=torch.float64).repeat_interleave(7)
    expected = torch.cat(batches).T.cov(correction=0, aweights=weights)
    torch.testing.assert_close(running.running_covariance[0], expected, rtol=1e-10, atol=1e-10)


def test_float32_statistics_survive_a_mean_far_from_zero():
    rows = torch.randn(1, 4000, 3, generator=torch.Generator().manual_seed(0)) + 1000
    running = FeatureCovariance(1, 3, decay=0.9)
    for part in rows.split(500, dim=1):
        running.observe(moments(part))
        running.close_window()
    # Rounding of a value of 1000 is 6e-5; squared about zero it would be 0.06.
    torch.testing.assert_close(running.running_covariance[0], torch.eye(3), rtol=0, atol=0.1)


def test_half_precision_rows_are_summed_in_float32():
    rows = torch.full((1, 100_000, 2), 1.001).to(torch.bfloat16) + torch.randn(1, 100_000, 2).to(torch.bfloat16)
    _, _, mean, covariance = moments(rows)
    assert mean.dtype == covariance.dtype == torch.float32
    expected = rows[0].double()
    torch.testing.assert_close(mean[0].double(), expected.mean(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(covariance[0].double(), expected.T.cov(correction=0), rtol=1e-4, atol=1e-4)


@settings(deadline=None, max_examples=60)
@given(
    counts=st.lists(st.integers(0, 9), min_size=1, max_size=6),
    offset=st.floats(-100, 100),
    center=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_a_window_is_all_of_its_rows_at_once_however_they_came(counts, offset, center, seed):
    generator = torch.Generator().manual_seed(seed)
    batches = [torch.randn(1, n, 3, generator=generator, dtype=torch.float64) + offset for n in counts if n]
    running = FeatureCovariance(1, 3, decay=0.5, dtype=torch.float64)
    for batch in batches:
        running.observe(moments(batch, center))
    if not batches:
        assert running.window is None
        return
    tolerance = {"rtol": 1e-10, "atol": 1e-10 * (1 + abs(offset))}
    everything = moments(torch.cat(batches, 1), center)
    # Effective rows are counted batch by batch: how batches differ tells no more about one of them.
    assert running.window.effective_rows == sum(moments(batch, center).effective_rows for batch in batches)
    everything = everything._replace(effective_rows=running.window.effective_rows)
    torch.testing.assert_close(running.window, everything, **tolerance)
    nothing = type(everything)(*map(torch.zeros_like, everything))
    torch.testing.assert_close(merged(everything, nothing), everything, rtol=0, atol=0)
    torch.testing.assert_close(merged(nothing, everything), everything, **tolerance)


def test_a_group_of_which_nothing_came_does_not_age():
    running = FeatureCovariance(2, 3, decay=0.5)
    running.observe(moments(torch.randn(2, 8, 3)))
    running.close_window()
    before = running.running_covariance.clone()
    running.observe(moments(torch.randn(2, 8, 3)), torch.tensor([True, False]))
    running.close_window(elapsed=3)
    assert running.running_count.tolist() == [8 / 8 + 8, 8]
    assert torch.equal(running.running_covariance[1], before[1])
    assert not torch.equal(running.running_covariance[0], before[0])


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e25])
def test_what_is_not_finite_leaves_no_mark(bad, first):
    running = FeatureCovariance(2, 3, decay=0.9)
    if not first:
        running.observe(moments(torch.randn(2, 8, 3)))
        running.close_window()
    before = {name: value.clone() for name, value in running.state_dict().items()}
    rows = torch.randn(2, 8, 3)
    rows[1, 4, 2] = bad
    assert not running.observe(moments(rows))
    assert not running.observe(moments(torch.full((2, 8, 3), 1e25)))  # no variance, and a mean too far away
    assert not running.observe(moments(torch.randn(2, 8, 3)), valid=torch.tensor(False))
    running.close_window()
    torch.testing.assert_close(before, dict(running.state_dict()), rtol=0, atol=0)


def test_a_checkpoint_has_no_window_and_loading_one_forgets_it():
    running, other = (FeatureCovariance(1, 3, decay=0.9) for _ in range(2))
    running.observe(moments(torch.randn(1, 8, 3)))
    running.close_window()
    saved = {name: value.clone() for name, value in running.state_dict().items()}
    running.observe(moments(torch.randn(1, 8, 3)))
    assert running.state_dict().keys() == other.state_dict().keys() == saved.keys()
    for each in (running, other):
        each.load_state_dict(saved)
        assert each.window is None
        torch.testing.assert_close(dict(each.state_dict()), saved, rtol=0, atol=0)


def test_an_open_window_is_none_of_the_buffers_but_moves_with_them():
    running = FeatureCovariance(1, 3, decay=0.9)
    names = [name for name, _ in running.named_buffers()]
    rows = torch.randn(1, 8, 3)
    running.observe(moments(rows))
    running.observe_rows(rows)
    assert [name for name, _ in running.named_buffers()] == names
    copied = copy.deepcopy(running).double()
    assert copied.window.mean.dtype == torch.float64 and copied.window.rows == 16
    torch.testing.assert_close(copied.window.covariance.float(), running.window.covariance)
    assert copied.half().window.mean.dtype == copied.running_mean.dtype == torch.float32
    copied.observe_rows(rows)
    copied.to("meta")
    assert all(part.is_meta for part in copied.open_window().values()) and len(copied.open_window()) == 5
    assert copied.to_empty(device="cpu").window is None


def test_a_closed_window_changes_the_average_in_place():
    running = FeatureCovariance(1, 3, decay=0.9)
    pointers = {name: value.data_ptr() for name, value in running.named_buffers()}
    running.observe(moments(torch.randn(1, 8, 3)))
    running.close_window()
    assert pointers == {name: value.data_ptr() for name, value in running.named_buffers()}
