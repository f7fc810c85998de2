"""Every method of the table against the reference's decomposition."""

import pytest
import torch

from whiten_layers.inverse import METHODS, Inverse, resolve, supports

from .. import reference


def covariances(number: int, size: int, dtype: torch.dtype = torch.float64, condition: float = 1e3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(size)
    basis = torch.linalg.qr(torch.randn(number, size, size, generator=generator, dtype=torch.float64)).Q
    values = torch.logspace(0, -torch.tensor(condition).log10().item(), size, dtype=torch.float64)
    matrix = (basis * values) @ basis.mT
    return ((matrix + matrix.mT) / 2).to(dtype)


def run(name: str, matrices: torch.Tensor, power: float, warm_start: Inverse | None = None) -> Inverse:
    """With as many directions as features the approximate method is exact, too."""
    method = METHODS[name]
    return method.inverse(*(matrices, power, warm_start, matrices.shape[-1])[: method.arguments])


def invert(name: str, matrices: torch.Tensor, power: float) -> torch.Tensor:
    return run(name, matrices, power).matrix


EVERY = [(name, power) for name in METHODS for power in (0.25, 0.5, 1.0) if supports(name, power)]
each_method = pytest.mark.parametrize("name, power", EVERY)


@each_method
@pytest.mark.parametrize("size", [1, 2, 7, 40])
def test_the_inverse_power_is_the_references(name, power, size):
    matrices = covariances(3, size)
    result = invert(name, matrices, power)
    torch.testing.assert_close(result, result.mT, rtol=1e-9, atol=1e-9)
    for matrix, inverse in zip(matrices, result, strict=True):
        expected = reference.inverse_power(matrix, power, damping=0.0, rescale=False)
        torch.testing.assert_close(inverse, expected, rtol=1e-9, atol=1e-9 * expected.abs().max().item())


@each_method
def test_float32_loses_what_the_condition_number_costs(name, power):
    matrices = covariances(2, 32, torch.float32, condition=1e3)
    expected = invert(name, matrices.double(), power)
    # Rounding of 6e-8 times the condition number.
    error = (invert(name, matrices, power) - expected).norm() / expected.norm()
    assert error < 6e-4


@each_method
@pytest.mark.parametrize("bad", ["zero", "singular", "indefinite", "nan"])
def test_a_matrix_without_an_inverse_gives_nan_and_spares_the_others(name, power, bad):
    matrices = covariances(3, 5)
    matrices[1] = {
        "zero": torch.zeros(5, 5),
        "singular": torch.ones(5, 5),
        "indefinite": -torch.eye(5),
        "nan": torch.full((5, 5), torch.nan),
    }[bad]
    result = invert(name, matrices, power)
    assert not result[1].isfinite().all()
    torch.testing.assert_close(result[[0, 2]], invert(name, matrices[[0, 2]], power), rtol=1e-9, atol=1e-9)
    # The last result, with its NaN, is a start like any other.
    again = run(name, matrices, power, run(name, matrices, power)).matrix
    assert not again[1].isfinite().all()
    torch.testing.assert_close(again[[0, 2]], result[[0, 2]], rtol=1e-9, atol=1e-9)


def test_a_decomposition_that_does_not_converge_spares_the_others(monkeypatch):
    decompose = torch.linalg.eigh

    def failing(matrix):
        if (matrix == 7).any():
            raise torch.linalg.LinAlgError("did not converge")
        return decompose(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", failing)
    matrices = covariances(3, 4)
    matrices[1] = 7
    result = invert("eigh", matrices, 0.5)
    assert result[1].isnan().all() and result[[0, 2]].isfinite().all()


def test_auto_is_a_method_that_gives_the_power():
    for power in (0.1, 0.5, 1.0):
        assert supports(resolve("auto", power), power)
    assert resolve("auto", 1.0) == "cholesky"
    assert resolve("eigh", 1.0) == "eigh"
