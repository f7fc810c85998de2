"""The recursion: the condition number falls and never rises, P stays positive definite, in float32 too."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from whiten_layers.inverse import recursive
from whiten_layers.refresh.update import refresh_factors
from whiten_layers.statistics.covariance import moments
from whiten_layers.statistics.whitening_factor import WhiteningFactor

from .. import reference
from ..reference import condition, with_spectrum

spectra = st.tuples(
    st.integers(2, 48), st.floats(0, 6), st.sampled_from(["even", "random", "one large", "one small", "two clusters"])
)


def draw_spectrum(size: int, exponent: float, kind: str, seed: int) -> torch.Tensor:
    place = {
        "even": torch.linspace(0, 1, size),
        "random": torch.rand(size, generator=torch.Generator().manual_seed(seed)),
        "one large": torch.ones(size).index_fill(0, torch.tensor([0]), 0.0),
        "one small": torch.zeros(size).index_fill(0, torch.tensor([0]), 1.0),
        "two clusters": (torch.arange(size) % 2).float(),
    }[kind]
    return 10 ** (-exponent * place.double())


@settings(deadline=None, max_examples=300)
@given(spectrum=spectra, rank=st.integers(1, 32), seed=st.integers(0, 2**20))
def test_the_condition_number_never_rises(spectrum, rank, seed):
    covariance = with_spectrum(draw_spectrum(*spectrum, seed), seed)
    before, last = condition(torch.eye(len(covariance)), covariance), None
    rounding = torch.finfo(torch.float64).eps * before  # of P, whose entries span as much as C's eigenvalues
    for _ in range(8):
        last = recursive(covariance[None], 1.0, last, rank)
        after = condition(last.matrix[0], covariance)
        # It changes every eigenvalue of the whitened matrix by as much, also the smallest, of 1 / before; 1e-7 is for
        # the hundreds of sums where that is less. Seen: 1.4e-6 where both condition numbers were 5.5e5.
        assert after <= before * (1 + 1e-7 + rounding * before)
        assert not last.restarted
        before = after


@settings(deadline=None, max_examples=300)
@given(spectrum=spectra, rank=st.integers(1, 32), seed=st.integers(0, 2**20))
def test_in_float32_it_never_diverges(spectrum, rank, seed):
    """At 1e6 float32 no longer tells a matrix from an indefinite one: P may be far from it, or NaN, no more."""
    covariance = with_spectrum(draw_spectrum(*spectrum, seed), seed)
    smallest = torch.linalg.eigvalsh(covariance)[0].item()
    start, last = condition(torch.eye(len(covariance)), covariance), None
    for _ in range(20):
        last = recursive(covariance[None].float(), 1.0, last, rank)
        if start < 1e5:
            assert last.matrix.isfinite().all() and not last.restarted
            # Rounding of 6e-8 of the largest number, for the smallest times the condition number, in 40 steps of sums.
            rounding = 40 * 6e-8 * start * len(covariance) ** 0.5
            assert condition(last.matrix[0], covariance) <= start * (1 + 1e-2 + rounding)
        elif last.matrix.isfinite().all():  # on the way P was seen to be up to 1e3 times too large
            assert torch.linalg.matrix_norm(last.matrix[0], 2) <= 1e4 / smallest


def test_the_speed_on_a_harmonic_spectrum():
    """From a condition number of 576 to 60 at one refresh, and to 15 at five."""
    covariance, last, conditions = with_spectrum(1 / torch.arange(1, 577)), None, []
    for _ in range(5):
        last = recursive(covariance[None], 1.0, last, 16)
        conditions.append(condition(last.matrix[0], covariance))
    assert conditions[0] <= 60 and conditions[4] <= 15


def test_the_directions_of_a_step_are_whitened_exactly():
    covariance = with_spectrum(1 / torch.arange(1, 65))
    for rank in (1, 7, 16):
        first = recursive(covariance[None], 1.0, None, rank)
        second = recursive(covariance[None], 1.0, first, rank)
        # The first step of the second refresh cleared these, and the next keeps it: P C S = S.
        torch.testing.assert_close(
            second.matrix @ covariance @ first.directions, first.directions, rtol=1e-9, atol=1e-9
        )


def test_a_p_that_has_lost_its_definiteness_starts_afresh_and_is_counted():
    covariance = torch.stack([with_spectrum(1 / torch.arange(1, 41), seed) for seed in range(3)])
    last = recursive(covariance, 1.0, None, 4)
    last.matrix[1] -= 1.5 * torch.eye(40) * last.matrix[1].diagonal().max()
    result = recursive(covariance, 1.0, last, 4)
    assert result.restarted.tolist() == [False, True, False]
    torch.testing.assert_close(result.matrix[1:2], recursive(covariance[1:2], 1.0, None, 4).matrix)
    with pytest.raises(ValueError, match="directions"):
        recursive(covariance, 1.0, last._replace(directions=None))


@pytest.mark.slow
def test_p_stays_positive_definite_over_ten_thousand_refreshes_in_float32():
    torch.manual_seed(0)
    options = {"method": "recursive", "power": 1.0, "damping": 0.03, "decay": 0.95, "rescale": True, "rank": 4}
    factor = WhiteningFactor(1, 24, **options)
    mix, turn = torch.randn(24, 24) / torch.arange(1, 25).sqrt(), torch.linalg.qr(torch.randn(24, 24)).Q
    conditions = []
    for step in range(10_000):
        rows = torch.randn(1, 48, 24) @ mix + 0.5
        if step % 10 == 0:  # the distribution drifts, and its size with it
            mix = mix @ (torch.eye(24) + 0.02 * (turn - turn.mT)) * (1.01 if step % 2000 < 1000 else 1 / 1.01)
            mix *= mix.norm().clamp(1e-3, 1e3) / mix.norm()
        factor.observe(moments(rows))
        factor.close_window()
        refresh_factors([factor])
        if step % 100 == 99:
            # Each refresh adds a rounding of 6e-8, with no preferred sign: 1e-5 after 10,000.
            skew = (factor.precision - factor.precision.mT).norm() / factor.precision.norm()
            assert skew < 1e-5
            conditions.append(condition(factor.precision[0], factor.damped().matrix[0]))
    assert factor.num_refreshes == 10_000 and factor.num_refreshes_failed == 0
    assert factor.num_refreshes_restarted == 0
    # And it keeps up: the covariance's own condition number is in the hundreds.
    assert all(value < 50 for value in conditions)  # nor is one not a number, as it would be of an indefinite P


@pytest.mark.parametrize("power", [0.25, 0.5])
def test_another_power_is_that_of_the_leading_eigenvalues_and_the_mean_of_the_rest(power):
    values = torch.cat([torch.tensor([50.0, 20.0, 10.0, 5.0]), torch.full((36,), 0.3)])
    covariance, last = with_spectrum(values), None
    for _ in range(3):
        last = recursive(covariance[None], power, last, 4)
    expected = reference.inverse_power(covariance, power, damping=0.0, rescale=False)
    torch.testing.assert_close(last.matrix[0], expected, rtol=1e-9, atol=1e-9)


def test_another_power_on_a_spectrum_with_a_tail():
    """Of the harmonic spectrum's whitened condition number the leading 16 of 256 directions leave twice the best."""
    covariance, last = with_spectrum(1 / torch.arange(1, 257)), None
    for _ in range(5):
        last = recursive(covariance[None], 0.5, last, 16)
    assert condition(last.matrix[0], covariance) < 2 * 256**0.5


def test_one_negative_direction_of_p_heals_or_is_found():
    covariance = with_spectrum(1 / torch.arange(1, 41))
    for rank in (2, 8):
        last = recursive(covariance[None], 1.0, None, rank)
        values, vectors = torch.linalg.eigh(last.matrix[0])
        for place in (0, 20, 39):
            bad = last.matrix - (values[place] + 0.1 * values[-1]) * torch.outer(*[vectors[:, place]] * 2)
            after = last._replace(matrix=bad)
            for _ in range(10):
                after = recursive(covariance[None], 1.0, after, rank)
            assert condition(after.matrix[0], covariance) < 41  # a number, so P is positive definite


@pytest.mark.parametrize("power", [0.25, 0.5])
def test_a_tail_that_is_rounding_has_no_inverse_power(power):
    values = torch.cat([torch.tensor([50.0, 20.0, 10.0, 5.0]), torch.zeros(36)])
    assert not recursive(with_spectrum(values)[None], power, None, 4).matrix.isfinite().any()


@pytest.mark.parametrize("power", [0.25, 0.5, 1.0])
def test_each_matrix_is_inverted_as_if_it_were_alone(power):
    covariance = torch.stack([scale * with_spectrum(1 / torch.arange(1, 21), 7) for scale in (1.0, 30.0, 0.01)])
    together = recursive(covariance, power, None, 4).matrix
    alone = torch.cat([recursive(one[None], power, None, 4).matrix for one in covariance])
    torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-12)


def test_one_matrix_without_an_inverse_costs_the_others_nothing():
    covariance = torch.stack([with_spectrum(1 / torch.arange(1, 41), seed) for seed in range(3)])
    alone, last = recursive(covariance, 1.0, None, 4), recursive(covariance, 1.0, None, 4)
    last.matrix[1] = torch.nan
    covariance[1] = torch.nan
    for _ in range(3):
        alone, last = recursive(covariance[[0, 2]], 1.0, *[_pick(alone)], 4), recursive(covariance, 1.0, last, 4)
        torch.testing.assert_close(last.matrix[[0, 2]], alone.matrix, rtol=1e-9, atol=1e-9)
        assert not last.restarted.any() and last.matrix[1].isnan().any()


def _pick(inverse):
    return inverse if len(inverse.matrix) == 2 else type(inverse)(inverse.matrix[[0, 2]], inverse.directions[[0, 2]])
