"""Inverse, or its root, by Newton–Schulz iteration, which uses matrix products only.

For the inverse, ``P ← P (2I − C P)`` squares the residual ``I − C P`` at every step, from any symmetric positive P
whose ``P C`` has eigenvalues below 2. The P of the last refresh usually qualifies, and is a few steps from the end.
``P = I / b``, with b at least C's largest eigenvalue, always qualifies.

For the inverse of the root, the coupled steps of `newton_steps` run from ``C / b`` until they have converged. They
can only start there, since they are stable only while both matrices commute with C.
"""

import torch
from torch import Tensor

from .base import Inverse, identity_like, warm_started
from .newton_steps import coupled_step, minus_identity

ITERATIONS = 50  # more than a condition number of 1e12 takes: each step doubles the smallest eigenvalue
SAFE = 1.7  # below 2 by more than the power iteration underestimates


def newton_schulz(covariance: Tensor, power: float, warm_start: Inverse | None = None) -> Inverse:
    """Compute ``covariance^(-power)`` for n symmetric positive definite matrices.

    Args:
        covariance: ``(n, M, M)``, already damped.
        power: 1 or ½.
        warm_start: the last result, from which power 1 starts. Without one, or where the largest eigenvalue of ``P C``
            is not well below 2, the start is the identity divided by a bound on C's largest eigenvalue. Unused with
            power ½.

    Returns:
        ``matrix`` (n, M, M), NaN where it did not converge; ``restarted`` where `warm_start` could not be used.
    """
    if power == 1:
        return warm_started(_inverse, covariance, warm_start, _cold, _is_safe)
    return Inverse(_coupled(covariance))


def _bound(covariance: Tensor) -> Tensor:
    """Bound the largest eigenvalue from above, by the largest row sum of absolute values."""
    return covariance.abs().sum(-1).amax(-1)[:, None, None]


def _cold(covariance: Tensor) -> Inverse:
    return Inverse(identity_like(covariance) / _bound(covariance))


def _is_safe(covariance: Tensor, matrix: Tensor) -> Tensor:
    """Tell whether the largest eigenvalue of ``P C`` is below `SAFE`, by power iteration in the metric of C."""
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(covariance.shape[-1], 8, generator=generator, dtype=covariance.dtype).to(covariance.device)
    vectors = vectors.expand(len(covariance), -1, -1)
    for _ in range(8):
        images = covariance @ vectors
        norms = torch.linalg.vecdot(vectors, images, dim=-2)
        vectors = matrix @ images
        growth = torch.linalg.vecdot(images, vectors, dim=-2) / norms
        vectors = vectors / torch.linalg.vector_norm(vectors, dim=-2, keepdim=True)
    return growth.amax(-1) < SAFE


def _inverse(covariance: Tensor, start: Inverse) -> Inverse:
    matrix, progress = start.matrix, _Progress(covariance)
    while progress.goes_on:
        residual = minus_identity(covariance @ matrix)
        matrix = torch.baddbmm(matrix, matrix, residual, alpha=-1)
        progress.take(residual)
    return Inverse(progress.accepted(matrix))


def _coupled(covariance: Tensor) -> Tensor:
    bound = _bound(covariance)
    root, inverse_root = covariance / bound, identity_like(covariance)
    progress = _Progress(covariance)
    while progress.goes_on:
        residual = minus_identity(inverse_root @ root)
        root, inverse_root = coupled_step(root, inverse_root, residual)
        progress.take(residual)
    return progress.accepted(inverse_root) / bound.sqrt()


class _Progress:
    """Progress of an iteration that squares its residuals, for n matrices together.

    Reads a flag from the device after every step, which costs nothing next to two or three products of M×M matrices.
    """

    def __init__(self, covariance: Tensor) -> None:
        self.steps = 0
        self.errors = covariance.new_full((len(covariance),), torch.inf)
        self.goes_on = True

    def take(self, residual: Tensor) -> None:
        """Record the residual before a step. The step squares its norm, down to the level of rounding."""
        before, self.errors = self.errors, torch.linalg.vector_norm(residual, dim=(-2, -1))
        self.steps += 1
        settled = (self.errors < torch.finfo(residual.dtype).eps ** 0.5) | ~torch.isfinite(self.errors)
        settled |= (before < 0.5) & (self.errors > before / 2)
        self.goes_on = self.steps < ITERATIONS and not bool(settled.all())

    def accepted(self, matrix: Tensor) -> Tensor:
        return torch.where((self.errors < 0.5)[:, None, None], matrix, torch.nan)
