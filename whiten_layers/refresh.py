"""Bringing what is in force up to the statistics when a backward pass has ended, of all layers that are due together.

Nothing may change in the middle of a pass: a layer that is due only asks for a refresh here. The autograd
engine calls back when the pass is over, and then the windows are closed, matrices of one size are
inverted in one batched call and written in place, in force from the next pass on.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING
from weakref import WeakSet

import torch
from torch import Tensor

from .beneath import beneath
from .clock import Clock, current_pass, is_due, last_due
from .factor import Outcome, WhiteningFactor
from .inverse import METHODS, Inverse
from .numerics import full_precision, without_autocast

if TYPE_CHECKING:
    from .transforms.base import GradientTransform

# The clocks of the passes that are running. A pass that ends in an error never calls back; weak
# references keep nothing alive for it.
_running: dict[int, WeakSet[Clock]] = {}


def at_end(number: int, clock: Clock) -> None:
    """When the pass of this number has ended, update what is due at the clock's batch."""
    if number not in _running:
        _running[number] = WeakSet()
        torch.autograd.Variable._execution_engine.queue_callback(lambda: beneath(lambda: _end(number)))
    _running[number].add(clock)


def _end(number: int) -> None:
    clocks = _running.pop(number)
    for clock in clocks:
        clock.running = None
    together = [transform for clock in clocks for transform in clock.transforms()]
    update(transform for transform in together if is_due(transform.clock.batch, transform.update_interval))


def request(transform: "GradientTransform") -> None:
    """Update a transform at once where nothing calls back when the pass ends; else then, if not asked for already."""
    if is_due(transform.clock.batch, transform.update_interval):
        number = current_pass()
        if number is None:
            update([transform])
        elif transform.clock.running is None:
            at_end(number, transform.clock)


@torch.no_grad()
def update(transforms: "Iterable[GradientTransform]") -> None:
    """Close the windows of the transforms' factors, and refresh them.

    A factor of which nothing is new stays as it is, unless its method comes nearer at every refresh.
    """
    factors = []
    for transform in transforms:
        elapsed = transform.clock.batch - last_due(transform.clock.batch - 1, transform.update_interval)
        for factor in transform.factors():
            if factor.window is not None or factor.is_approximate:
                factor.close_window(elapsed)
                factors.append(factor)
    refresh(factors)


@torch.no_grad()
def refresh(factors: Iterable[WhiteningFactor]) -> None:
    """Bring what is in force up to the running covariance of every factor."""
    for factor, outcome in inverted(factors):
        factor.install(outcome)


def inverted(factors: Iterable[WhiteningFactor]) -> Iterator[tuple[WhiteningFactor, Outcome]]:
    """What each factor's covariance comes to, with one batched call for each matrix size."""
    alike = defaultdict(list)
    for factor in factors:
        covariance = factor.running_covariance
        size, rank = covariance.shape[-1], factor.rank if factor.is_approximate else None
        alike[factor.method, factor.power, size, rank, covariance.dtype, covariance.device].append(factor)
    for (name, power, *_, device), group in alike.items():
        method = METHODS[name]
        with full_precision(), without_autocast(device):
            covariances = _together([factor.damped() for factor in group])
            warm = method.warm_powers is None or power in method.warm_powers
            last = _gathered([factor.last() for factor in group]) if warm else None
            inverses = method.inverse(covariances, power, last, group[0].rank)
            parts = _dealt(inverses, [len(factor.scale) for factor in group])
            outcomes = [factor.outcome(part) for factor, part in zip(group, parts, strict=True)]
        yield from zip(group, outcomes, strict=True)


def _together(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)  # of one large matrix no copy


def _gathered(parts: list[Inverse]) -> Inverse:
    directions = [part.directions for part in parts if part.directions is not None]
    return Inverse(_together([part.matrix for part in parts]), _together(directions) if directions else None)


def _dealt(inverses: Inverse, counts: list[int]) -> list[Inverse]:
    fields = [[None] * len(counts) if field is None else field.split(counts) for field in inverses]
    return [Inverse(*parts) for parts in zip(*fields, strict=True)]
