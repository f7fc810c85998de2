"""Inverse powers of covariances: one method a file, each a pure function of tensors.

A method takes n damped covariances ``(n, M, M)``, a power p, its own last result or None, and a rank, and
returns an `Inverse` with ``C^(-p)``, symmetric to rounding, or NaN for a matrix that it cannot invert: a
bad matrix never raises. Exact methods look at the first two only. To add a method, write the
function and give it a line in `METHODS`.
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from .base import Inverse
from .cholesky import cholesky
from .eigh import eigh
from .newton_schulz import newton_schulz
from .recursive import recursive


class Method(NamedTuple):
    """A function and what it can do."""

    inverse: Callable[[Tensor, float, Inverse | None, int], Inverse]
    powers: tuple[float, ...] | None  # the powers it gives; None for any
    operations: int  # of an inverse, roughly, over M³ (of an approximate one, over M² · rank)
    warm_powers: tuple[float, ...] | None = ()  # those for which it starts from its last result; None for all
    is_approximate: bool = False  # and keeps directions from call to call


METHODS = {
    "cholesky": Method(cholesky, powers=(1.0,), operations=1),
    "eigh": Method(eigh, powers=None, operations=11),
    "newton_schulz": Method(newton_schulz, powers=(0.5, 1.0), operations=60, warm_powers=(1.0,)),
    "recursive": Method(recursive, powers=None, operations=12, warm_powers=None, is_approximate=True),
}


def supports(method: str, power: float) -> bool:
    """Whether `method` (a key of `METHODS`, or "auto") gives ``C^(-power)``."""
    if method == "auto":
        return True
    powers = METHODS[method].powers
    return powers is None or power in powers


def resolve(method: str, power: float) -> str:
    """Return the key of `METHODS` that `method` stands for: for "auto", the cheapest exact one that gives `power`."""
    if method != "auto":
        return method
    return "cholesky" if supports("cholesky", power) else "eigh"


__all__ = ["METHODS", "Inverse", "Method", "cholesky", "eigh", "newton_schulz", "recursive", "resolve", "supports"]
