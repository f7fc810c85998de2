"""Retries of an inverse that failed: in float64, then with more damping; if nothing helps, the last one stays in use.

In float32 a covariance can be singular to rounding although it is damped: that of 512 features which are all alike has
one eigenvalue of 512 and others of 0.03, below the rounding of the largest. In float64 the same inverse is had. Where a
matrix is indefinite, as one that was averaged or cast may be, only more damping helps. What fails all the same keeps
the precision of its last good refresh, which at first is the identity.
"""

import logging
from collections.abc import Mapping
from weakref import WeakSet

import torch
from torch import Tensor

from ..inverse import METHODS
from ..statistics.whitening_factor import RefreshResult, WhiteningFactor

RUNGS = (1, 10, 100)  # times the damping, in float64

logger = logging.getLogger("whiten_layers")
_warned: "WeakSet[WhiteningFactor]" = WeakSet()


def rescued(
    results: Mapping[WhiteningFactor, RefreshResult], names: Mapping[WhiteningFactor, str]
) -> dict[WhiteningFactor, RefreshResult]:
    """Try again, rung by rung, to invert what failed; return every factor's result, and log which needed it, once each.

    Groups that have seen nothing have nothing to be inverted. It tries on the CPU alone: elsewhere a refresh would
    have to wait for the device, to learn whether anything failed.
    """
    found = dict(results)
    for factor, first in results.items():
        failed = _failed(factor, first)
        if not (failed.is_cpu and failed.any()):
            continue
        for rung, times in enumerate(RUNGS):
            found[factor] = _merged(found[factor], _again(factor, times), failed, rung + 2)
            failed = _failed(factor, found[factor])
            if not failed.any():
                break
        if factor not in _warned:
            _warned.add(factor)
            _warn(names[factor], bool(failed.any()))
    return found


def _failed(factor: WhiteningFactor, result: RefreshResult) -> Tensor:
    """Tell which matrices have no result although rows of them are known, ``(n,)``."""
    return (result.attempt == 0) & (factor.running_count > 0)


def _again(factor: WhiteningFactor, times: float) -> RefreshResult:
    """Invert once more, in float64, by the decomposition that any covariance has."""
    method = METHODS["eigh"] if factor.method in METHODS else factor.inversion
    damped = factor.damped(times, torch.float64)
    inverse = method.inverse(*(damped.matrix, factor.power)[: method.arguments])
    result = factor.scale_inverse(inverse, damped)
    return result._replace(directions=factor.directions)


def _merged(first: RefreshResult, second: RefreshResult, failed: Tensor, attempt: int) -> RefreshResult:
    """Take the matrices that failed from a second result, where they are valid."""
    taken = failed & second.valid
    directions = first.directions
    if directions is not None and second.directions is not None:
        directions = torch.where(taken[:, None, None], second.directions, directions)
    return RefreshResult(
        torch.where(taken, attempt, first.attempt),
        first.restarted,
        torch.where(taken, second.scale.to(first.scale), first.scale),
        torch.where(taken[:, None, None], second.precision.to(first.precision), first.precision),
        directions,
    )


def _warn(name: str, has_failed: bool) -> None:
    if has_failed:
        what = "cannot be inverted, and the last inverse stays in use"
    else:
        what = "was singular to rounding, and was inverted in float64 or with more damping"
    cure = "its features may be constant or copies of each other: a larger damping= helps"
    logger.warning("the covariance of %s %s; %s; report(model, full=True) counts it", name, what, cure)
