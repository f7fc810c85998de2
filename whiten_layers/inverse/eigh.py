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

from .base import Inverse, Root, identity_like


def decompose(symmetric: Tensor) -> tuple[Tensor, Tensor]:
    """Compute eigenvalues ``(n, M)``, ascending, and eigenvectors ``(n, M, M)``.

    Both are NaN for a matrix that is not finite, or whose decomposition does not converge.
    """
    finite = symmetric.isfinite().all(-1).all(-1)[:, None, None]
    # LAPACK's solver raises for a NaN, and a compiled graph cannot catch it: such a matrix is replaced.
    values, vectors = _decompose(torch.where(finite, symmetric, identity_like(symmetric)))
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


def eigh_root(covariance: Tensor) -> Root:
    """Compute ``covariance^½`` of n symmetric positive semidefinite matrices ``(n, M, M)``.

    Eigenvalues that are 0 to rounding become 0. The root is NaN where a decomposition does not converge.
    """
    values, vectors = decompose(covariance)
    roots = torch.where(values <= rounding(values), 0, values).sqrt()
    return Root((vectors * roots.unsqueeze(-2)) @ vectors.mT, _root_adjoint, (roots, vectors))


def _root_adjoint(grad: Tensor, root: Tensor, roots: Tensor, vectors: Tensor) -> Tensor:
    # Between two eigenvalues of 0 the root has no derivative: there K is 0. Changes that keep a matrix positive
    # semidefinite and its rank do not depend on this part.
    sums = roots.unsqueeze(-1) + roots.unsqueeze(-2)
    return spectral_adjoint(grad, vectors, torch.where(sums == 0, 0, 1 / sums))
