"""Square root, or its inverse, by a fixed number of coupled Newton–Schulz steps, and the gradient through the steps.

With ``A = C / tr C``, whose eigenvalues are at most 1, from ``Y = A`` and ``Z = I`` the steps

    Y ← (3Y − Y Z Y) / 2        Z ← (3Z − Z Y Z) / 2

tend to ``Y = A^½`` and ``Z = A^(-½)`` (Higham 2008, Functions of Matrices, eq. 6.35), so that ``C^½ = √tr C · Y`` and
``C^(-½) = Z / √tr C`` (arXiv 1712.01034). All matrices are polynomials of A, so they commute. Z is what the steps
``Z ← (3Z − Z³ A) / 2`` on one matrix alone yield, but those amplify rounding errors. After few steps the results
for eigenvalues of A far below 1 are still too small: k steps multiply them by ``1.5^k`` at most.

The gradient of one step follows from the product rule. With symmetric gradients G of the new Y and H of the new Z, and
``R = Z Y − I``,

    ∂L/∂Y = (G − G R − R G − Z H Z) / 2        ∂L/∂Z = (H − H R − R H − Y G Y) / 2

The steps are computed again for it, not kept.
"""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from .base import Root, divided, identity_like, trace, unscaled_adjoint


def coupled_step(root: Tensor, inverse_root: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """Take one step of n pairs of matrices ``(n, M, M)`` with the residual ``Z Y − I``."""
    return (
        torch.baddbmm(root, root, residual, alpha=-0.5),
        torch.baddbmm(inverse_root, residual, inverse_root, alpha=-0.5),
    )


def minus_identity(product: Tensor) -> Tensor:
    """Subtract the identity from n matrices in place."""
    product.diagonal(dim1=-2, dim2=-1).sub_(1)
    return product


def newton_schulz_root(factor: Tensor, iterations: int) -> Root:
    """Approximate ``C^½`` of n covariances ``C = X Xᵀ`` from their factors X ``(n, M, K)``; 0 for 0."""
    covariance = factor @ factor.mT
    adjoint = partial(newton_root_adjoint, iterations=iterations, power=0.5)
    return Root(newton_root(covariance, iterations, power=0.5), adjoint, (covariance,))


def newton_root(covariance: Tensor, iterations: int, power: float) -> Tensor:
    """Approximate ``covariance^power``, power ½ or −½, of n symmetric positive semidefinite matrices ``(n, M, M)``.

    The root of 0 is 0; its inverse is not finite.
    """
    scale = trace(covariance)
    for state in _states(divided(covariance, scale), iterations):
        last_state = state  # the others need not stay in memory
    root, inverse_root, residual = last_state
    last = root if power > 0 else inverse_root
    return torch.baddbmm(last, last, residual, alpha=-0.5) * scale**power


def newton_root_adjoint(grad: Tensor, result: Tensor, covariance: Tensor, iterations: int, power: float) -> Tensor:
    """Compute the gradient of the covariance from that of `newton_root`'s result; 0 for the root of 0."""
    scale = trace(covariance)
    scaled = divided(covariance, scale)
    first, *states = _states(scaled, iterations)
    symmetric = (grad + grad.mT) / 2 * scale**power
    of_root, of_inverse = (symmetric, None) if power > 0 else (None, symmetric)
    for root, inverse_root, residual in reversed(states):
        of_root, of_inverse = (
            _step_adjoint(of_root, residual, inverse_root, of_inverse),
            _step_adjoint(of_inverse, residual, root, of_root),
        )
    # The first step begins with Y = A, and with Z = I, which is constant.
    _, identity, residual = first
    of_scaled = torch.zeros_like(scaled) if of_inverse is None else of_inverse / -2
    if of_root is not None:
        of_scaled = of_scaled + _step_adjoint(of_root, residual, identity, None)
    return unscaled_adjoint(of_scaled, scaled, scale, identity, power * (grad * result).sum((-2, -1), True))


def _step_adjoint(grad: Tensor | None, residual: Tensor, other: Tensor, other_grad: Tensor | None) -> Tensor:
    """Compute ``(G − G R − R G − Z H Z) / 2`` of symmetric gradients; None stands for a G or H of zeros, not both."""
    if grad is None:
        assert other_grad is not None
        return other @ other_grad @ other / -2
    half = torch.baddbmm(grad, grad, residual, beta=0.25, alpha=-0.5)
    kept = half + half.mT
    return kept if other_grad is None else torch.baddbmm(kept, other @ other_grad, other, alpha=-0.5)


def _states(scaled: Tensor, iterations: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Compute root, inverse root and residual before each step."""
    identity = identity_like(scaled)
    state = scaled, identity, scaled - identity
    yield state
    for _ in range(iterations - 1):
        root, inverse_root = coupled_step(*state)
        state = root, inverse_root, minus_identity(inverse_root @ root)
        yield state
