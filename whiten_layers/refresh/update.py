"""Bringing what is in force up to the statistics when a backward pass has ended, of all layers that are due together.

Nothing may change in the middle of a pass: a layer that is due only asks for a refresh here. The autograd
engine calls back when the pass is over, and then the windows are closed, matrices of one size are
inverted in one batched call and written in place, in force from the next pass on. Processes that train
one model do it together, each its share.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING
from weakref import WeakSet

import torch
from torch import Tensor

from .._torch.function_transforms import beneath
from .._torch.precision import full_precision, without_autocast
from ..inverse import METHODS, Inverse
from ..statistics.covariance import FeatureCovariance, SettledCovariance
from ..statistics.whitening_factor import Outcome, WhiteningFactor
from . import collectives as distributed
from .schedule import Clock, current_pass, is_due, last_due

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from ..transforms.base import GradientTransform

# The clocks of the passes that are running. A pass that ends in an error never calls back; weak
# references keep nothing alive for it.
_running: dict[int, WeakSet[Clock]] = {}


def at_end(number: int, clock: Clock) -> None:
    """When the pass of this number has ended, update what is due at the clock's batch."""
    if number not in _running:
        _running[number] = WeakSet()
        _call_last(lambda: beneath(lambda: _end(number)), others=2)
    _running[number].add(clock)


def _call_last(function: Callable[[], None], others: int) -> None:
    """Call at the end of the pass, after other callbacks, even if so many of them are each queued by the one before.

    DDP's own send and await the gradients: with a static graph two, the second queued by the first. On every process
    what is sent here comes after them.
    """
    callback = function if others == 0 else lambda: _call_last(function, others - 1)
    torch.autograd.Variable._execution_engine.queue_callback(callback)


def _end(number: int) -> None:
    together = []
    for clock in _running.pop(number):
        # Of a pass within one that is not known only what it has reached: others may still come.
        together += [one for one in clock.transforms() if clock.running is not None or one.is_in(number)]
        clock.running = None
    update([transform for transform in together if is_due(transform.clock.batch, transform.update_interval)])


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
    """Close the windows of the transforms' statistics, and refresh what follows, with the processes that share them.

    What of which nothing is new anywhere stays as it is, unless its method comes nearer at every refresh.
    """
    together: dict[ProcessGroup | None, list[tuple[GradientTransform, FeatureCovariance]]] = defaultdict(list)
    for transform in sorted(transforms, key=lambda transform: int(transform.handle)):
        for average in transform.averages():
            together[transform.clock.processes.group()].append((transform, average))
    for group, due in together.items():
        is_wanted = [average.window is not None or average.is_approximate for _, average in due]
        if group is not None:
            is_wanted = distributed.agree("refresh", [_label(*pair) for pair in due], is_wanted, group)
        wanted = [pair for pair, flag in zip(due, is_wanted, strict=True) if flag]
        if group is not None:
            distributed.merge_windows([average for _, average in wanted], group)
        for transform, average in wanted:
            batch = transform.clock.batch
            average.close_window(batch - last_due(batch - 1, transform.update_interval))
        refresh([average for _, average in wanted if isinstance(average, WhiteningFactor)], group)
        for _, average in wanted:
            if isinstance(average, SettledCovariance):
                average.settle()


def _label(transform: "GradientTransform", average: FeatureCovariance) -> str:
    """What a message calls an average, and what has to be the same on all processes."""
    name = transform.name or f"a {type(transform).__name__} without a name"
    number, features = average.running_mean.shape
    kind = type(average).__name__.lower()
    if isinstance(average, WhiteningFactor):
        features, kind = average.features, average.method
    groups = f"{number} × " if number > 1 else ""
    return f"{name} ({groups}{features} features, {kind}) at batch {transform.clock.batch}"


@torch.no_grad()
def refresh(factors: Iterable[WhiteningFactor], group: "ProcessGroup | None" = None) -> None:
    """Bring what is in force up to the running covariance of every factor, in a group each process its share."""
    factors = list(factors)
    if group is None:
        for factor, outcome in inverted(factors):
            factor.install(outcome)
        return
    owners = dict(zip(factors, distributed.share([cost(factor) for factor in factors], group.size()), strict=True))
    own = dict(inverted(factor for factor in factors if owners[factor] == group.rank()))
    for factor, outcome in distributed.exchange(own, owners, group):
        factor.install(outcome)


def cost(factor: WhiteningFactor) -> int:
    """Operations of a factor's inverses, roughly."""
    matrices, size = factor.mean.shape
    return METHODS[factor.method].operations * matrices * size**2 * (factor.rank if factor.is_approximate else size)


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
