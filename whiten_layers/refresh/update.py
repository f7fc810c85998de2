"""The refresh: closes windows of statistics, and computes from them what gradients are multiplied by.

All transforms that are due are refreshed together: matrices of one size are inverted in one batched call, and the
results are written in place. Processes that train one model do it together, each its share (`collectives`).
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import NamedTuple

import torch

from .._torch.precision import full_precision, without_autocast
from ..inverse import Inverse
from ..processes import ProcessGroup
from ..statistics.covariance import FeatureCovariance, SolvedStatistics
from ..statistics.whitening_factor import Damped, RefreshResult, WhiteningFactor
from . import collectives
from .rescue import rescued


class DueTransform(NamedTuple):
    """Transform to refresh: its layer's name, the batch's number, and the batches since its last refresh."""

    name: str
    batch: int
    elapsed: int
    statistics: Sequence[FeatureCovariance]


@torch.no_grad()
def refresh_transforms(due: Iterable[DueTransform], group: ProcessGroup | None = None) -> None:
    """Close the windows of transforms that are due, and refresh what follows, with the processes of a group.

    Where no process has observed anything new, statistics stay as they are, unless their method gets nearer to the
    exact result at every refresh.
    """
    pairs = [(transform, statistics) for transform in due for statistics in transform.statistics]
    if group is not None:
        labels = [_label(*pair) for pair in pairs]
        is_wanted = [one.window is not None or one.is_approximate for _, one in pairs]
        is_wanted = collectives.check_ranks_agree("refresh", labels, is_wanted, group)
        pairs = [pair for pair, flag in zip(pairs, is_wanted, strict=True) if flag]
        collectives.merge_windows([one for _, one in pairs], group)
    devices = {one.running_mean.device for _, one in pairs}
    names, solved = dict[WhiteningFactor, str](), defaultdict[tuple[type[SolvedStatistics], int], list](list)
    with full_precision(), ExitStack() as stack:
        for device in devices:
            stack.enter_context(without_autocast(device))
        for transform, one in pairs:
            if isinstance(one, SolvedStatistics):
                solved[type(one), transform.elapsed].append(one)
            elif (one.close_window(transform.elapsed) or one.is_approximate) and isinstance(one, WhiteningFactor):
                names[one] = transform.name
        refresh_factors(list(names), group, names)
        for (kind, elapsed), those in solved.items():
            kind.renew(those, elapsed)


def _label(transform: DueTransform, statistics: FeatureCovariance) -> str:
    """Describe statistics for messages, with everything that has to be the same on all processes."""
    number, features = statistics.running_mean.shape
    kind = type(statistics).__name__.lower()
    if isinstance(statistics, WhiteningFactor):
        features, kind = statistics.features, statistics.method
    groups = f"{number} × " if number > 1 else ""
    return f"{transform.name} ({groups}{features} features, {kind}) at batch {transform.batch}"


@torch.no_grad()
def refresh_factors(
    factors: Sequence[WhiteningFactor],
    group: ProcessGroup | None = None,
    names: Mapping[WhiteningFactor, str] | None = None,
) -> None:
    """Compute every factor's precision from its running covariance, in a group of processes each its share.

    Products are only as precise as the current settings say: see `full_precision`. Messages have the layers' `names`.
    """
    names = names or {factor: f"a layer of {factor.features} features" for factor in factors}
    if group is None:
        for factor, result in rescued(dict(invert(factors)), names).items():
            factor.commit(result)
        return
    owners = dict(zip(factors, collectives.share([cost(one) for one in factors], group.size()), strict=True))
    own = rescued(dict(invert([factor for factor in factors if owners[factor] == group.rank()])), names)
    for factor, result in collectives.exchange(own, owners, group):
        factor.commit(result)


def cost(factor: WhiteningFactor) -> int:
    """Estimate the operations of a factor's inverses, roughly."""
    matrices, size = factor.running_mean.shape
    return factor.inversion.operations * matrices * size**2 * (factor.rank if factor.is_approximate else size)


def invert(factors: Iterable[WhiteningFactor]) -> Iterator[tuple[WhiteningFactor, RefreshResult]]:
    """Compute each factor's new precision, with one batched call for each size of matrix."""
    alike = defaultdict(list)
    for factor in factors:
        covariance = factor.running_covariance
        size, rank = covariance.shape[-1], factor.rank if factor.is_approximate else None
        alike[factor.inversion, factor.power, size, rank, covariance.dtype, covariance.device].append(factor)
    for (method, power, *_), chosen in alike.items():
        counts = [len(factor.scale) for factor in chosen]
        matrices, diagonals, variances = zip(*[factor.damped() for factor in chosen], strict=True)
        # A single matrix may be large, and is not copied.
        together = matrices[0] if len(chosen) == 1 else torch.cat(matrices)
        del matrices
        is_warm = method.warm_powers is None or power in method.warm_powers
        warm_start = _gathered(list(map(WhiteningFactor.warm_start, chosen))) if is_warm else None
        inverses = method.inverse(*(together, power, warm_start, chosen[0].rank)[: method.arguments])
        parts = zip(chosen, _dealt(inverses, counts), together.split(counts), diagonals, variances, strict=True)
        yield from [(factor, factor.scale_inverse(part, Damped(*damped))) for factor, part, *damped in parts]


def _gathered(parts: list[Inverse]) -> Inverse:
    if len(parts) == 1:
        return parts[0]
    directions = [part.directions for part in parts if part.directions is not None]
    return Inverse(torch.cat([part.matrix for part in parts]), torch.cat(directions) if directions else None)


def _dealt(inverses: Inverse, counts: list[int]) -> list[Inverse]:
    if len(counts) == 1:
        return [inverses]
    fields = [[None] * len(counts) if field is None else field.split(counts) for field in inverses]
    return [Inverse(*parts) for parts in zip(*fields, strict=True)]
