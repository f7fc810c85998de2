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
    result = run(covariance, last if usable.all() else _choose(usable, last, cold(covariance)))
    failed = usable & ~has_finite_trace(result.matrix)
    if failed.any():
        result = _choose(~failed, result, run(covariance, cold(covariance)))
    return result._replace(restarted=started & (failed | ~usable))


def _choose(condition: Tensor, these: Inverse, those: Inverse) -> Inverse:
    condition = condition[:, None, None]
    directions = None
    if these.directions is not None and those.directions is not None:
        directions = torch.where(condition, these.directions, those.directions)
    return Inverse(torch.where(condition, these.matrix, those.matrix), directions)
