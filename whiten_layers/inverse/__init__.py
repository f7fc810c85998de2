"""Inverse powers and square roots of covariances: one file per method, each pure functions of tensors.

A method takes n damped covariances ``(n, M, M)`` and, as far as it uses them, a power p, its own last result (or None)
and a rank, in this order. It returns an `Inverse` with ``C^(-p)``, symmetric to rounding, and NaN for a matrix that it
cannot invert. It never raises for a bad matrix. To add a method, write the function and add it to `METHODS`.

The square roots in `ROOTS` come with the adjoint of their derivative, for layers that have them in the forward pass.
They take factors X ``(n, M, K)`` of n covariances ``X Xᵀ``, which may be singular, and a number of steps unless they
are exact. They return a `Root`.
"""

from collections.abc import Callable
from typing import NamedTuple

from .base import Inverse, Root
from .cholesky import cholesky
from .eigh import eigh, eigh_root
from .newton_schulz import newton_schulz
from .newton_steps import newton_schulz_root
from .pade import pade_root
from .recursive import recursive


class Method(NamedTuple):
    """Inverse function and its capabilities."""

    inverse: Callable[..., Inverse]
    arguments: int  # how many of (covariance, power, warm_start, rank) it takes
    powers: tuple[float, ...] | None  # powers that it can compute; None for any
    operations: int  # rough count for one inverse, divided by M³ (approximate method: by M² · rank)
    warm_powers: tuple[float, ...] | None = ()  # powers for which it starts from its last result; None: all
    is_approximate: bool = False  # an approximate method also keeps directions between calls


METHODS = {
    "cholesky": Method(cholesky, 1, powers=(1.0,), operations=1),
    "eigh": Method(eigh, 2, powers=None, operations=11),
    "newton_schulz": Method(newton_schulz, 3, powers=(0.5, 1.0), operations=60, warm_powers=(1.0,)),
    "recursive": Method(recursive, 4, powers=None, operations=12, warm_powers=None, is_approximate=True),
}

ROOTS: dict[str, Callable[..., Root]] = {
    "eigh": eigh_root,
    "newton_schulz": newton_schulz_root,
    "pade": pade_root,
}


def supports(method: str, power: float) -> bool:
    """Tell whether `method` (a key of `METHODS`, or "auto") can compute ``C^(-power)``."""
    if method == "auto":
        return True
    powers = METHODS[method].powers
    return powers is None or power in powers


def resolve(method: str, power: float) -> str:
    """Return the key of `METHODS` for `method`; "auto" stands for the cheapest exact one that supports `power`."""
    if method != "auto":
        return method
    return "cholesky" if supports("cholesky", power) else "eigh"


__all__ = [
    "METHODS",
    "ROOTS",
    "Inverse",
    "Method",
    "Root",
    "cholesky",
    "eigh",
    "newton_schulz",
    "recursive",
    "resolve",
    "supports",
]
