"""Which images a step takes, and how they come to it."""

import argparse
import multiprocessing
import signal
from collections.abc import Iterator
from typing import Any

import torch
from torch import Generator, Tensor
from torch.utils.data import DataLoader, Sampler, default_collate

from .datasets import ORDER, Data, Prepared, mixed
from .errors import Unusable
from .world import World

Batch = tuple[Tensor, Tensor]


class Shares(Sampler[list[tuple[int, int]]]):
    """The share of one process in every batch of an epoch, from step `start` on, a backward pass's at a time.

    The order of an epoch is a function of the seed and its number; a batch is dealt to the backward passes and, in
    each, to the processes, so that its images are the same however many there are. Images that fill no
    batch are left out.
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
    """One process's batches of a test, of at most `size` images; every process has as many, the last may be empty."""
    rounds = range(world.rank * size, images + world.rank * size, world.size * size)
    return [[(0, number) for number in range(start, min(start + size, images))] for start in rounds]


def collate(samples: list[Any]) -> Batch | Unusable | None:
    """A batch; the error of an image that could not be read; None where there are no images."""
    errors = (sample for sample in samples if isinstance(sample, Unusable))
    return next(errors, None) or (tuple(default_collate(samples)) if samples else None)


def stand_by(worker: int) -> None:
    """Leave signals to the process that images are loaded for: they often go to all processes of a program."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def end_loading() -> None:
    """Kill the processes that load images: multiprocessing would, at exit, by the SIGTERM that they ignore."""
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's own takes their end for an error
    for child in multiprocessing.active_children():
        child.kill()
        child.join()
    signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)


def loader(
    images: Prepared, shares: Any, options: argparse.Namespace, device: torch.device, *, persistent: bool
) -> DataLoader:
    """Load the images of `shares`, in workers that may stay from epoch to epoch."""
    return DataLoader(
        images,
        batch_sampler=shares,
        num_workers=options.workers,
        collate_fn=collate,
        pin_memory=device.type == "cuda",
        persistent_workers=persistent and options.workers > 0,
        worker_init_fn=stand_by,
        generator=Generator(),  # else an iterator draws from the random numbers of the network
    )


def loaders(data: Data, options: argparse.Namespace, world: World) -> tuple[Shares, DataLoader, DataLoader]:
    """The shares of training, and the loaders of both parts."""
    shares = Shares(len(data.train), options.batch_size, options.accumulate, world, options.seed)
    tested = shares_of_test(len(data.test), options.batch_size // (world.size * options.accumulate), world)
    train = loader(data.train, shares, options, world.device, persistent=True)
    return shares, train, loader(data.test, tested, options, world.device, persistent=False)
