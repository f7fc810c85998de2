"""Real processes that run a test together, and a clock over them: one that hangs is killed, and the test fails."""

import multiprocessing
import socket
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist

needs_fsdp2 = pytest.mark.skipif(
    not hasattr(torch.cpu.current_stream(), "record_event"), reason="the FSDP2 of this torch needs a GPU"
)

# A process that has imported everything and has run nothing forks the others: a fraction of a second, not many.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    ["torch.distributed.fsdp", "torch.distributed.checkpoint.state_dict", __name__, __name__.replace("world", "runs")]
)


def free_port() -> int:
    """A port of this machine that nothing listens at."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


class Ended(NamedTuple):
    """What a process returned, or the error that it raised, or neither, and its exit status."""

    result: Any
    error: str
    status: int


def run(function: Callable[..., Any], ranks: int, *arguments: Any, timeout: float = 60) -> list[Any]:
    """What ``function(rank, *arguments)`` returns in each of so many processes; an error in one of them is one here."""
    ended = outcomes(function, ranks, *arguments, timeout=timeout)
    for rank, (_, error, status) in enumerate(ended):
        assert status == 0, f"rank {rank} ended with status {status}\n{error}"
    return [result for result, _, _ in ended]


def outcomes(
    function: Callable[..., Any], ranks: int, *arguments: Any, timeout: float = 60, patience: float = 30
) -> list[Ended]:
    """How each process ended. `patience` is the group's timeout; `timeout`, in seconds too, is the test's."""
    with TemporaryDirectory() as folder:
        processes, ends = [], []
        for rank in range(ranks):
            end, theirs = _context.Pipe(duplex=False)
            options = function, rank, ranks, f"file://{folder}/store", patience, theirs, arguments
            processes.append(_context.Process(target=_main, args=options, daemon=True))
            processes[-1].start()
            theirs.close()
            ends.append(end)
        deadline = time.monotonic() + timeout
        received = [_received(end, deadline) for end in ends]
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
        hung = [rank for rank, process in enumerate(processes) if process.is_alive()]
        for process in processes:
            process.kill()
            process.join()
        if hung:
            pytest.fail(f"ranks {hung} had not ended after {timeout} seconds")
        pairs = zip(received, processes, strict=True)
        return [Ended(*message, process.exitcode or 0) for message, process in pairs]


def _received(end: Connection, deadline: float) -> tuple[Any, str]:
    try:
        return end.recv() if end.poll(max(0.0, deadline - time.monotonic())) else (None, "")
    except EOFError:  # it ended without a word
        return None, ""


def _main(
    function: Callable[..., Any], rank: int, ranks: int, store: str, patience: float, end: Connection, arguments: tuple
) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    timeout = timedelta(seconds=patience)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks, timeout=timeout)
    try:
        result = function(rank, *arguments)
        dist.barrier()  # what the others still have under way may need this one
        end.send((result, ""))
        dist.destroy_process_group()
    except Exception:
        end.send((None, traceback.format_exc()))
        raise SystemExit(1) from None
