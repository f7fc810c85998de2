"""Effective rows and shrinkage: what few rows do not tell is spread evenly."""

import pytest
import torch
from sklearn.covariance import oas

from whiten_layers.statistics.covariance import FeatureCovariance, moments
from whiten_layers.statistics.whitening_factor import WhiteningFactor, shrinkage

from .. import reference


def spread(*size, seed=0):
    """Rows of a decaying spectrum."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.arange(1, size[-1] + 1, dtype=torch.float64) ** -0.7
    return torch.randn(*size, generator=generator, dtype=torch.float64) * scales


@pytest.mark.parametrize("rows", [2, 5, 30, 400])
@pytest.mark.parametrize("features", [2, 16, 60])
def test_the_weight_is_that_of_scikit_learn(rows, features):
    x = spread(rows, features)
    covariance = x.T.cov(correction=0)[None]
    _, expected = oas(x.numpy())
    weight = shrinkage(covariance, torch.tensor([float(rows)]).double(), features)
    torch.testing.assert_close(weight.item(), float(expected), rtol=1e-10, atol=1e-12)


def test_features_that_fill_up_a_block_do_not_count():
    x = torch.nn.functional.pad(spread(20, 5), (0, 3))
    weight = shrinkage(x.T.cov(correction=0)[None], torch.tensor([20.0]).double(), 5)
    torch.testing.assert_close(weight.item(), float(oas(x[:, :5].numpy())[1]), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("spectrum", ["white", "decaying"])
def test_independent_gaussian_rows_count_in_full(spectrum):
    counts = []
    for seed in range(200):
        x = spread(1, 200, 12, seed=seed)
        x = x / x.std(1, keepdim=True) if spectrum == "white" else x
        counts.append(moments(x).effective_rows.item())
    # Never more than there are; of one estimate the standard deviation is some 10 %.
    assert max(counts) <= 200 and sum(counts) / len(counts) > 180


@pytest.mark.parametrize("copies", [2, 9])
def test_rows_that_repeat_each_other_count_once(copies):
    x = spread(1, 100, 6)
    repeated = x.repeat_interleave(copies, 1)
    alone, together = moments(x), moments(repeated, samples=100)
    torch.testing.assert_close(together.effective_rows, alone.effective_rows, rtol=1e-9, atol=0)
    assert moments(repeated).effective_rows > 1.5 * alone.effective_rows  # taken for independent


def test_positions_that_are_independent_count_each():
    x = spread(1, 64 * 16, 10)
    assert moments(x, samples=64).effective_rows > 0.7 * 64 * 16


@pytest.mark.parametrize("rows, samples", [(1, 1), (7, 1), (2, 2)])
def test_one_sample_does_not_tell_how_samples_differ(rows, samples):
    count = moments(spread(1, rows, 4), samples=samples).effective_rows
    assert count == 1 if samples == 1 else 1 <= count <= 2


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_effective_rows_do_not_depend_on_the_scale(scale):
    x = spread(1, 50, 6).float()
    expected = moments(x).effective_rows
    torch.testing.assert_close(moments(scale * x).effective_rows, expected, rtol=1e-3, atol=0)


def test_variance_that_is_rounding_of_the_mean_is_none():
    rows = torch.full((1, 40, 3), 0.1) * torch.tensor([1.0, 1000.0, -3.0])
    assert not moments(rows).covariance.any()
    assert moments(rows + 1e-3 * torch.randn(1, 40, 3)).covariance.any()


def factor(features, **options):
    settings = {"method": "eigh", "power": 0.5, "damping": 0.03, "decay": 0.9, "rescale": True, "dtype": torch.float64}
    return WhiteningFactor(1, features, **(settings | options))


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("rows", [1, 2, 9, 100])
def test_an_estimate_keeps_the_trace_and_is_the_reference(center, rows):
    x = spread(rows, 6) + 0.3
    one = factor(6, center=center, shrink=True)
    one.observe_rows(x[None])
    one.close_window()
    covariance, variance = one.estimate()
    mean, expected = reference.moments(x)
    if expected.trace() == 0 and center:
        return  # one row has no variance
    counts = reference.effective_rows(reference.covariances_of_samples(x, rows), rows)
    truth = reference.shrunk(expected, mean, counts, not center)
    torch.testing.assert_close(covariance[0] * variance, truth, rtol=1e-9, atol=1e-12)
    whole = expected if center else expected + torch.outer(mean, mean)
    torch.testing.assert_close(truth.trace(), whole.trace())


def test_shrinking_brings_an_estimate_nearer_to_the_truth():
    truth = torch.eye(40, dtype=torch.float64) + torch.diag(torch.arange(1, 41, dtype=torch.float64) ** -1.4)
    errors = {True: [], False: []}
    for seed in range(20):
        for shrink in errors:
            one = factor(40, shrink=shrink)
            white = torch.randn(1, 30, 40, generator=torch.Generator().manual_seed(99 + seed), dtype=torch.float64)
            one.observe_rows(white + spread(1, 30, 40, seed=seed))
            one.close_window()
            covariance, variance = one.estimate()
            errors[shrink].append((covariance[0] * variance - truth).norm().item())
    assert sum(errors[True]) < 0.8 * sum(errors[False])


def test_pending_rows_are_in_the_window_whoever_asks_when():
    parts = [spread(1, n, 4, seed=n) for n in (3, 700, 1, 600, 5)]
    running, whole = (FeatureCovariance(1, 4, decay=0.9, dtype=torch.float64) for _ in range(2))
    for part in parts:
        running.observe_rows(part)
    rows = torch.cat(parts, 1)
    assert running.window.rows == rows.shape[1]
    whole.observe(moments(rows))
    torch.testing.assert_close(running.window[2:], whole.window[2:], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("flag", [True, False])
def test_a_bad_row_is_kept_out_whether_the_flag_is_known_or_a_tensor(flag):
    """On a GPU whether a batch is valid is known to the device alone: its rows are marked, and left out later."""
    running, clean = (FeatureCovariance(1, 4, decay=0.9) for _ in range(2))
    valid = torch.tensor(True) if flag else True
    for bad in (None, float("nan"), float("inf"), 1e30, None):
        rows = spread(1, 12, 4, seed=3).float()
        if bad is None:
            clean.observe_rows(rows)
        else:
            rows[0, 5, 2] = bad
        assert bool(running.observe_rows(rows, valid=valid)) == (bad is None)
    for one in (running, clean):
        one.close_window()
    torch.testing.assert_close(dict(running.state_dict()), dict(clean.state_dict()), rtol=1e-5, atol=1e-6)
