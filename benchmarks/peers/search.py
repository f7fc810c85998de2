"""Search for the learning rate and the weight decay of a method: equally many of each, and the best at no edge."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

COARSE = (-4, -2, 0, 2, 4)  # powers of two of the first learning rates
RADIUS = 2  # learning rates above and below the best that are tried, each twice the next
MOST = 20  # learning rates tried in all
FINALISTS = 3  # rates that a second seed decides between
Point = tuple[float, float]  # a learning rate and a weight decay
Measure = Callable[[float, float], Mapping[str, Any]]


@dataclass(frozen=True)
class Found:
    """What was tried. `is_inside` tells that the least training loss is at no edge of the learning rates."""

    tried: Mapping[Point, Mapping[str, Any]]
    is_inside: bool

    def ranking(self, criterion: str) -> list[Point]:
        """Return the points, that with the least of a measure first; of equals that with the lowest learning rate."""
        return sorted(self.tried, key=lambda point: (self.tried[point][criterion], point))

    def best(self, criterion: str) -> Point:
        """Return the first point of the ranking."""
        return self.ranking(criterion)[0]

    def confirmed(self, criterion: str, again: Measure) -> Point:
        """Measure the best point of each of the best rates again; return that where the greater of both is least.

        The rate that is best of many by a single seed is often at the edge of what is stable.
        """
        of_rates: dict[float, Point] = {}
        for point in self.ranking(criterion):
            of_rates.setdefault(point[0], point)
        first = list(of_rates.values())[:FINALISTS]
        return min(first, key=lambda point: (max(self.tried[point][criterion], again(*point)[criterion]), point))


def search(measure: Measure, lr: float, weight_decay: float) -> Found:
    """Look for the least loss: first among learning rates, then among weight decays at the best of them.

    Rates four times apart come first, so that a minimum that is not the least does not end the search; then those
    twice apart, `RADIUS` of them on each side of the best. The decays are none, a tenth of the given one, the same and
    ten times it, and more while the largest is the best.
    """
    tried: dict[Point, Mapping[str, Any]] = {}

    def try_out(rate: float, decay: float) -> None:
        if (rate, decay) not in tried:
            tried[rate, decay] = measure(rate, decay)

    def best() -> Point:
        return Found(tried, True).best("loss")

    missing = [lr * 2.0**power for power in COARSE]
    while missing and len(tried) + len(missing) <= MOST:
        for rate in missing:
            try_out(rate, weight_decay)
        near = [best()[0] * 2.0**power for power in range(-RADIUS, RADIUS + 1)]
        missing = [rate for rate in near if (rate, weight_decay) not in tried]
    is_inside = not missing and math.isfinite(tried[best()]["loss"])
    rate = best()[0]
    decays = [0.0, weight_decay / 10, weight_decay, 10 * weight_decay]
    for decay in decays:
        try_out(rate, decay)
        if decay == decays[-1] > 0 and best()[1] == decay and math.isfinite(tried[rate, decay]["loss"]):
            decays.append(10 * decay)
    return Found(tried, is_inside)
