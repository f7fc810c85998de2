"""Measuring time so that two measurements of one run can be compared."""

import ctypes
import statistics
import time
from collections.abc import Callable

import torch


def steady_allocator() -> bool:
    """Keep glibc from giving memory back to the system between two calls; return whether the system allows that.

    By default it takes and returns the top of its heap many times a step. That causes thousands of page faults, whose
    number depends on how small allocations happen to lie: the seconds of the same work differed between two processes
    by more than the effects that are measured here.
    """
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(mmap_max, 0) and mallopt(trim_threshold, 2**31 - 1))


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all work that was queued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_seconds(*calls: Callable[[], object], budget: float = 0.5, limit: int = 25) -> list[float]:
    """Median seconds of each of several calls, which take turns: one round to warm up, then within `budget` seconds.

    Three rounds are taken at least, `limit` at most.
    """
    for call in calls:
        call()
    seconds: list[list[float]] = [[] for _ in calls]
    start = time.perf_counter()
    for number in range(limit):
        if number >= 3 and time.perf_counter() - start > budget:
            break
        for call, taken in zip(calls, seconds, strict=True):
            before = time.perf_counter()
            call()
            taken.append(time.perf_counter() - before)
    return [statistics.median(taken) for taken in seconds]
