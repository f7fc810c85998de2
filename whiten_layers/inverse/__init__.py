"""Inverse powers of covariances: one method a file, each a pure function of tensors.

A method takes n damped covariances ``(n, M, M)`` and, as far as it uses them, a power p, its own last result (or None)
and a rank, in this order. It returns an `Inverse` with ``C^(-p)``, symmetric to rounding, and NaN for a matrix that it
cannot invert: a bad matrix never raises. To add a method, write the function and give it a line in `METHODS`.
"""

from collections.abc import Callable
from typing import NamedTuple

from .base import Inverse
from .cholesky import cholesky
from .eigh import eigh
from .newton_schulz import newton_schulz
from .recursive import recursive


class Method(NamedTuple):
    """A function and what it can do."""

    inverse: Callable[..., Inverse]
    arguments: int  # how many it takes of (covariance, power, warm_start, rank)
    powers: tuple[float, ...] | None  # that it can compute; None for any
    operations: int  # of an inverse, roughly, over M³ (of an approximate one, over M² · rank)
    warm_powers: tuple[float, ...] | None = ()  # those for which it starts from its last result; None for all
    is_approximate: bool = False  # and keeps directions from call to call


METHODS = {
    "cholesky": Method(cholesky, 1, powers=(1.0,), operations=1),
    "eigh": Method(eigh, 2, powers=None, operations=11),
    "newton_schulz": Method(newton_schulz, 3, powers=(0.5, 1.0), operations=60, warm_powers=(1.0,)),
    "recursive": Method(recursive, 4, powers=None, operations=12, warm_powers=None, is_approximate=True),
}


def supports(method: str, power: float) -> bool:
    """Tell whether `method` (a key of `METHODS`, or "auto") can compute ``C^(-power)``."""
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
