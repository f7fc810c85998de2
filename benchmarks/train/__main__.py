"""Train: see ``benchmarks/train/__init__.py`` for the map, ``--help`` for the options.

Exit status: 0 if the run finished, or was stopped by SIGTERM and saved; 130 if it was stopped by Ctrl-C and saved; 2 if
something that it was given cannot be used.
"""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from ..environment import describe, device_name
from .batches import end_loading
from .command_line import PROGRAM, parse
from .datasets import open_data
from .distillation import open_teacher
from .errors import Unusable
from .options import Options, given
from .record import CHECKPOINT, Record, check_unused
from .run import Run
from .world import Stop, World, join_world


def train(options: Options, world: World, stop: Stop) -> int:
    """Train, or continue to train; return the exit status."""
    folder = given(options.out)
    path = folder / CHECKPOINT
    if not options.resume:
        world.together(lambda: check_unused(folder))
    teacher = world.together(lambda: open_teacher(options.distillation.teacher, world.device))
    opening = world.alone_first if options.images.download else world.together
    data = opening(lambda: open_data(options, None if teacher is None else teacher.clip))
    run = Run(options, data, world, teacher)
    if options.resume:
        run.restore()
    else:
        run.save()  # so that a folder that cannot be written to is found before anything is computed
    about = {**run.about, "processes": world.size, "device": device_name(world.device)}
    make = partial(Record, folder, options, about, len(run.rows))
    record = world.together(lambda: make() if world.rank == 0 else None)
    if record:
        what = f"{options.network.model} on {options.images.dataset}"
        print(f"{describe()}\n{what}, {about['device']}, {world.size} process(es)")
        if data.note:
            print(data.note)
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
    """Make operations of a GPU give the same bits every time, if `on`."""
    filling: Any = torch.utils.deterministic  # its property is unknown to type checkers
    before = torch.are_deterministic_algorithms_enabled(), filling.fill_uninitialized_memory
    if on:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        filling.fill_uninitialized_memory = False  # it takes time, and nothing here reads such memory
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=not on):
            yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        filling.fill_uninitialized_memory = before[1]


def main(arguments: list[str] | None = None) -> int:
    """Run the program; return its exit status."""
    options = parse(arguments)
    with deterministic(options.machine.deterministic), join_world(options.machine.device) as world, Stop(world) as stop:
        try:
            return train(options, world, stop)
        except Unusable as error:  # in all processes the same
            if world.rank == 0:
                print(f"{PROGRAM}: {error}", file=sys.stderr)
            return 2
        except (RuntimeError, ConnectionError, EOFError) as error:  # the last two where it died while it sent images
            if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
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
