"""Counts the backward passes of a model, knows which layers have come, and decides what is due.

A *pass* is one run of autograd's engine. All layers of a model that come in one pass bring one *batch*, and share its
number, however often each is called: statistics or a refresh are *due* at batches 1, 2, 4, 8, … and then at the
multiples of an interval. Since the number alone decides, layers that some passes skip stay in sync with the others,
and processes that train one model together agree about what is due without asking each other.

Nothing that a gradient is multiplied by may change in the middle of a pass. A layer's backward therefore tells the
schedule when its batch begins (`begin_batch`) and when it has been observed (`end_batch`), and the refresh follows when
the engine calls back at the end of the pass; at once only where no pass runs that could call back.
"""

import copy
import threading
import weakref
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from functools import lru_cache
from typing import Any, Literal, Protocol, Self

from torch import Tensor, nn

from .._torch.engine import call_at_end_of_pass, current_pass, is_nested_pass
from ..processes import Processes, ProcessGroup
from ..state import safe_to_load
from ..statistics.covariance import FeatureCovariance, SolvedStatistics
from ..statistics.whitening_factor import WhiteningFactor
from .collectives import share
from .update import DueTransform, cost, refresh_transforms

Interval = int | Literal["auto"]
REFRESHES, STATISTICS = 10, 1  # batches from one to the next, at first, with the interval "auto"
# Batches from which on both come so many times as rarely: the statistics of a memory of a hundred batches are a hundred
# batches old on the mean, so that thirty more make little difference, and enough rows are known by then.
RARER = ((0, 1), (500, 2), (1000, 4))
LONG, TURNS = RARER[-1]  # batches after which nothing becomes rarer


@lru_cache  # every layer asks at every step
def last_due(batch: int, interval: int) -> int:
    """Return the last batch, up to this one, at which something with this interval was due; 0 for none.

    Due are batches 1, 2, 4, 8, … below the interval, where statistics change fast, and then one of every `interval`
    batches, in a place that looks random: with a fixed place, a loop whose period divides the interval (a GAN's
    two passes, accumulation, tasks that take turns) would only ever be seen in one phase. The places depend on
    nothing but the batch's number and the interval, so they are the same in every process and every run.
    """
    if batch < interval:
        return (1 << batch.bit_length()) >> 1
    stretch = batch // interval
    due = stretch * interval + _scatter(stretch) % interval
    return due if due <= batch else last_due(stretch * interval - 1, interval)


def _times_as_rarely(batch: int) -> int:
    return next(times for start, times in reversed(RARER) if batch >= start)


@lru_cache
def last_refresh(batch: int, interval: Interval, turn: int = 0) -> int:
    """Return the last batch, up to this one, after which a refresh with this interval was due; 0 for none.

    With "auto" something is refreshed every ten batches throughout. Where a layer's refreshes are rarer, layers take
    turns, so that no step is much slower than others. `turn` is the layer's, 0 to 3.
    """
    if interval != "auto":
        return last_due(batch, interval)
    due = last_due(batch, REFRESHES)
    while (due // REFRESHES - turn) % _times_as_rarely(due):
        due = last_due(due - 1, REFRESHES)
    return due


@lru_cache
def last_observed(batch: int, interval: Interval) -> int:
    """Return the last batch, up to this one, that statistics with this interval are taken of; 0 for none."""
    if interval != "auto":
        return last_due(batch, interval)
    start, times = next((start, times) for start, times in reversed(RARER) if batch >= start)
    due = last_due(batch, STATISTICS * times)
    return due if due >= start else last_observed(start - 1, interval)


def interval_at(batch: int, interval: Interval, first: int) -> int:
    """Return how many batches lie between two when so many have come; with "auto" `first` of them, later more."""
    return first * _times_as_rarely(batch) if interval == "auto" else interval


def refresh_interval(batch: int, interval: Interval) -> int:
    """Return how many batches there are from one refresh to the next, on the mean, when so many have come."""
    return interval_at(batch, interval, REFRESHES)


@lru_cache
def observation_interval(batch: int, interval: Interval) -> int:
    """Return how many batches there are from one that is observed to the next, on the mean, when so many have come."""
    return interval_at(batch, interval, STATISTICS)


def _scatter(number: int) -> int:
    """Turn a number into one of 32 bits that looks random (the finaliser of MurmurHash3, by Austin Appleby)."""
    for factor, shift in ((0x85EBCA6B, 16), (0xC2B2AE35, 13), (1, 16)):
        number = (number ^ (number >> shift)) * factor & 0xFFFFFFFF
    return number


def is_due(batch: int, interval: int) -> bool:
    """Tell whether something that happens every `interval` batches is due after the `batch`-th, counted from 1."""
    return last_due(batch, interval) == batch


class Arrival(Enum):
    """Ways in which a layer's batch arrives at the schedule."""

    IN_KNOWN_PASS = auto()  # the layer, or another of the model's, came in this pass before
    IN_NEW_PASS = auto()  # the first layer of the model in a pass that calls back at its end
    IN_NESTED_PASS = auto()  # in a pass inside another, as of a reentrant checkpoint, or without any pass


@safe_to_load
@dataclass
class Attendance:
    """Notes of a schedule about one layer: numbers of batches, and the engine's number of the last pass."""

    batch: int = 0  # the last one that reached the layer
    observed: int = 0  # the last one that it observed, or should have observed
    engine_pass: int | None = None
    is_announced: bool = False  # outside of a pass: the output's gradient has come, the weight's will follow

    def leave_pass(self) -> None:
        """Forget the pass: its number means nothing in another process, or after a reset."""
        self.engine_pass, self.is_announced = None, False


class Scheduled(Protocol):
    """Interface of a layer's gradient transform towards its schedule."""

    name: str
    handle: Tensor  # a number by which transforms have the same order on every process
    schedule: "Schedule"
    attendance: Attendance
    update_interval: Interval
    statistics_interval: Interval

    def children(self) -> Iterator[nn.Module]:
        """Iterate over the transform's child modules, among them its statistics."""


def running_statistics(transform: Scheduled) -> list[FeatureCovariance]:
    """List the children of a transform that a refresh renews."""
    return [child for child in transform.children() if isinstance(child, FeatureCovariance)]


def refreshed_at(batch: int, transform: Scheduled, turn: int) -> dict[int, list[FeatureCovariance]]:
    """Find the children of a transform that the refresh after a batch renews, by the batches since their last one.

    Those from which no matrix is inverted cost little, and with the interval "auto" become no rarer.
    """
    due = defaultdict(list)
    for statistics in running_statistics(transform):
        stays = transform.update_interval == "auto" and isinstance(statistics, SolvedStatistics)
        interval = REFRESHES if stays else transform.update_interval
        if last_refresh(batch, interval, turn) == batch:
            due[batch - last_refresh(batch - 1, interval, turn)].append(statistics)
    return due


_arriving = threading.Lock()  # layers of a model that is spread over several devices come in several threads
# The schedules that the running passes will refresh. A pass that ends in an error never calls back: weak
# references keep nothing alive for it.
_open_passes: dict[int, "weakref.WeakSet[Schedule]"] = {}


@safe_to_load
class Schedule:
    """Counts a model's backward passes, and refreshes the layers' transforms when they are due.

    Attributes:
        batch: number of the current batch, counted from 1; 0 before the first.
        processes: the processes that train the model together.
    """

    def __init__(self, process_group: ProcessGroup | None = None) -> None:
        self.batch = 0
        self.processes = Processes(process_group)
        self._open_pass: int | None = None  # the engine's number of the pass that this batch comes in
        self._members: weakref.WeakSet[Scheduled] = weakref.WeakSet()

    def join(self, members: Iterable[Scheduled]) -> None:
        """Count for these transforms from now on, starting at the greatest number that any of them has reached.

        Without a group of processes of its own the schedule takes theirs.
        """
        for member in members:
            self.batch = max(self.batch, member.schedule.batch)
            self.processes.default_to(member.schedule.processes)
            member.schedule._members.discard(member)
            member.schedule = self
            self._members.add(member)

    def members(self) -> list[Scheduled]:
        """List the transforms that joined, in no order."""
        return list(self._members)

    def turns(self) -> dict[Scheduled, int]:
        """Deal out the members' inverses to turns, each of which takes about as long; the same on every process."""
        members = sorted(self.members(), key=lambda member: int(member.handle))
        costs = [
            sum(cost(factor) for factor in running_statistics(member) if isinstance(factor, WhiteningFactor))
            for member in members
        ]
        return dict(zip(members, share(costs, TURNS), strict=True))

    def begin_batch(self, member: Scheduled, announced: bool = False) -> int:
        """Note that a batch has come to a layer, and return the batch's number.

        Args:
            member: the layer's transform.
            announced: whether it is the gradient of the layer's output that has come, ahead of the weight's.
        """
        attendance = member.attendance
        if self._open_pass is not None and self._open_pass == (number := current_pass()):  # all layers but the first
            attendance.batch, attendance.engine_pass, attendance.is_announced = self.batch, number, False
            return self.batch
        with _arriving:
            arrival, number = self._arrival(attendance)
            if arrival is Arrival.IN_NEW_PASS and number is not None:
                self.batch, self._open_pass = self.batch + 1, number
                _open_passes.setdefault(number, weakref.WeakSet()).add(self)
                call_at_end_of_pass(number, _end_pass)
            elif arrival is Arrival.IN_NESTED_PASS and self._open_pass is None and attendance.batch == self.batch:
                self.batch += 1  # the layer has been at the current batch already, so this is another one
            attendance.batch, attendance.engine_pass = self.batch, number
            attendance.is_announced = announced and number is None
            return self.batch

    def _arrival(self, attendance: Attendance) -> tuple[Arrival, int | None]:
        """Tell how a layer's batch comes, and in which of the engine's passes; None where none calls back."""
        number = current_pass()
        if attendance.is_announced or (number is not None and number in (attendance.engine_pass, self._open_pass)):
            return Arrival.IN_KNOWN_PASS, number
        if number is None or is_nested_pass():
            return Arrival.IN_NESTED_PASS, number
        return Arrival.IN_NEW_PASS, number

    def statistics_are_due(self, member: Scheduled) -> bool:
        """Tell whether a layer observes the current batch: statistics are due, or it has missed the last time.

        The answer stays the same at every further call of the layer in one pass.
        """
        attendance = member.attendance
        # Later than now: the number was set back, by the reset or the checkpoint of a layer that shares it.
        if not last_observed(self.batch, member.statistics_interval) <= attendance.observed <= self.batch:
            attendance.observed = self.batch
        return attendance.observed == self.batch

    def end_batch(self, member: Scheduled) -> None:
        """Note that a layer has observed its batch. Its refresh, if due, follows at the end of the pass, or at once."""
        number = member.attendance.engine_pass
        if number is not None and number == self._open_pass:  # all that is due follows when it ends, as in most passes
            return
        if not self._refresh_is_due(member.update_interval):
            return
        number = current_pass()
        if number is None:
            _refresh([member])
        elif self._open_pass is None:  # nested, and the pass around it is not known
            _open_passes.setdefault(number, weakref.WeakSet()).add(self)
            call_at_end_of_pass(number, _end_pass)

    def close_pass(self, number: int) -> list[Scheduled]:
        """End a pass and return the members whose refresh is due; of a nested pass, only those that it reached."""
        is_known, self._open_pass = self._open_pass is not None, None
        together = [one for one in self.members() if is_known or one.attendance.engine_pass == number]
        due = {interval: self._refresh_is_due(interval) for interval in {one.update_interval for one in together}}
        return [one for one in together if due[one.update_interval]]

    def _refresh_is_due(self, interval: Interval) -> bool:
        """Tell whether anything with this interval is renewed after the current batch; see `refreshed_at`."""
        return is_due(self.batch, REFRESHES if interval == "auto" else interval)

    def reset(self, member: Scheduled) -> None:
        """Count from the start again, when a layer's state is reset."""
        self.restore(member, [0, 0, 0])

    def state(self, member: Scheduled) -> list[int]:
        """Return what a checkpoint keeps for a layer, for `restore`."""
        return [self.batch, member.attendance.batch, member.attendance.observed]

    def restore(self, member: Scheduled, state: list[int]) -> None:
        """Set a layer's numbers, and the schedule's own, to a `state`."""
        self.batch, member.attendance.batch, member.attendance.observed = state
        self._open_pass = None
        member.attendance.leave_pass()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Make a schedule at the same number; the copied transforms join it themselves."""
        copied = type(self)()
        copied.batch, copied.processes = self.batch, copy.deepcopy(self.processes)
        return copied

    def __getstate__(self) -> dict[str, Any]:
        return {"batch": self.batch}  # a group of processes cannot be pickled

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]
        self.batch = state["batch"]


def _end_pass(number: int) -> None:
    _refresh([member for schedule in _open_passes.pop(number) for member in schedule.close_pass(number)])


def _refresh(members: Sequence[Scheduled]) -> None:
    """Refresh transforms together, those of one group of processes at a time, in the same order on every process."""
    together: dict[ProcessGroup | None, list[DueTransform]] = defaultdict(list)
    schedules = {member.schedule for member in members if _times_as_rarely(member.schedule.batch) > 1}
    turns = {member: turn for schedule in schedules for member, turn in schedule.turns().items()}
    for member in sorted(members, key=lambda member: int(member.handle)):
        batch, turn = member.schedule.batch, turns.get(member, 0)
        for elapsed, statistics in refreshed_at(batch, member, turn).items():  # without any processes need not meet
            name = member.name or f"a {type(member).__name__} without a name"
            due = DueTransform(name, batch, elapsed, statistics)
            together[member.schedule.processes.group()].append(due)
    for group, due_transforms in together.items():
        refresh_transforms(due_transforms, group)
