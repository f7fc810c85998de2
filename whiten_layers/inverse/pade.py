"""Square root by a Padé approximant, and its exact gradient (arXiv 2105.02498, 2201.08663).

The diagonal approximant of degree m of the root, about 1, is a sum of partial fractions (Higham 2008, Functions of
Matrices, eq. 6.30): with ``θ_j = j π / (2m + 1)``

    √x ≈ r(x) = 2m + 1 − 2 / (2m + 1) Σ_j tan²θ_j / (sin²θ_j + x cos²θ_j)

The closer x is to 1 the smaller is the error, ``(r − √x) / (r + √x) = ((1 − √x) / (1 + √x))^(2m + 1)``. Far below 1 r
is too large: ``r(0) = 1 / (2m + 1)``. Here ``C^½ ≈ √‖C‖ r(A)`` with ``A = C / ‖C‖``, in the Frobenius norm: eigenvalues
of A are at most 1, and larger than with the trace.

The fractions are inverses ``R_j = (sin²θ_j I + cos²θ_j A)⁻¹``, bounded even if A is singular. The gradient of r itself
follows from them; it tends to the solution of the Lyapunov equation as r tends to the root:

    ∂L/∂A = 2 / (2m + 1) Σ_j sin²θ_j R_j sym(G) R_j
"""

import math

import torch
from torch import Tensor

from .base import Root, divided, identity_like, trace, unscaled_adjoint
from .cholesky import cholesky


def pade_root(factor: Tensor, degree: int) -> Root:
    """Approximate ``C^½`` of n covariances ``C = X Xᵀ`` from their factors X ``(n, M, K)``; 0 for 0.

    The gradient needs `degree` matrices for each of them.
    """
    covariance = factor @ factor.mT
    scale = _norm(covariance)
    scaled, identity = divided(covariance, scale), identity_like(covariance)
    root, inverses = (2 * degree + 1) * identity, []
    for angle in _angles(degree):
        inverses.append(cholesky(math.sin(angle) ** 2 * identity + math.cos(angle) ** 2 * scaled).matrix)
        root = root - 2 / (2 * degree + 1) * math.tan(angle) ** 2 * inverses[-1]
    return Root(root * scale.sqrt(), _root_adjoint, (covariance, *inverses))


def _root_adjoint(grad: Tensor, root: Tensor, covariance: Tensor, *inverses: Tensor) -> Tensor:
    scale = _norm(covariance)
    scaled, symmetric = divided(covariance, scale), (grad + grad.mT) / 2 * scale.sqrt()
    of_scaled = torch.zeros_like(grad)
    for angle, inverse in zip(_angles(len(inverses)), inverses, strict=True):
        weight = 2 / (2 * len(inverses) + 1) * math.sin(angle) ** 2
        of_scaled = torch.baddbmm(of_scaled, inverse @ symmetric, inverse, alpha=weight)
    return unscaled_adjoint(of_scaled, scaled, scale, scaled, (grad * root).sum((-2, -1), True) / 2)


def _norm(matrices: Tensor) -> Tensor:
    # Divided first: squares of entries underflow long before the entries do.
    scale = trace(matrices)
    return scale * torch.linalg.matrix_norm(divided(matrices, scale), keepdim=True)


def _angles(degree: int) -> list[float]:
    return [index * math.pi / (2 * degree + 1) for index in range(1, degree + 1)]
