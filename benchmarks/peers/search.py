"""Search for the learning rate and the weight decay of a method: equally many of each, and the best at no edge."""

from collections.abc import Callable, Mapping
from typing import Any

RADIUS = 2  # learning rates above and below the best that are tried, each twice the next
MOST = 20  # learning rates tried in all
Measure = Callable[[float, float], Mapping[str, Any]]  # of a learning rate and a weight decay


def best_rate(measure: Measure, start: float, weight_decay: float, criterion: str) -> float:
    """Find the learning rate with the least loss, with `RADIUS` others tried on each side of it.

    Raises:
        ArithmeticError: no best was found among `MOST` learning rates.
    """
    tried: dict[int, float] = {}
    missing = list(range(-RADIUS, RADIUS + 1))
    while missing:
        for power in missing:
            tried[power] = measure(start * 2.0**power, weight_decay)[criterion]
        # Where no run ends well the lowest rate is taken, and lower ones are tried.
        best = min(tried, key=lambda power: (tried[power], power))
        missing = [power for power in range(best - RADIUS, best + RADIUS + 1) if power not in tried]
        if missing and len(tried) + len(missing) > MOST:
            raise ArithmeticError(f"no best among {len(tried)} learning rates from {start * 2.0 ** min(tried):g} on")
    return start * 2.0**best


def best_setting(measure: Measure, lr: float, weight_decay: float, criterion: str) -> tuple[float, float]:
    """Find a learning rate with the given weight decay, then a weight decay: none, a tenth, the same or ten times it.

    Raises:
        ArithmeticError: see `best_rate`.
    """
    rate = best_rate(measure, lr, weight_decay, criterion)
    decays = [0.0, weight_decay / 10, weight_decay, 10 * weight_decay]
    decay = min(decays, key=lambda one: (measure(rate, one)[criterion], one))
    while decay == decays[-1]:
        decays.append(10 * decays[-1])
        decay = min(decays, key=lambda one: (measure(rate, one)[criterion], one))
    return rate, decay
