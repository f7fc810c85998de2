"""Newton–Schulz: warm starts are short, unsafe ones are found and counted, and the answer is the inverse."""

import pytest
import torch

from whiten_layers.inverse import Inverse, cholesky, eigh, newton_schulz

from .test_methods import covariances


@pytest.fixture
def steps(monkeypatch):
    """A list with an entry for every step."""
    count, baddbmm = [], torch.baddbmm
    monkeypatch.setattr(torch, "baddbmm", lambda *a, **k: (count.append(1), baddbmm(*a, **k))[1])
    return count


def test_a_warm_start_takes_a_third_of_a_cold_ones_steps(steps):
    matrices = covariances(2, 30)
    first = newton_schulz(matrices, 1.0)
    cold = len(steps)
    steps.clear()
    moved = 1.1 * matrices
    second = newton_schulz(moved, 1.0, first)
    assert len(steps) <= cold / 3
    assert not first.restarted.any() and not second.restarted.any()
    torch.testing.assert_close(second.matrix, cholesky(moved).matrix, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_it_stops_when_all_have_settled_or_are_lost(power, steps):
    newton_schulz(torch.eye(6).expand(2, -1, -1), power)
    assert len(steps) <= 4
    steps.clear()
    lost = torch.stack([torch.eye(6), torch.full((6, 6), torch.nan)])
    assert newton_schulz(lost, power).matrix.isnan().all(-1).all(-1).tolist() == [False, True]
    assert len(steps) <= 4


@pytest.mark.parametrize("growth", [1.5, 1.9, 2.5, 100.0])
def test_a_start_from_which_it_would_diverge_is_found_counted_and_left(growth):
    matrices = covariances(3, 30)
    last = cholesky(matrices)
    # One direction of one covariance has grown: the largest eigenvalue of PC is `growth`, all others are 1.
    vector = torch.linalg.eigh(matrices[1]).eigenvectors[:, 11:12]
    moved = matrices.clone()
    moved[1] += (growth - 1) * (vector.T @ matrices[1] @ vector) * vector @ vector.T
    result = newton_schulz(moved, 1.0, last)
    assert result.restarted.tolist() == [False, growth > 1.7, False]
    torch.testing.assert_close(result.matrix, cholesky(moved).matrix, rtol=1e-9, atol=1e-9)


def test_a_start_that_is_not_positive_definite_is_left():
    matrices = covariances(2, 20)
    last = cholesky(matrices).matrix
    last[0] -= 1.5 * torch.eye(20) * last[0].diagonal().amin()
    result = newton_schulz(matrices, 1.0, Inverse(last))
    assert result.restarted.tolist() == [True, False]
    torch.testing.assert_close(result.matrix, cholesky(matrices).matrix, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("power", [0.5, 1.0])
@pytest.mark.parametrize("condition", [1.0, 1e2, 1e4])
def test_float32_is_as_near_as_the_condition_number_allows(power, condition):
    matrices = covariances(2, 48, torch.float32, condition)
    expected = eigh(matrices.double(), power).matrix
    error = (newton_schulz(matrices, power).matrix - expected).norm() / expected.norm()
    assert error < 1e-6 * max(10, condition)


def test_many_refreshes_of_a_drifting_covariance_stay_the_inverse():
    torch.manual_seed(0)
    covariance, last = covariances(1, 24, torch.float32, 1e2), None
    for _ in range(200):
        rows = torch.randn(1, 200, 24) * torch.linspace(0.3, 3, 24)
        covariance = 0.9 * covariance + 0.1 * rows.mT @ rows / 200
        last = newton_schulz(covariance, 1.0, last)
        assert last.matrix.isfinite().all()
    torch.testing.assert_close(last.matrix, cholesky(covariance).matrix, rtol=1e-3, atol=1e-4)
    assert not last.restarted.any()
