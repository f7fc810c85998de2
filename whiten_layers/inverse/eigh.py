"""Functions of covariances by eigendecomposition, about 9 M³ operations: inverse powers, as in the paper, and the root.

With ``C = U Λ Uᵀ`` a function of C is ``f(C) = U f(Λ) Uᵀ``. Divided differences of f yield its gradient (Daleckii &
Krein 1965): for the gradient G of f(C)

    ∂L/∂C = U (K ∘ (Uᵀ sym(G) U)) Uᵀ        K_ij = (f(λ_i) − f(λ_j)) / (λ_i − λ_j)

For roots K can be written without a difference of eigenvalues, unlike the derivative of an eigenvector. So it is as
accurate where they are equal. For ``f = √``, ``K_ij = 1 / (√λ_i + √λ_j)``: this ∂L/∂C is the solution S of the Lyapunov
equation ``√C S + S √C = sym(G)``.
"""

import torch
from torch import Tensor

from .base import Inverse, Root


def decompose(symmetric: Tensor) -> tuple[Tensor, Tensor]:
    """Compute eigenvalues ``(n, M)``, ascending, and eigenvectors ``(n, M, M)``.

    Both are NaN for a matrix that is not finite, or whose decomposition does not converge.
    """
    finite = symmetric.isfinite().all(-1).all(-1)[:, None, None]
    # LAPACK's solver raises for a NaN, and a compiled graph cannot catch it: such a matrix is replaced.
    values, vectors = _decompose(torch.where(finite, symmetric, 0))
    return torch.where(finite.squeeze(-1), values, torch.nan), torch.where(finite, vectors, torch.nan)


def _decompose(symmetric: Tensor) -> tuple[Tensor, Tensor]:
    try:
        return torch.linalg.eigh(symmetric)
    except torch.linalg.LinAlgError:
        if len(symmetric) == 1:
            return torch.full_like(symmetric[..., 0], torch.nan), torch.full_like(symmetric, torch.nan)
        # One bad matrix fails the whole batch: find it, and keep the others.
        values, vectors = zip(*map(_decompose, symmetric.split(1)), strict=True)
        return torch.cat(values), torch.cat(vectors)


def inverse_power(values: Tensor, power: float) -> Tensor:
    """Compute ``values^(-power)`` of ascending eigenvalues ``(n, M)``; NaN for those that are ≤ 0 to rounding."""
    return torch.where(values > rounding(values), values, torch.nan).pow(-power)


def rounding(values: Tensor) -> Tensor:
    """Return the size ``(n, 1)`` of rounding errors in ascending eigenvalues ``(n, M)`` of covariances."""
    return torch.finfo(values.dtype).eps * values.shape[-1] * values[..., -1:]


def spectral_adjoint(grad: Tensor, vectors: Tensor, differences: Tensor) -> Tensor:
    """Compute the gradient of a covariance from that of a function of it, by the function's divided differences K."""
    turned = vectors.mT @ ((grad + grad.mT) / 2) @ vectors
    return vectors @ (differences * turned) @ vectors.mT


def eigh(covariance: Tensor, power: float) -> Inverse:
    """Compute ``covariance^(-power)``, any power, for n symmetric positive definite matrices ``(n, M, M)``.

    Returns:
        ``matrix`` (n, M, M); NaN for a matrix that is singular to rounding, or whose decomposition does not converge.
    """
    values, vectors = decompose(covariance)
    return Inverse((vectors * inverse_power(values, power).unsqueeze(-2)) @ vectors.mT)


def eigh_root(factor: Tensor) -> Root:
    """Compute ``C^½`` of n covariances ``C = X Xᵀ`` from their factors X ``(n, M, K)``.

    Of the two products ``X Xᵀ`` and ``Xᵀ X``, which have the same eigenvalues besides 0, the smaller is decomposed.
    Eigenvalues that are 0 to rounding become 0. The root is NaN where a decomposition does not converge.
    """
    if factor.shape[-2] <= factor.shape[-1]:
        values, vectors = decompose(factor @ factor.mT)
        roots = torch.where(values <= rounding(values), 0, values).sqrt()
        return Root((vectors * roots.unsqueeze(-2)) @ vectors.mT, _root_adjoint, (roots, vectors))
    values, vectors = decompose(factor.mT @ factor)
    roots = torch.where(values <= rounding(values), 0, values).sqrt()
    vectors = factor @ _over(vectors, roots)
    return Root((vectors * roots.unsqueeze(-2)) @ vectors.mT, _thin_root_adjoint, (roots, vectors))


# Between two eigenvalues of 0 the root has no derivative: there K is 0. Changes of X that keep the rank of C do not
# depend on this part.
def _root_adjoint(grad: Tensor, root: Tensor, roots: Tensor, vectors: Tensor) -> Tensor:
    return spectral_adjoint(grad, vectors, _root_differences(roots))


# With only the K columns U whose eigenvalues are not 0, UᵀU = I, the rest of the basis enters as I − U Uᵀ: there K is
# 1 / √λ_j. With G symmetric and H = Uᵀ G U
#
#     ∂L/∂C = U (K ∘ H) Uᵀ + A Uᵀ + U Aᵀ        A = (G U − U H) Λ^(-½)
def _thin_root_adjoint(grad: Tensor, root: Tensor, roots: Tensor, vectors: Tensor) -> Tensor:
    image = (grad + grad.mT) / 2 @ vectors
    inner = vectors.mT @ image
    half = vectors @ (_root_differences(roots) * inner / 2) + _over(image - vectors @ inner, roots)
    product = half @ vectors.mT
    return product + product.mT


def _root_differences(roots: Tensor) -> Tensor:
    sums = roots.unsqueeze(-1) + roots.unsqueeze(-2)
    return torch.where(sums == 0, 0, 1 / sums)


def _over(columns: Tensor, roots: Tensor) -> Tensor:
    """Divide columns by roots; 0 where a root is 0."""
    return torch.where(roots.unsqueeze(-2) == 0, 0, columns / roots.unsqueeze(-2))
