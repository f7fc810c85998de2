"""Train: see ``benchmarks/train/__init__.py`` for the map, ``--help`` for the options.

Exit status: 0 where the run came to its end or stopped at SIGTERM, having saved; 130 at Ctrl-C, having saved; 2 where
something that it was given cannot be used.
"""

import argparse
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch

from ..environment import describe, device_name
from .batches import end_loading
from .datasets import open_data
from .errors import Unusable
from .options import PROGRAM, parse
from .record import CHECKPOINT, Record, check_unused
from .run import Run
from .world import Stop, World, join_world


def train(options: argparse.Namespace, world: World, stop: Stop) -> int:
    """Train, or go on training; return the exit status."""
    path = options.out / CHECKPOINT
    if not options.resume:
        world.together(lambda: check_unused(options.out))
    opening = world.alone_first if options.download else world.together
    data = opening(lambda: open_data(options))
    run = Run(options, data, world)
    if options.resume:
        run.restore()
    else:
        run.save()  # what cannot be written is found out before anything has been computed
    about = {**run.about, "processes": world.size, "device": device_name(world.device)}
    make = partial(Record, options.out, options, about, len(run.rows))
    record = world.together(lambda: make() if world.rank == 0 else None)
    if record:
        print(f"{describe()}\n{options.model} on {options.dataset}, {about['device']}, {world.size} process(es)")
        print(f"{'going on with' if options.resume else 'checkpoint:'} {path}, {run.progress()}")
    finished = run.fit(record, stop)
    if record and finished:
        record.close(run.rows, run.weights())
    elif record:
        name = signal.Signals(stop.signal).name
        print(f"{name}: stopped and saved in {path}, {run.progress()}; --resume goes on with it")
    return 130 if not finished and stop.signal == signal.SIGINT else 0


@contextmanager
def deterministic(on: bool) -> Iterator[None]:
    """Let operations of a GPU give the same bits every time."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    if on:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # it takes time, and nothing here reads such memory
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=not on):
            yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]


def main(arguments: list[str] | None = None) -> int:
    """Run the program; return its exit status."""
    options = parse(arguments)
    with deterministic(options.deterministic), join_world(options) as world, Stop(world) as stop:
        try:
            return train(options, world, stop)
        except Unusable as error:  # in all processes the same
            if world.rank == 0:
                print(f"{PROGRAM}: {error}", file=sys.stderr)
            return 2
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            message = "a process that loads images has died, of want of memory perhaps; --resume with fewer --workers"
            print(f"{PROGRAM}: {message}", file=sys.stderr)
            sys.exit(2)  # not `return`: see join_world
        except KeyboardInterrupt:
            sys.exit(130)
        finally:
            end_loading()


if __name__ == "__main__":
    sys.exit(main())
