"""A factor: blocks, the scalar k, what a failed or approximate inverse leaves behind."""

import pytest
import torch

from whiten_layers import FeatureWhitening, WhitenedLinear
from whiten_layers.inverse import METHODS
from whiten_layers.refresh.update import refresh_factors
from whiten_layers.statistics.covariance import moments
from whiten_layers.statistics.whitening_factor import WhiteningFactor

from .. import reference

OPTIONS = {"method": "auto", "power": 1.0, "damping": 0.1, "decay": 0.9, "rescale": True, "dtype": torch.float64}


def filled(*shape, **options):
    """A factor that has seen a batch of correlated rows of unequal size."""
    factor = WhiteningFactor(*shape, **(OPTIONS | options))
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(factor.groups, 4 * factor.features, factor.features, generator=generator, dtype=torch.float64)
    rows = (rows + 0.5 * rows.cumsum(-1)) * torch.linspace(0.5, 2, factor.features)
    factor.observe(moments(factor.split(rows)))
    factor.close_window()
    return factor, rows


@pytest.mark.parametrize(
    "method, power",
    [
        ("cholesky", 1.0),
        ("eigh", 0.5),
        ("newton_schulz", 0.5),
        ("newton_schulz", 1.0),
        ("recursive", 1.0),
        ("recursive", 0.5),
    ],
)
@pytest.mark.parametrize("rescale, between", [(True, False), (True, True), (False, False)])
@pytest.mark.parametrize("groups, channels, taps, block_size", [(1, 7, 1, 3), (2, 5, 4, 2), (3, 6, 2, 3), (1, 4, 9, 1)])
def test_blocks_are_the_dense_block_diagonal_inverse(
    groups, channels, taps, block_size, method, power, rescale, between
):
    options = {"method": method, "power": power, "rescale": rescale, "block_size": block_size, "rank": 40}
    factor, rows = filled(groups, channels, taps, between=between, **options)
    refresh_factors([factor])
    for group in range(groups):
        _, covariance = reference.moments(rows[group])
        dense = reference.block_diagonal(covariance, block_size, taps)
        expected = reference.inverse_power(dense, power, 0.1, rescale, between)
        unit = torch.zeros(groups, channels * taps, channels * taps, dtype=torch.float64)
        unit[group] = torch.eye(channels * taps)
        torch.testing.assert_close(factor.multiply(unit)[group], expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(factor.current_mean(), rows.mean(1), rtol=1e-12, atol=1e-12)


def test_all_blocks_of_a_layer_are_inverted_in_one_call(monkeypatch):
    calls, method = [], METHODS["eigh"]
    counted = method._replace(inverse=lambda c, *rest: (calls.append(tuple(c.shape)), method.inverse(c, *rest))[1])
    monkeypatch.setitem(METHODS, "eigh", counted)
    layer = WhitenedLinear(10, 3, transform=FeatureWhitening(block_size=4))
    layer(torch.randn(20, 10)).sum().backward()
    assert calls == [(3, 4, 4)]


def test_features_that_fill_up_a_block_need_no_damping():
    factor, _ = filled(1, 5, block_size=2, damping=0.0)
    refresh_factors([factor])
    assert factor.num_refreshes == 1 and factor.precision.isfinite().all()


def test_a_block_that_cannot_be_inverted_leaves_its_group_alone_and_no_other():
    factor, _ = filled(2, 4, block_size=2, damping=0.0)
    factor.running_covariance[1] = 0
    refresh_factors([factor])
    assert factor.num_refreshes_failed == 1
    assert torch.equal(factor.precision[:2], torch.eye(2).double().expand(2, -1, -1))
    assert not torch.equal(factor.precision[2], torch.eye(2).double())


@pytest.mark.parametrize("block_size", [None, 24])
def test_an_approximate_inverse_that_is_not_rescaled_whitens_to_a_mean_variance_of_one(block_size):
    factor, rows = filled(1, 60, method="recursive", rank=2, rescale=False, block_size=block_size)
    refresh_factors([factor])
    _, covariance = reference.moments(rows[0])
    damped = reference.block_diagonal(covariance, block_size) + 0.1 * covariance.trace() / 60 * torch.eye(60)
    assert factor.multiply(damped[None])[0].trace().item() == pytest.approx(60)


def test_the_recursion_goes_on_from_its_last_result_and_a_broken_one_is_counted():
    factor, _ = filled(1, 60, method="recursive", rank=2)
    whitened = []
    for _ in range(4):
        refresh_factors([factor])
        values = torch.linalg.eigvals(factor.precision[0] @ factor.damped().matrix[0]).real
        whitened.append((values.max() / values.min()).item())
    assert whitened == sorted(whitened, reverse=True) and whitened[3] < whitened[0] / 2
    assert factor.num_refreshes_restarted == 0
    factor.precision.neg_()
    refresh_factors([factor])
    assert factor.num_refreshes == 5 and factor.num_refreshes_restarted == 1


def test_k_counts_no_feature_that_fills_up_a_block():
    factor, rows = filled(1, 51, method="recursive", rank=1, block_size=26)
    refresh_factors([factor])
    precision = factor.multiply(torch.eye(51).double()[None])[0]
    _, covariance = reference.moments(rows[0])
    covariance = reference.block_diagonal(covariance, 26)
    assert (precision @ covariance).trace().item() == pytest.approx(covariance.trace().item())


def test_a_group_in_which_nothing_varies_leaves_the_others_their_warm_start():
    together, _ = filled(2, 30, method="recursive", rank=2)
    alone, _ = filled(1, 30, method="recursive", rank=2)
    together.running_covariance[1] = 0
    alone.running_covariance.copy_(together.running_covariance[:1])
    for _ in range(4):
        refresh_factors([together])
        refresh_factors([alone])
    torch.testing.assert_close(together.precision[:1], alone.precision, rtol=1e-9, atol=1e-9)
    assert torch.equal(together.precision[1], torch.eye(30).double())
    assert together.num_refreshes_failed == 4 and together.num_refreshes_restarted == 0


def test_a_covariance_that_jumped_restarts_newton_schulz_and_is_counted():
    factor, _ = filled(1, 12, method="newton_schulz")
    refresh_factors([factor])
    refresh_factors([factor])
    assert factor.num_refreshes_restarted == 0
    factor.running_covariance[0, 0, 0] *= 1e3
    refresh_factors([factor])
    assert factor.num_refreshes_restarted == 1
    expected = reference.inverse_power(factor.running_covariance[0], 1.0, 0.1, rescale=True)
    torch.testing.assert_close(factor.precision[0], expected, rtol=1e-9, atol=1e-9)


def test_the_recursion_keeps_up_with_a_wide_layer_that_drifts():
    torch.manual_seed(0)
    factor = WhiteningFactor(1, 200, **(OPTIONS | {"method": "recursive", "damping": 0.03, "dtype": torch.float32}))
    mix, turn = torch.randn(200, 200) / torch.arange(1, 201), torch.linalg.qr(torch.randn(200, 200)).Q
    conditions = []
    for _ in range(200):
        mix = mix @ torch.linalg.matrix_exp(0.002 * (turn - turn.mT))
        rows = torch.randn(1, 400, 200) @ mix
        factor.observe(moments(rows))
        factor.close_window()
        refresh_factors([factor])
        conditions.append(reference.condition(factor.precision[0], factor.damped().matrix[0]))
    plain = reference.condition(torch.eye(200), factor.damped().matrix[0])
    # Rank 16 of 200: within a tenth of what it would be, throughout.
    assert plain > 300 and all(value < plain / 10 for value in conditions[5:])
    assert factor.num_refreshes_failed == 0 and factor.num_refreshes_restarted == 0
