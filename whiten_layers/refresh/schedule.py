"""Which backward pass this is, for layers that keep step.

What is due in a pass, statistics or a refresh, is decided by the number of the pass. Layers that are
trained together count on one clock, so that a layer that some passes leave out keeps step with the
others, and processes that train one model together agree about what is due without asking each other.
"""

import copy
import sys
import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Self

import torch

from ..processes import Processes

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from ..transforms.base import GradientTransform


class Clock:
    """The number of the pass for the transforms that joined, and the processes that they are trained in.

    `batch` counts backward passes from 1, however many of the transforms a pass reaches, and however often.
    """

    def __init__(self, process_group: "ProcessGroup | None" = None) -> None:
        self.batch = 0
        self.processes = Processes(process_group)
        self.running: int | None = None  # the pass that has not ended yet
        self._transforms: weakref.WeakSet[GradientTransform] = weakref.WeakSet()

    def join(self, transforms: "Iterable[GradientTransform]") -> None:
        """Let transforms keep step from now on, at the greatest number that any of them has reached.

        Without a group of processes of its own the clock takes theirs.
        """
        for transform in transforms:
            self.batch = max(self.batch, transform.clock.batch)
            self.processes.default_to(transform.clock.processes)
            transform.clock._transforms.discard(transform)
            transform.clock = self
            self._transforms.add(transform)

    def transforms(self) -> "list[GradientTransform]":
        """Those that joined, in no order."""
        return list(self._transforms)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A clock of its own at the same number; the copied transforms join it themselves."""
        copied = type(self)()
        copied.batch, copied.processes = self.batch, copy.deepcopy(self.processes)
        return copied

    def __getstate__(self) -> dict[str, Any]:
        return {"batch": self.batch}  # a group of processes cannot be pickled

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]
        self.batch = state["batch"]


def last_due(batch: int, interval: int) -> int:
    """The last batch up to this one after which something is due that is to happen every `interval` batches.

    Due are the batches 1, 2, 4, 8, … below the interval, so that the first steps are whitened too, and its multiples.
    """
    return (1 << batch.bit_length()) >> 1 if batch < interval else batch // interval * interval


def is_due(batch: int, interval: int) -> bool:
    """Whether something that is to happen every `interval` batches is due after the `batch`-th, counted from 1."""
    return last_due(batch, interval) == batch


def current_pass() -> int | None:
    """The number of the backward pass that is running; None where there is none that calls back at its end."""
    compiled = sys.modules.get("torch._dynamo.compiled_autograd")  # whoever uses it has imported it
    if compiled is not None and compiled.in_compiled_autograd_region:
        return None  # it drops callbacks that it has not seen when it was compiled
    task = torch._C._current_graph_task_id()
    return None if task == -1 else task


def is_within_another() -> bool:
    """Whether the pass that is running was started by a Function in another's backward: a reentrant checkpoint."""
    frame, functions = sys._getframe(), 0
    while frame is not None and functions < 2:  # ours is the first
        functions += frame.f_code is _BACKWARD
        frame = frame.f_back  # type: ignore[assignment]
    return functions == 2


_BACKWARD = torch.autograd.function.BackwardCFunction.apply.__code__  # what the engine calls of a Function
