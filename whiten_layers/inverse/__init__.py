"""Inverse powers of a covariance: one method a file, each a pure function of tensors.

A method takes damped covariances ``(..., M, M)`` and a power p and returns ``C^(-p)``, symmetric
positive definite, or NaN for a matrix it cannot invert; it never raises. To add one, write the
function and give it a line in `METHODS`.
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from .cholesky import cholesky
from .eigh import eigh


class Method(NamedTuple):
    """A function and what it can do."""

    inverse: Callable[[Tensor, float], Tensor]
    powers: tuple[float, ...] | None  # the powers it gives; None for any


METHODS = {
    "cholesky": Method(cholesky, powers=(1.0,)),
    "eigh": Method(eigh, powers=None),
}


def supports(method: str, power: float) -> bool:
    """Whether `method` (a key of `METHODS`, or "auto") gives ``C^(-power)``."""
    if method == "auto":
        return True
    powers = METHODS[method].powers
    return powers is None or power in powers


def resolve(method: str, power: float) -> str:
    """Return the key of `METHODS` that `method` stands for: for "auto", the cheapest that gives `power`."""
    if method != "auto":
        return method
    return "cholesky" if supports("cholesky", power) else "eigh"


__all__ = ["METHODS", "Method", "cholesky", "eigh", "resolve", "supports"]
