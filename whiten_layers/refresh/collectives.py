"""Refreshes by several processes: they share the statistics, and each computes a part of the inverses.

Process r has a window of nᵣ rows with mean mᵣ and covariance Cᵣ. With N = Σ nᵣ the rows of all have

    m = Σ nᵣ mᵣ / N        C = Σ nᵣ/N (Cᵣ + (mᵣ − m)(mᵣ − m)ᵀ)

which takes one sum of ``nᵣ`` and ``nᵣ mᵣ``, and, once m is known, one of triangles: rounding is that of a
mean, never of a square about zero. Every process closes the same window, so all have the same
statistics, in the same bits. Then each inverts its share of the matrices and sends the results to the others.

Nothing is sent in other passes: what is due follows from a number that all processes count alike (`schedule`).
"""

import functools
import hashlib
import heapq
import operator
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from .._torch.distributed import timeout_of
from ..processes import ProcessGroup
from ..statistics.covariance import FeatureCovariance, Moments, zero_moments
from ..statistics.whitening_factor import RefreshResult, WhiteningFactor

S = TypeVar("S", bound=FeatureCovariance)

_control_groups: WeakKeyDictionary[ProcessGroup, ProcessGroup] = WeakKeyDictionary()


def check_ranks_agree(doing: str, labels: Sequence[str], wanted: Sequence[bool], group: ProcessGroup) -> list[bool]:
    """Check that all processes are about to do something with the same things; return which of them any wants.

    Args:
        doing: a verb, for messages.
        labels: names of the things.
        wanted: which of them this process wants; the others may be left out if no process wants them.
        group: the processes.

    Raises:
        RuntimeError: on every process, if the things are not the same; on the others, if a process does not
            come within the group's timeout. The message names the things.
    """
    digest = int.from_bytes(hashlib.sha256("\n".join(labels).encode()).digest()[:7])
    digests = torch.tensor([digest, -digest])
    try:
        control = _control_group(group)
        dist.all_reduce(digests, dist.ReduceOp.MAX, control)
    except RuntimeError as error:
        raise RuntimeError(
            f"rank {dist.get_rank(group)} is to {doing} {_listed(labels)}, and another rank has not come: it has run "
            f"fewer or more backward passes that reach a whitened layer, or has ended ({error})"
        ) from error
    if digests[0] != -digests[1]:
        raise RuntimeError(_disagreement(doing, labels, control))
    flags = torch.tensor(wanted, dtype=torch.uint8)
    if wanted:
        dist.all_reduce(flags, dist.ReduceOp.MAX, control)
    return flags.bool().tolist()


def _disagreement(doing: str, labels: Sequence[str], group: ProcessGroup) -> str:
    everyone: list[list[str]] = [[] for _ in range(dist.get_world_size(group))]
    dist.all_gather_object(everyone, list(labels), group)
    common = functools.reduce(operator.and_, map(Counter, everyone))
    others = [list((Counter(labels) - common).elements()) for labels in everyone]
    listed = "; ".join(f"rank {rank}: {_listed(own)}" for rank, own in enumerate(others))
    return (
        f"the ranks are to {doing} different things, beside {common.total()} that all have in common: {listed}. "
        "In every backward pass each rank is to reach a whitened layer of the model; the others stay in sync after "
        "whiten(model). Ranks that train models of their own need a process_group each"
    )


def _listed(labels: Sequence[str]) -> str:
    more = [f"and {len(labels) - 12} more"] if len(labels) > 12 else []
    return ", ".join([*labels[:12], *more]) or "nothing"


def _control_group(group: ProcessGroup) -> ProcessGroup:
    """Return a group beside a group, for agreements: numbers on the CPU, to be read at once.

    A process that has gone on to send something else, gradients for instance, must not be mistaken for one that agrees.
    """
    if group not in _control_groups:
        is_whole = group == dist.group.WORLD
        ranks = None if is_whole else dist.get_process_group_ranks(group)
        beside: Any = dist.new_group(ranks, timeout_of(group), "gloo", use_local_synchronization=not is_whole)
        _control_groups[group] = beside
    return _control_groups[group]


def merge_windows(statistics: Iterable[FeatureCovariance], group: ProcessGroup) -> None:
    """Give all statistics, on every process, the window of all processes' rows."""
    for bucket in _alike(statistics):
        windows = [one.window or zero_moments(one.running_mean) for one in bucket]
        sums = _flat([part for one in windows for part in (*one[:2], one.rows[:, None] * one.mean)])
        dist.all_reduce(sums, group=group)
        totals = _cut(sums, [part for window in windows for part in window[:3]])
        triangles = []
        for window, rows, total in zip(windows, totals[::3], totals[2::3], strict=True):
            part = torch.where(rows > 0, window.rows / rows, 0)
            total /= torch.where(rows > 0, rows, 1)[:, None]  # now the mean of all
            shift = window.mean - total
            between = part[:, None, None] * shift[:, :, None] * shift[:, None, :]
            triangles.append(triangle(torch.addcmul(between, part[:, None, None], window.covariance)))
        flat = _flat(triangles)
        dist.all_reduce(flat, group=group)
        covariances = _cut(flat, triangles)
        for one, rows, effective, mean, covariance in zip(
            bucket, totals[::3], totals[1::3], totals[2::3], covariances, strict=True
        ):
            one.window = Moments(rows, effective, mean, symmetric(covariance))


def share(costs: Sequence[float], processes: int) -> list[int]:
    """Deal out work: the costliest first, each to the process with the least to do. The same on every process."""
    owners, loads = [0] * len(costs), [(0.0, process) for process in range(processes)]  # a heap
    for index in sorted(range(len(costs)), key=lambda index: -costs[index]):
        load, owners[index] = loads[0]
        heapq.heapreplace(loads, (load + costs[index], owners[index]))
    return owners


def exchange(
    results: dict[WhiteningFactor, RefreshResult], owners: dict[WhiteningFactor, int], group: ProcessGroup
) -> Iterator[tuple[WhiteningFactor, RefreshResult]]:
    """Send and receive results; yield every factor with its own, in the same bits on every process.

    `results` has those of the factors that this process owns. One message is sent for each owner (and type of
    numbers), all at the same time.
    """
    rank, sent = dist.get_rank(group), []
    for owner in sorted(set(owners.values())):
        for bucket in _alike(factor for factor in owners if owners[factor] == owner):
            if owner == rank:
                flat = _flat([part for factor in bucket for part in _packed(factor, results[factor])])
            else:
                example = bucket[0].running_covariance
                flat = example.new_empty(sum(part.numel() for factor in bucket for part in packed_shapes(factor)))
            source = dist.get_global_rank(group, owner)
            work: Any = dist.broadcast(flat, source, group=group, async_op=True)
            sent.append((bucket, flat, work))
    for bucket, flat, work in sent:
        work.wait()
        wanted = [packed_shapes(factor) for factor in bucket]
        parts = iter(_cut(flat, [part for shapes in wanted for part in shapes]))
        for factor, shapes in zip(bucket, wanted, strict=True):
            yield factor, _unpacked(factor, [next(parts) for _ in shapes])


def _packed(factor: WhiteningFactor, result: RefreshResult) -> list[Tensor]:
    flags = [flag.to(result.scale.dtype) for flag in (result.attempt, result.restarted)]
    directions = [] if result.directions is None else [result.directions]
    precision = triangle(result.precision) if factor.is_symmetric else result.precision
    return [*flags, result.scale, precision, *directions]


def packed_shapes(factor: WhiteningFactor) -> list[Tensor]:
    """Make tensors, without memory, of the shapes in which a factor's result is sent."""
    matrices, size = factor.mean.shape
    numbers = (size * (size + 1) // 2,) if factor.is_symmetric else (size, size)
    shapes: list[tuple[int, ...]] = [(matrices,)] * 3 + [(matrices, *numbers)]
    if factor.directions is not None:
        shapes.append(tuple(factor.directions.shape))
    return [torch.empty(shape, device="meta") for shape in shapes]


def _unpacked(factor: WhiteningFactor, parts: list[Tensor]) -> RefreshResult:
    attempt, restarted, scale, precision, *directions = parts
    precision = symmetric(precision) if factor.is_symmetric else precision
    return RefreshResult(attempt.int(), restarted.bool(), scale, precision, *directions)


# A symmetric matrix of M = m + n features, n = m or m + 1, falls into A (m, m), B (m, n), D (n, n). The upper triangle
# of A and the lower one of D, each with its diagonal, fit together into (n, m + 1): with B, M (M + 1) / 2 numbers, all
# moved in blocks. Picking them one by one, by their indices, is slower by a multiple.


def triangle(matrices: Tensor) -> Tensor:
    """Pack the triangles of symmetric matrices: ``(n, M, M) -> (n, M (M + 1) / 2)``."""
    half, number = matrices.shape[-1] // 2, len(matrices)
    rest = matrices.shape[-1] - half
    both = F.pad(matrices[:, half:, half:].tril(), (0, half + 1 - rest))
    both[:, :half, 1:] += matrices[:, :half, :half].triu()
    return torch.cat([matrices[:, :half, half:].reshape(number, -1), both.view(number, -1)], 1)


def symmetric(triangle: Tensor) -> Tensor:
    """Unpack a `triangle` into matrices that are symmetric to the last bit."""
    size = int((2 * triangle.shape[1]) ** 0.5)  # M² < M (M + 1) < (M + 1)²
    half, number = size // 2, len(triangle)
    rest = size - half
    across, both = triangle.split([half * rest, rest * (half + 1)], 1)
    both = both.view(number, rest, half + 1)
    upper, lower = both[:, :half, 1:].triu(), both[:, :, :rest].tril()
    matrices = triangle.new_empty(number, size, size)
    matrices[:, :half, :half] = upper + upper.triu(1).mT
    matrices[:, half:, half:] = lower + lower.tril(-1).mT
    matrices[:, :half, half:] = across.view(number, half, rest)
    matrices[:, half:, :half] = across.view(number, half, rest).mT
    return matrices


def _alike(statistics: Iterable[S]) -> list[list[S]]:
    """Sort statistics into buckets of one type of numbers and one device, keeping their order."""
    buckets = defaultdict(list)
    for one in statistics:
        buckets[one.running_mean.dtype, one.running_mean.device].append(one)
    return list(buckets.values())


def _flat(parts: list[Tensor]) -> Tensor:
    return torch.cat([part.flatten() for part in parts])


def _cut(flat: Tensor, like: list[Tensor]) -> list[Tensor]:
    ends = accumulate((part.numel() for part in like), initial=0)
    return [flat[a:b].view(part.shape) for (a, b), part in zip(pairwise(ends), like, strict=True)]
