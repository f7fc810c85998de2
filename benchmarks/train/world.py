"""The processes that train together, and the signals that stop them all at the same step."""

import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import Unusable

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """The rank of this process among those that torchrun started; without torchrun it is the only one."""

    rank: int
    local_rank: int
    size: int
    device: torch.device

    def together(self, action: Callable[[], T]) -> T:
        """Run an action in every process; if it fails in one of them, raise that error in all."""
        result, error = None, None
        try:
            result = action()
        except Unusable as caught:
            error = caught
        self.fail_together(error)
        return result  # type: ignore[return-value]

    def fail_together(self, error: Unusable | None) -> None:
        """Raise, in all processes, the error of the first one that has an error."""
        errors = [error]
        if self.size > 1:
            errors = [None] * self.size
            dist.all_gather_object(errors, error)
        for one in errors:
            if one is not None:
                raise one

    def alone_first(self, action: Callable[[], T]) -> T:
        """Run an action as `together` does, in the first process of each machine before the others."""
        result = self.together(lambda: action() if self.local_rank == 0 else None)
        return self.together(lambda: result if self.local_rank == 0 else action())  # type: ignore[return-value]

    def sum(self, values: Tensor) -> Tensor:
        """Sum values over all processes."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def gathered(self, value: T) -> list[T] | None:
        """Collect the values of all processes in the first one."""
        if self.size == 1:
            return [value]
        values: list[Any] | None = [None] * self.size if self.rank == 0 else None
        dist.gather_object(value, values)
        return values

    def follow_first(self, tensors: Iterable[Tensor]) -> None:
        """Copy the values of the first process to all."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)


@contextmanager
def join_world(device_option: str) -> Iterator[World]:
    """Join the processes that torchrun started.

    The group is left only where all processes leave it. A process that fails alone must not wait for the others, which
    torchrun ends.
    """
    on_gpu = device_option == "cuda" or (device_option == "auto" and torch.cuda.is_available())
    started = {"MASTER_ADDR", *_PLACE} <= os.environ.keys()
    rank, local_rank, size = (int(os.environ[name]) if started else alone for name, alone in _PLACE.items())
    if not on_gpu:
        device = torch.device("cpu")
    else:
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    if started:
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
    yield World(rank, local_rank, size, device)
    if started:
        # torch 2.6 can wait forever here: a thread of the group's still frees the last message's tensors, for which it
        # needs Python's lock, and the group, which waits for its threads, holds it. The pause lets go of the lock.
        time.sleep(0.1)
        dist.destroy_process_group()


_PLACE = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1}


class Stop:
    """Records SIGTERM and SIGINT inside the context; a second SIGINT (Ctrl-C) interrupts at once."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.signal = 0

    def __enter__(self) -> "Stop":
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number

    def agreed(self, error: Unusable | None = None) -> bool:
        """Tell all processes alike whether to stop at this step, as soon as one of them got a signal.

        Raises:
            Unusable: in all processes, if one of them has an error.
        """
        if self.world.size == 1:
            self.world.fail_together(error)
            return self.signal != 0
        told = torch.tensor([self.signal, error is not None])
        dist.all_reduce(told, dist.ReduceOp.MAX)
        if told[1]:
            self.world.fail_together(error)
        agreed = int(told[0])
        self.signal = agreed or self.signal  # one that came in the meantime is for the next step
        return agreed != 0
