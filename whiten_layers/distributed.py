"""Processes that train one model: statistics in common, and every process a share of the inverses.

Process r has a window of nᵣ rows with mean mᵣ and covariance Cᵣ. With N = Σ nᵣ the rows of all have

    m = Σ nᵣ mᵣ / N        C = Σ nᵣ/N (Cᵣ + (mᵣ − m)(mᵣ − m)ᵀ)

which takes one sum of ``nᵣ`` and ``nᵣ mᵣ``, and, once m is known, one of upper triangles: rounding is that of a
mean, never of a square about zero. Every process closes the same window, so all have the same
statistics, in the same bits. Then each inverts its share of the matrices and sends what came of it to the others.

Nothing is sent in other passes. What is due follows from a clock that all processes have in common.
"""

from __future__ import annotations

import functools
import hashlib
import heapq
import operator
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from .clock import Clock
from .covariance import Moments, zero_moments
from .factor import Outcome, WhiteningFactor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_control_groups: dict[ProcessGroup, ProcessGroup] = {}


def group_of(clock: Clock) -> ProcessGroup | None:
    """The processes that share a clock's statistics; None where this one is alone."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    group = clock.process_group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


def agree(labels: Sequence[str], wanted: Sequence[bool], group: ProcessGroup) -> list[bool]:
    """What any process wants of the things that are due, after making sure that all mean the same things.

    Raises:
        RuntimeError: on every process, if they are not the same; on the others, if a process does not
            come within the group's timeout. The message names the things.
    """
    control = _control_group(group)
    digest = int.from_bytes(hashlib.sha256("\n".join(labels).encode()).digest()[:7])
    digests = torch.tensor([digest, -digest])
    try:
        dist.all_reduce(digests, dist.ReduceOp.MAX, control)
    except RuntimeError as error:
        raise RuntimeError(
            f"rank {dist.get_rank(group)} is to refresh {_listed(labels)}, and another rank has not come: "
            f"it has run fewer or more backward passes, or has ended ({error})"
        ) from error
    if digests[0] != -digests[1]:
        raise RuntimeError(_disagreement(labels, control))
    flags = torch.tensor(wanted, dtype=torch.uint8)
    dist.all_reduce(flags, dist.ReduceOp.MAX, control)
    return flags.bool().tolist()


def _disagreement(labels: Sequence[str], group: ProcessGroup) -> str:
    everyone: list[list[str]] = [[] for _ in range(dist.get_world_size(group))]
    dist.all_gather_object(everyone, list(labels), group)
    common = functools.reduce(operator.and_, map(Counter, everyone))
    others = [list((Counter(labels) - common).elements()) for labels in everyone]
    listed = "; ".join(f"rank {rank}: {_listed(own)}" for rank, own in enumerate(others))
    return (
        f"the ranks are to refresh different things, beside {common.total()} that all have in common: {listed}. Every "
        "rank runs as many backward passes; layers that some passes leave out keep step after whiten(model)"
    )


def _listed(labels: Sequence[str]) -> str:
    more = [f"and {len(labels) - 12} more"] if len(labels) > 12 else []
    return ", ".join([*labels[:12], *more]) or "nothing"


def _control_group(group: ProcessGroup) -> ProcessGroup:
    """A group for numbers on the CPU, to be read at once: the group itself, or one beside it if it knows only GPUs."""
    if _serves_cpu(group):
        return group
    if group not in _control_groups:
        timeout = group._get_backend(group._device_types[0]).options._timeout
        ranks = dist.get_process_group_ranks(group)
        beside: Any = dist.new_group(ranks, timeout, "gloo", use_local_synchronization=True)
        _control_groups[group] = beside
    return _control_groups[group]


def _serves_cpu(group: ProcessGroup) -> bool:
    return torch.device("cpu") in group._device_types


def merge_windows(factors: Iterable[WhiteningFactor], group: ProcessGroup) -> None:
    """Give every factor, on every process, the window of all their rows."""
    for bucket in _alike(factors):
        windows = [factor.window or zero_moments(factor.running_mean) for factor in bucket]
        sums = _flat([part for window in windows for part in (window.rows, window.rows[:, None] * window.mean)])
        dist.all_reduce(sums, group=group)
        totals = _cut(sums, [part for window in windows for part in (window.rows, window.mean)])
        triangles = []
        for window, rows, total in zip(windows, totals[::2], totals[1::2], strict=True):
            share = torch.where(rows > 0, window.rows / rows, 0)
            total /= torch.where(rows > 0, rows, 1)[:, None]  # now the mean of all
            shift = window.mean - total
            between = share[:, None, None] * shift[:, :, None] * shift[:, None, :]
            triangles.append(triangle(torch.addcmul(between, share[:, None, None], window.covariance)))
        flat = _flat(triangles)
        dist.all_reduce(flat, group=group)
        covariances = _cut(flat, triangles)
        for factor, rows, mean, covariance in zip(bucket, totals[::2], totals[1::2], covariances, strict=True):
            factor.window = Moments(rows, mean, symmetric(covariance))


def share(costs: Sequence[float], processes: int) -> list[int]:
    """Who does what: the costliest first, each to the process that has least to do. The same on every process."""
    owners, loads = [0] * len(costs), [(0.0, process) for process in range(processes)]  # a heap
    for index in sorted(range(len(costs)), key=lambda index: -costs[index]):
        load, owners[index] = loads[0]
        heapq.heapreplace(loads, (load + costs[index], owners[index]))
    return owners


def exchange(
    outcomes: dict[WhiteningFactor, Outcome], owners: dict[WhiteningFactor, int], group: ProcessGroup
) -> Iterator[tuple[WhiteningFactor, Outcome]]:
    """Every factor with its outcome, in the same bits on every process; `outcomes` has those that this one owns.

    One message for each owner (and type of numbers), all under way at once.
    """
    rank, sent = dist.get_rank(group), []
    for owner in sorted(set(owners.values())):
        for bucket in _alike(factor for factor in owners if owners[factor] == owner):
            if owner == rank:
                flat = _flat([part for factor in bucket for part in _packed(outcomes[factor])])
            else:
                example = bucket[0].running_covariance
                flat = example.new_empty(sum(part.numel() for factor in bucket for part in expected(factor)))
            source = dist.get_global_rank(group, owner)
            work: Any = dist.broadcast(flat, source, group=group, async_op=True)
            sent.append((bucket, flat, work))
    for bucket, flat, work in sent:
        work.wait()
        wanted = [expected(factor) for factor in bucket]
        parts = iter(_cut(flat, [part for shapes in wanted for part in shapes]))
        for factor, shapes in zip(bucket, wanted, strict=True):
            yield factor, _unpacked([next(parts) for _ in shapes])


def _packed(outcome: Outcome) -> list[Tensor]:
    flags = [flag.to(outcome.scale.dtype) for flag in (outcome.valid, outcome.restarted)]
    directions = [] if outcome.directions is None else [outcome.directions]
    return [*flags, outcome.scale, triangle(outcome.precision), *directions]


def expected(factor: WhiteningFactor) -> list[Tensor]:
    """Tensors, without memory, of the shapes of a factor's packed outcome."""
    matrices, size = factor.mean.shape
    shapes: list[tuple[int, ...]] = [(matrices,)] * 3 + [(matrices, size * (size + 1) // 2)]
    if factor.directions is not None:
        shapes.append(tuple(factor.directions.shape))
    return [torch.empty(shape, device="meta") for shape in shapes]


def _unpacked(parts: list[Tensor]) -> Outcome:
    valid, restarted, scale, precision, *directions = parts
    return Outcome(valid.bool(), restarted.bool(), scale, symmetric(precision), *directions)


def triangle(matrices: Tensor) -> Tensor:
    """The upper triangles of symmetric matrices: ``(n, M, M) -> (n, M (M + 1) / 2)``."""
    rows, columns = torch.triu_indices(*matrices.shape[1:], device=matrices.device)
    return matrices[:, rows, columns]


def symmetric(triangle: Tensor) -> Tensor:
    """The inverse of `triangle`, symmetric to the last bit."""
    size = int((2 * triangle.shape[1]) ** 0.5)  # M² < M (M + 1) < (M + 1)²
    rows, columns = torch.triu_indices(size, size, device=triangle.device)
    matrices = triangle.new_empty(len(triangle), size, size)
    matrices[:, rows, columns] = triangle
    matrices[:, columns, rows] = triangle
    return matrices


def _alike(factors: Iterable[WhiteningFactor]) -> list[list[WhiteningFactor]]:
    """Factors whose numbers fit into one bucket, in their order."""
    buckets = defaultdict(list)
    for factor in factors:
        buckets[factor.running_mean.dtype, factor.running_mean.device].append(factor)
    return list(buckets.values())


def _flat(parts: list[Tensor]) -> Tensor:
    return torch.cat([part.flatten() for part in parts])


def _cut(flat: Tensor, like: list[Tensor]) -> list[Tensor]:
    ends = accumulate((part.numel() for part in like), initial=0)
    return [flat[a:b].view(part.shape) for (a, b), part in zip(pairwise(ends), like, strict=True)]
