"""Inverting covariances when a backward pass has ended, all that are due together.

Nothing may change in the middle of a pass: a layer that is due only signs up here. The autograd
engine calls back when the pass is over, and then matrices of one size are inverted in one batched
call and written in place, in force from the next pass on.
"""

import sys
from collections import defaultdict
from collections.abc import Iterable
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from .beneath import beneath
from .factor import WhiteningFactor
from .inverse import METHODS, Inverse
from .numerics import full_precision, without_autocast

# The factors that are due when a backward pass ends, each once, by the pass's number. A pass that
# ends in an error never calls back; weak references keep no model alive for it.
_due: dict[int, WeakValueDictionary[int, WhiteningFactor]] = {}


def request(factors: Iterable[WhiteningFactor]) -> None:
    """Refresh `factors` when the backward pass that is running has ended; at once where none calls back."""
    task = torch._C._current_graph_task_id()
    if task == -1 or _is_autograd_compiled():
        refresh(factors)
        return
    if task not in _due:
        _due[task] = WeakValueDictionary()
        torch.autograd.Variable._execution_engine.queue_callback(
            lambda: beneath(lambda: refresh(list(_due.pop(task).values())))
        )
    _due[task].update((id(factor), factor) for factor in factors)


def _is_autograd_compiled() -> bool:
    """Whether a compiled autograd runs the pass, which drops callbacks that it has not seen when it was compiled."""
    module = sys.modules.get("torch._dynamo.compiled_autograd")  # whoever uses it has imported it
    return module is not None and module.in_compiled_autograd_region


@torch.no_grad()
def refresh(factors: Iterable[WhiteningFactor]) -> None:
    """Bring the precision of every factor up to its running covariance, one batched call for each matrix size."""
    alike = defaultdict(list)
    for factor in factors:
        covariance = factor.running_covariance
        size, rank = covariance.shape[-1], factor.rank if METHODS[factor.method].is_approximate else None
        alike[factor.method, factor.power, size, rank, covariance.dtype, covariance.device].append(factor)
    for (name, power, *_, device), group in alike.items():
        method = METHODS[name]
        with full_precision(), without_autocast(device):
            covariances = _together([factor.damped() for factor in group])
            warm = method.warm_powers is None or power in method.warm_powers
            last = _gathered([factor.last() for factor in group]) if warm else None
            inverses = method.inverse(covariances, power, last, group[0].rank)
            for factor, part in zip(group, _dealt(inverses, [len(factor.scale) for factor in group]), strict=True):
                factor.install(part)


def _together(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)  # of one large matrix no copy


def _gathered(parts: list[Inverse]) -> Inverse:
    directions = [part.directions for part in parts if part.directions is not None]
    return Inverse(_together([part.matrix for part in parts]), _together(directions) if directions else None)


def _dealt(inverses: Inverse, counts: list[int]) -> list[Inverse]:
    fields = [[None] * len(counts) if field is None else field.split(counts) for field in inverses]
    return [Inverse(*parts) for parts in zip(*fields, strict=True)]


def is_due(batch: int, interval: int) -> bool:
    """Whether to refresh after the `batch`-th batch, counted from 1.

    After 1, 2, 4, 8, … up to the largest power of two within `interval`, so that the first steps
    are whitened too, and every `interval` batches from there.
    """
    early = 1 << (interval.bit_length() - 1)
    if batch <= early:
        return batch & (batch - 1) == 0
    return (batch - early) % interval == 0
