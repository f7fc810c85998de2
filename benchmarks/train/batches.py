"""Choosing and loading the images of each step."""

import multiprocessing
import signal
from collections.abc import Iterator
from typing import Any

import torch
from torch import Generator, Tensor
from torch.utils.data import DataLoader, Sampler, default_collate

from .datasets import ORDER, Data, mixed
from .errors import Unusable
from .options import Options, given
from .world import World

Batch = tuple[Tensor, ...]  # images, classes, and what else a teacher is given, if that is something else


class Shares(Sampler[list[tuple[int, int]]]):
    """The images of one process in every batch of an epoch from step `start` on, one backward pass at a time.

    The order of an epoch is a function of the seed and its number. A batch is divided among the backward passes and,
    within each, among the processes, so that its images are the same for any number of processes. Images that do not
    fill a batch are left out.
    """

    def __init__(self, images: int, batch_size: int, accumulate: int, world: World, seed: int) -> None:
        self.images, self.batch_size, self.accumulate = images, batch_size, accumulate
        self.world, self.seed = world, seed
        self.steps = images // batch_size
        self.epoch = self.start = 0

    def __len__(self) -> int:
        return (self.steps - self.start) * self.accumulate

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        generator = Generator().manual_seed(mixed(ORDER, self.seed, self.epoch))
        order = torch.randperm(self.images, generator=generator)[: self.steps * self.batch_size]
        for batch in order.view(self.steps, self.accumulate, self.world.size, -1)[self.start :, :, self.world.rank]:
            yield from ([(self.epoch, number) for number in share] for share in batch.tolist())


def shares_of_test(images: int, size: int, world: World) -> list[list[tuple[int, int]]]:
    """The test batches of one process, of at most `size` images; each process has as many batches, even if empty."""
    rounds = range(world.rank * size, images + world.rank * size, world.size * size)
    return [[(0, number) for number in range(start, min(start + size, images))] for start in rounds]


def collate(samples: list[Any]) -> Batch | Unusable | None:
    """Make a batch; the error instead, if an image could not be read; None if there are no images."""
    errors = (sample for sample in samples if isinstance(sample, Unusable))
    return next(errors, None) or (tuple(default_collate(samples)) if samples else None)


def stand_by(worker: int) -> None:
    """Ignore signals in a loading process: they are often sent to all processes of a program, and the main one acts."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def end_loading() -> None:
    """Kill the processes that load images; at exit multiprocessing would send SIGTERM, which they ignore."""
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's own takes their end for an error
    for child in multiprocessing.active_children():
        child.kill()
        child.join()
    signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)


def loaders(data: Data, options: Options, world: World) -> tuple[Shares, DataLoader, DataLoader]:
    """The shares of training, and the loaders of both parts."""
    size, accumulate = options.optimization.batch_size, options.optimization.accumulate
    workers = given(options.machine.workers)
    shares = Shares(len(data.train), size, accumulate, world, options.seed)
    tested = shares_of_test(len(data.test), size // (world.size * accumulate), world)
    common: dict[str, Any] = {"num_workers": workers, "collate_fn": collate, "worker_init_fn": stand_by}
    common["pin_memory"] = world.device.type == "cuda"
    # With a generator of its own an iterator does not draw from the random numbers of the network.
    train = DataLoader(
        data.train, batch_sampler=shares, generator=Generator(), persistent_workers=workers > 0, **common
    )
    return shares, train, DataLoader(data.test, batch_sampler=tested, generator=Generator(), **common)
