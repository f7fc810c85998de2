"""Square roots of covariances against the reference, and their gradients, also where eigenvalues are equal or 0."""

import pytest
import torch

from whiten_layers.inverse import ROOTS
from whiten_layers.inverse.eigh import decompose
from whiten_layers.inverse.newton_steps import newton_root, newton_root_adjoint

from .. import reference
from ..reference import with_spectrum

STEPS = {"eigh": (), "newton_schulz": (5,), "pade": (5,)}
TRUTHS = {
    "eigh": lambda c: reference.square_root(c),
    "newton_schulz": lambda c, n=5: reference.newton_square_root(c, n),
    "pade": lambda c, n=5: reference.pade_square_root(c, n),
}
SPECTRA = {
    "even": torch.linspace(1, 5, 6),
    "steep": torch.logspace(0, -6, 6),
    "equal": torch.full((6,), 3.0),
    "two pairs": torch.tensor([4.0, 4, 1, 1, 0.5, 0.5]),
    "alone": torch.tensor([7.0]),
}
SINGULAR = {
    "one zero": torch.tensor([3.0, 2, 1, 0]),
    "rank one": torch.tensor([2.0, 0, 0, 0]),
    "zero": torch.zeros(4),
}
each_root = pytest.mark.parametrize("method", ROOTS)


def factor(*covariances):
    """Square factors of covariances."""
    values, vectors = torch.linalg.eigh(torch.stack(covariances))
    return vectors * values.clamp(min=0).sqrt().unsqueeze(-2)


def gradient(seed=3, size=6):
    return torch.randn(1, size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def symmetric(matrices):
    return (matrices + matrices.mT) / 2


@each_root
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_the_root_is_the_references(method, spectrum, scale):
    covariance = scale * with_spectrum(SPECTRA[spectrum])
    root = ROOTS[method](factor(covariance), *STEPS[method]).matrix[0]
    torch.testing.assert_close(root / scale**0.5, TRUTHS[method](covariance) / scale**0.5, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method, steps", [("newton_schulz", 20), ("pade", 60)])
def test_many_steps_lead_to_the_root_and_to_its_gradient(method, steps):
    covariance, grad = with_spectrum(SPECTRA["even"]), gradient()
    root = ROOTS[method](factor(covariance), steps)
    torch.testing.assert_close(root.matrix[0], reference.square_root(covariance), rtol=1e-9, atol=1e-9)
    expected = reference.lyapunov(root.matrix[0], symmetric(grad)[0])
    torch.testing.assert_close(root.adjoint(grad, root.matrix, *root.kept)[0], expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_the_exact_roots_gradient_solves_lyapunovs_equation(spectrum):
    covariance = with_spectrum(SPECTRA[spectrum])
    grad = gradient(size=len(covariance))
    root = ROOTS["eigh"](factor(covariance))
    expected = reference.lyapunov(reference.square_root(covariance), symmetric(grad)[0])
    # With eigenvalues of 1e-6 the equation has a condition number of 1e3.
    torch.testing.assert_close(root.adjoint(grad, root.matrix, *root.kept)[0], expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("method", ["newton_schulz", "pade"])
@pytest.mark.parametrize("steps", [1, 2, 3, 5])
@pytest.mark.parametrize("spectrum", [*SPECTRA, *(name for name in SINGULAR if name != "zero")])
def test_an_approximate_roots_gradient_is_its_own(method, steps, spectrum):
    """Not that of the root: also where eigenvalues are 0, and after one step."""
    values = (SPECTRA | SINGULAR)[spectrum]
    columns = factor(with_spectrum(values)).requires_grad_()
    grad = gradient(size=len(values))
    root = ROOTS[method](columns, steps)  # differentiable operations, so autograd knows the truth
    (expected,) = torch.autograd.grad(root.matrix, columns, grad)
    ours = root.adjoint(grad, *(tensor.detach() for tensor in (root.matrix, *root.kept)))
    torch.testing.assert_close(2 * ours @ columns.detach(), expected, rtol=1e-9, atol=1e-9)


@each_root
@pytest.mark.parametrize("spectrum", SINGULAR)
def test_a_singular_matrix_has_a_root_and_a_finite_gradient(method, spectrum):
    covariance = with_spectrum(SINGULAR[spectrum])
    root = ROOTS[method](factor(covariance), *STEPS[method])
    adjoint = root.adjoint(gradient(size=4), root.matrix, *root.kept)
    assert root.matrix.isfinite().all() and adjoint.isfinite().all()
    if spectrum == "zero":
        assert not root.matrix.any() and not adjoint.any()
    if method == "eigh":
        torch.testing.assert_close(root.matrix[0] @ root.matrix[0], covariance, rtol=1e-9, atol=1e-9)


@each_root
@pytest.mark.parametrize("columns", [1, 3, 5])
def test_a_factor_of_few_columns_is_one_with_columns_of_0(method, columns):
    generator = torch.Generator().manual_seed(columns)
    thin = torch.randn(2, 6, columns, generator=generator, dtype=torch.float64)
    wide = torch.cat([thin, torch.zeros(2, 6, 6 - columns, dtype=torch.float64)], -1)
    roots = [ROOTS[method](one, *STEPS[method]) for one in (thin, wide)]
    torch.testing.assert_close(roots[0].matrix, roots[1].matrix, rtol=1e-9, atol=1e-9)
    adjoints = [root.adjoint(gradient(), root.matrix, *root.kept) for root in roots]
    torch.testing.assert_close(*adjoints, rtol=1e-8, atol=1e-8)


@each_root
@pytest.mark.parametrize("columns", [4, 6])
def test_a_factor_that_is_not_finite_spares_the_others(method, columns):
    factors = factor(*(with_spectrum(SPECTRA["even"], seed) for seed in range(3)))[..., :columns]
    expected = ROOTS[method](factors, *STEPS[method])
    for bad in (torch.nan, torch.inf):
        broken = factors.clone()
        broken[1, 0, 2] = bad
        root = ROOTS[method](broken, *STEPS[method])
        adjoint = root.adjoint(torch.ones_like(root.matrix), root.matrix, *root.kept)
        assert root.matrix[1].isnan().any() and adjoint[1].isnan().any()
        torch.testing.assert_close(root.matrix[[0, 2]], expected.matrix[[0, 2]])
        assert adjoint[[0, 2]].isfinite().all()


def test_what_is_not_finite_never_reaches_the_decomposition(monkeypatch):
    """It raises there, which a compiled graph cannot catch."""
    eigh, seen = torch.linalg.eigh, []
    monkeypatch.setattr(torch.linalg, "eigh", lambda matrix: seen.append(matrix) or eigh(matrix))
    matrices = torch.stack([torch.eye(3), torch.full((3, 3), torch.nan), torch.diag(torch.tensor([1, torch.inf, 1]))])
    values, vectors = decompose(matrices)
    assert len(seen) == 1 and seen[0].isfinite().all()
    assert values[0].isfinite().all() and values[1:].isnan().all() and vectors[1:].isnan().all()


@pytest.mark.parametrize("iterations", [1, 2, 5])
def test_the_inverse_root_is_that_of_the_steps_on_one_matrix(iterations):
    covariance, grad = with_spectrum(SPECTRA["even"]), gradient()
    leaf = covariance.clone().requires_grad_()
    expected = reference.iterated_root(leaf, 0.0, iterations)
    (of_covariance,) = torch.autograd.grad(expected, leaf, grad[0])
    result = newton_root(covariance[None], iterations, power=-0.5)
    torch.testing.assert_close(result[0], expected.detach(), rtol=1e-9, atol=1e-9)
    ours = newton_root_adjoint(grad, result, covariance[None], iterations, power=-0.5)
    torch.testing.assert_close(ours[0], symmetric(of_covariance), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("condition", [1e1, 1e3, 1e5])
@pytest.mark.parametrize("iterations", [5, 10, 20])
def test_steps_do_not_amplify_rounding_errors(condition, iterations):
    covariance = with_spectrum(torch.logspace(0, -torch.tensor(condition).log10().item(), 24))[None]
    grad = gradient(size=24)
    results = []
    for dtype in (torch.float32, torch.float64):
        result = newton_root(covariance.to(dtype), iterations, power=-0.5)
        adjoint = newton_root_adjoint(grad.to(dtype), result, covariance.to(dtype), iterations, power=-0.5)
        results.append((result.double(), adjoint.double()))
    for ours, theirs in zip(*results, strict=True):
        # Rounding of 6e-8 times the condition number. With the steps on one matrix alone it is infinite.
        assert (ours - theirs).norm() <= 6e-8 * (10 + condition) * theirs.norm()
