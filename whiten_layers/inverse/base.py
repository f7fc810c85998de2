"""Result types of all methods, scaling of matrices, and the warm start that falls back to a cold start."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Inverse(NamedTuple):
    """Inverse powers of n matrices: a method's result, and the warm start of its next call.

    ``matrix`` (n, M, M) is symmetric to rounding, and NaN where there is no inverse. ``directions`` (n, M, rank) is the
    recursive method's additional state. ``restarted`` (n,) of a result tells where a warm start existed but could not
    be used. It is None for a method that never starts warm.
    """

    matrix: Tensor
    directions: Tensor | None = None
    restarted: Tensor | None = None


class Root(NamedTuple):
    """Square roots of n covariances ``(n, M, M)``, and what their gradient needs.

    ``adjoint(∂L/∂matrix, matrix, *kept)`` returns the gradient of the covariances, symmetric.
    """

    matrix: Tensor
    adjoint: Callable[..., Tensor]
    kept: tuple[Tensor, ...]


def identity_like(matrices: Tensor) -> Tensor:
    """Return the identity, expanded to n matrices ``(n, M, M)``."""
    return torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device).expand_as(matrices)


def trace(matrices: Tensor) -> Tensor:
    """Compute the traces ``(n, 1, 1)`` of n matrices."""
    return matrices.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]


def divided(covariance: Tensor, scale: Tensor) -> Tensor:
    """Divide n matrices ``(n, M, M)`` by their scales ``(n, 1, 1)``, which are 0 for matrices of zeros only."""
    return covariance / torch.where(scale == 0, 1, scale)


# Of V = s^p f(A) with A = C / s, U = ∂L/∂V and the scale's own derivative s' (I for the trace, A for the Frobenius
# norm): the gradient of A, divided by s, reaches C directly, and s as −⟨∂L/∂A, A⟩ / s, beside p ⟨U, V⟩ / s. So
# ∂L/∂C = (∂L/∂A + (p ⟨U, V⟩ − ⟨∂L/∂A, A⟩) s') / s.
def unscaled_adjoint(of_scaled: Tensor, scaled: Tensor, scale: Tensor, of_scale: Tensor, own: Tensor) -> Tensor:
    """Compute the gradient of C from that of ``A = C / s`` ``(n, M, M)``.

    Args:
        of_scaled: ``∂L/∂A``.
        scaled: A.
        scale: s ``(n, 1, 1)``.
        of_scale: s', the derivative of s by C.
        own: ``p ⟨U, V⟩`` ``(n, 1, 1)``, for a result ``V = s^p f(A)``.
    """
    return divided(of_scaled + (own - (of_scaled * scaled).sum((-2, -1), True)) * of_scale, scale)


def has_finite_trace(matrix: Tensor) -> Tensor:
    """Tell whether the trace of each of n matrices is finite: a positive definite matrix is finite if its trace is."""
    return torch.isfinite(trace(matrix)).flatten()


def warm_started(
    run: Callable[[Tensor, Inverse], Inverse],
    covariance: Tensor,
    warm_start: Inverse | None,
    cold: Callable[[Tensor], Inverse],
    is_safe: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Inverse:
    """Run an iteration from `warm_start`, or from `cold` where that is missing or unsafe, or where the run fails.

    A warm start that is not finite counts as missing. Waits for the device to learn how the run ended.
    """
    if warm_start is None:
        return run(covariance, cold(covariance))._replace(restarted=covariance.new_zeros(len(covariance)).bool())
    started = has_finite_trace(warm_start.matrix)
    usable = started if is_safe is None else started & is_safe(covariance, warm_start.matrix)
    if not usable.all():
        warm_start = _replaced(warm_start, ~usable, cold(covariance[~usable]))
    result = run(covariance, warm_start)
    failed = usable & ~has_finite_trace(result.matrix)
    if failed.any():
        result = _replaced(result, failed, run(covariance[failed], cold(covariance[failed])))
    return result._replace(restarted=started & (failed | ~usable))


def _replaced(inverse: Inverse, chosen: Tensor, others: Inverse) -> Inverse:
    """Replace the chosen matrices by `others`, so that one bad matrix does not restart all."""
    matrix, directions = inverse.matrix.clone(), inverse.directions
    matrix[chosen] = others.matrix
    if directions is not None and others.directions is not None:
        directions = directions.clone()
        directions[chosen] = others.directions
    return Inverse(matrix, directions)
