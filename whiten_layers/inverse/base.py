"""The result of every method, and how one that starts from its last result starts afresh where it has to."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Inverse(NamedTuple):
    """Inverse powers of n matrices: a method's result, and what its next call starts from.

    ``matrix`` (n, M, M) is symmetric to rounding, NaN where there is none. ``directions`` (n, M, rank) is
    what the recursive method keeps beside it. ``restarted`` (n,), of a result, tells where there was
    something to start from that could not be used; it is None for a method that never starts warm.
    """

    matrix: Tensor
    directions: Tensor | None = None
    restarted: Tensor | None = None


def has_finite_trace(matrix: Tensor) -> Tensor:
    """Tell whether each of n matrices is finite: where a positive definite one is not, its trace shows it."""
    return torch.isfinite(matrix.diagonal(dim1=-2, dim2=-1).sum(-1))


def warm_started(
    run: Callable[[Tensor, Inverse], Inverse],
    covariance: Tensor,
    warm_start: Inverse | None,
    cold: Callable[[Tensor], Inverse],
    is_safe: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Inverse:
    """Run an iteration from `warm_start`; from `cold` where there is none, it is not safe, or the run fails.

    A warm start that is not finite counts as none. Waits for the device to learn how the run ended.
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
    """Put `others` in the place of the chosen matrices, so that one bad matrix does not restart all."""
    matrix, directions = inverse.matrix.clone(), inverse.directions
    matrix[chosen] = others.matrix
    if directions is not None and others.directions is not None:
        directions = directions.clone()
        directions[chosen] = others.directions
    return Inverse(matrix, directions)
