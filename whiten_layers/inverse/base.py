"""What every method takes and returns, and how one that starts from its last result starts afresh."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Inverse(NamedTuple):
    """Inverse powers of n matrices: a method's result, and where its next call starts from.

    ``matrix`` (n, M, M) is symmetric to rounding, NaN where there is none. ``directions`` (n, M, rank) is
    what the recursive method keeps beside it. ``restarted`` (n,), of a result, tells where there was
    something to start from and it was of no use; it is None for a method that never looks.
    """

    matrix: Tensor
    directions: Tensor | None = None
    restarted: Tensor | None = None


def has_finite_trace(matrix: Tensor) -> Tensor:
    """Whether each of n matrices is finite: where a positive definite one is not, its trace tells."""
    return torch.isfinite(matrix.diagonal(dim1=-2, dim2=-1).sum(-1))


def warm_started(
    run: Callable[[Tensor, Inverse], Inverse],
    covariance: Tensor,
    last: Inverse | None,
    cold: Callable[[Tensor], Inverse],
    is_safe: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Inverse:
    """Run an iteration from `last`, but from `cold` where there is none, it is not safe, or nothing comes of it.

    A last result that is not finite is none. Waits for the device, to know what came of it.
    """
    if last is None:
        return run(covariance, cold(covariance))._replace(restarted=covariance.new_zeros(len(covariance)).bool())
    started = has_finite_trace(last.matrix)
    usable = started if is_safe is None else started & is_safe(covariance, last.matrix)
    if not usable.all():
        last = _replaced(last, ~usable, cold(covariance[~usable]))
    result = run(covariance, last)
    failed = usable & ~has_finite_trace(result.matrix)
    if failed.any():
        result = _replaced(result, failed, run(covariance[failed], cold(covariance[failed])))
    return result._replace(restarted=started & (failed | ~usable))


def _replaced(inverse: Inverse, chosen: Tensor, others: Inverse) -> Inverse:
    """Put `others` in the place of those that are chosen: one bad matrix must not cost all a new start."""
    matrix, directions = inverse.matrix.clone(), inverse.directions
    matrix[chosen] = others.matrix
    if directions is not None and others.directions is not None:
        directions = directions.clone()
        directions[chosen] = others.directions
    return Inverse(matrix, directions)
