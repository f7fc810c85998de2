"""Do the paper's two complexity claims hold (arXiv 2010.01546)?

(a) Whitening by transforming the gradient, against transforming the samples forward and backward: the
multiplications and the time of both, and the factor S / (2B) that the paper predicts between them.
(b) Refreshing the inverse by recursion, against the eigendecomposition: time over M, and the exponent of M.
"""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from whiten_layers._torch.precision import full_precision
from whiten_layers.inverse import METHODS, supports
from whiten_layers.refresh.update import refresh_factors
from whiten_layers.statistics.whitening_factor import WhiteningFactor

from .environment import describe
from .options import PositiveFloat, PositiveInt, read, reject
from .output import show, write
from .timing import median_seconds, steady_allocator

PROGRAM = "python -m benchmarks.complexity"
BASELINE = "eigh"
DAMPING = 0.03
KEYS = ("inverse", "refresh")
LARGE = 1000  # from this M on arithmetic outweighs the cost of calls


def covariance_of(size: int) -> Tensor:
    """Draw a sample covariance whose variances fall as 1/i."""
    rows = torch.randn(2 * size, size) / torch.arange(1, size + 1).sqrt()
    return rows.mT @ rows / len(rows)


def transformation(batch: int, outputs: int, features: int) -> dict[str, float]:
    """Time both ways of claim (a) in turns for a cell (B, S, M), after checking that their answers agree."""
    inputs, delta = torch.randn(batch, features) + 0.5, torch.randn(batch, outputs)
    mean, weight = inputs.mean(0), torch.randn(outputs, features)
    covariance = covariance_of(features) + DAMPING * torch.eye(features)
    root = torch.linalg.inv(torch.linalg.cholesky(covariance))  # TᵀT = P
    precision = root.mT @ root
    grad_weight, grad_bias = delta.mT @ inputs, delta.sum(0)
    upstream = delta @ weight  # ∂L/∂x̃ of the network that whitens its samples

    def samples() -> tuple[Tensor, Tensor]:
        return (inputs - mean) @ root.mT, upstream @ root  # x̃ forward, ∂L/∂x backward

    def gradient() -> tuple[Tensor, Tensor]:
        whitened = (grad_weight - torch.outer(grad_bias, mean)) @ precision
        return whitened, grad_bias - whitened @ mean

    # The same step: the plain parameters W = W̃ T of the network that whitens its samples move by (δᵀx̃) T.
    step = (delta.mT @ samples()[0]) @ root
    torch.testing.assert_close(gradient()[0], step, rtol=1e-3, atol=1e-3 * step.abs().max().item())
    of_samples, of_gradient = median_seconds(samples, gradient)
    counts = {"samples": 2 * batch * features**2, "gradient": outputs * features**2 + 2 * outputs * features}
    (alone,) = median_seconds(gradient)
    return {
        "B": batch,
        "S": outputs,
        "M": features,
        "multiplications_samples": counts["samples"],
        "multiplications_gradient": counts["gradient"],
        "seconds_samples": of_samples,
        "seconds_gradient": of_gradient,
        "seconds_gradient_alone": alone,
        "predicted": outputs / (2 * batch),
        "counted": counts["gradient"] / counts["samples"],
        "measured": of_gradient / of_samples,
        "rate_samples": counts["samples"] / of_samples,
        "rate_gradient": counts["gradient"] / of_gradient,
    }


def agreement(cell: dict[str, float]) -> str:
    """Tell whether the measured factor is within twice the predicted one, and if not, why."""
    off = cell["measured"] / cell["predicted"]
    if 0.5 <= off <= 2:
        return "yes"
    alone = cell["seconds_gradient_alone"] / cell["seconds_samples"] / cell["predicted"]
    if 0.5 <= alone <= 2:
        return f"no, {off:.1f}×; alone {alone:.1f}×: the samples turn its operands out of the cache"
    short = min(cell["seconds_gradient"], cell["seconds_samples"])
    return f"no, {off:.1f}×; alone {alone:.1f}×" + (": too short to fill the machine" if short < 1e-4 else "")


def refreshes(size: int, power: float, rank: int, largest: int) -> dict[str, dict[str, float]]:
    """Time claim (b) at one M: each method alone, and a whole refresh, which scales statistics and writes P too.

    As in training, C has moved since the last refresh, by ten batches at a decay of 0.95. It goes back and forth
    between two covariances, so that every call has as far to go as the one before.
    """
    covariance = covariance_of(size)[None]
    moved = torch.lerp(covariance_of(size)[None], covariance, 0.95**10)
    seconds: dict[str, dict[str, float]] = {}
    calls: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {}
    for name, method in METHODS.items():
        if not supports(name, power) or (name in (BASELINE, "newton_schulz") and size > largest):
            continue
        options: dict[str, Any] = {
            "method": name,
            "power": power,
            "damping": DAMPING,
            "decay": 0.95,
            "rescale": True,
            "rank": rank,
        }
        factor = WhiteningFactor(1, size, **options)
        factor.running_covariance = covariance
        for _ in range(10 if method.is_approximate else 1):
            refresh_factors([factor])
        warm_start = factor.warm_start()
        factor.running_covariance = moved
        damped = factor.damped().matrix

        def whole(factor: WhiteningFactor = factor) -> None:
            factor.running_covariance = covariance if factor.running_covariance is moved else moved
            refresh_factors([factor])

        arguments = (damped, power, warm_start, rank)[: method.arguments]
        alone = partial(method.inverse, *arguments)
        calls[name] = (alone, whole)
    taken = iter(median_seconds(*(call for pair in calls.values() for call in pair), budget=5.0))
    for name in calls:
        seconds[name] = {"inverse": next(taken), "refresh": next(taken)}
    seconds["recursive"]["floor"] = sum(median_seconds(*large_products(covariance, min(rank, size))))
    return seconds


def large_products(covariance: Tensor, rank: int) -> list[Callable[[], Tensor]]:
    """The large products of a recursive inverse: in both of its steps C and P times `rank` columns, then P's update."""
    columns, pairs = torch.randn(1, covariance.shape[-1], rank), torch.randn(1, covariance.shape[-1], 4 * rank)
    precision = covariance.clone()
    thin = [lambda: covariance @ columns, lambda: precision @ columns]
    return [*thin, *thin, lambda: torch.baddbmm(precision, pairs, pairs.mT, alpha=-1)]


def pair(values: dict, name: str, compute: Callable[[float, float], float], text: str) -> str:
    """A cell of table (b): the figure of an inverse, and of a whole refresh; empty where the method was left out."""
    if name not in values:
        return ""
    return text.format(*(compute(values[name][key], values["recursive"][key]) for key in KEYS))


def exponent(seconds: dict[int, float]) -> float:
    """The slope of log seconds over log M, by least squares; not a number for fewer than two sizes."""
    if len(seconds) < 2:
        return math.nan
    x, y = torch.tensor(list(seconds)).double().log(), torch.tensor(list(seconds.values())).double().log()
    x, y = x - x.mean(), y - y.mean()
    return ((x * y).sum() / (x * x).sum()).item()


def plot(cells: list[dict], measured: dict[int, dict], exponents: dict[str, dict[str, float]]) -> Figure:
    """Plot measured against predicted factors, and seconds of an inverse over M."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for features in sorted({cell["M"] for cell in cells}):
        points = [(cell["predicted"], cell["measured"]) for cell in cells if cell["M"] == features]
        left.loglog(*zip(*points, strict=True), "o", markersize=4, label=f"M = {features}")
    ends = [min(cell["predicted"] for cell in cells), max(cell["predicted"] for cell in cells)]
    left.loglog(ends, ends, "k-", linewidth=0.8)
    left.fill_between(ends, [end / 2 for end in ends], [end * 2 for end in ends], color="k", alpha=0.1, linewidth=0)
    left.set_xlabel("S / (2B)")
    left.set_ylabel("time of the gradient's way / of the samples' way")
    left.legend()
    for name, slope in exponents.items():
        points = [(size, values[name]["inverse"]) for size, values in measured.items() if name in values]
        right.loglog(*zip(*points, strict=True), "o-", markersize=4, label=f"{name}, M^{slope['inverse']:.2f}")
    right.set_xlabel("M")
    right.set_ylabel("seconds of an inverse")
    right.legend()
    return figure


@dataclass(frozen=True)
class Options:
    """The options of the benchmark."""

    batches: tuple[PositiveInt, ...] = (32, 128, 512, 2048)  # B of (a)
    outputs: tuple[PositiveInt, ...] = (64, 256, 1024)  # S of (a)
    features: tuple[PositiveInt, ...] = (144, 576, 2304)  # M of (a)
    sizes: tuple[PositiveInt, ...] = (128, 288, 576, 1152, 2304, 4608)  # M of (b)
    largest: PositiveInt = 4608  # the largest M for the slow methods of (b)
    power: PositiveFloat = 1.0  # of (b)
    rank: PositiveInt = 16
    seed: int = 0
    out: Path = Path("results/complexity")  # folder for the results


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; return the exit status."""
    options = read(Options(), PROGRAM, __doc__, arguments)
    if options.largest < min(options.sizes):
        reject(PROGRAM, f"--largest {options.largest}: --sizes begins at {min(options.sizes)}")
    steady_allocator()
    torch.manual_seed(options.seed)
    print(describe())
    grid = [(b, s, m) for m in options.features for s in options.outputs for b in options.batches]
    with full_precision():
        cells = [transformation(*cell) for cell in tqdm(grid, unit="cell", desc="(a)", dynamic_ncols=True)]
        measured = {
            size: refreshes(size, options.power, options.rank, options.largest)
            for size in tqdm(sorted(options.sizes), unit="size", desc="(b)", dynamic_ncols=True)
        }

    result: dict[str, Any] = {}
    heads = ["B", "S", "M", "multiplications", "ms, samples", "ms, gradient", "S/(2B)", "counted", "measured"]
    lines = [[*heads, "within 2×"]]
    for cell in cells:
        counts = f"{cell['multiplications_gradient']:.3g} / {cell['multiplications_samples']:.3g}"
        times = [f"{1e3 * cell[key]:.3f}" for key in ("seconds_samples", "seconds_gradient")]
        factors = [f"{cell[key]:.3g}" for key in ("predicted", "counted", "measured")]
        lines.append([str(cell["B"]), str(cell["S"]), str(cell["M"]), counts, *times, *factors, agreement(cell)])
    show(result, "(a) transforming the gradient against the samples; the factor is gradient / samples", lines)

    title = f"(b) milliseconds of an inverse (of a whole refresh), power {options.power:g}, rank {options.rank}"
    names = [name for name in METHODS if supports(name, options.power)]
    others = [name for name in (BASELINE, "cholesky") if name in names]
    floor = options.power == 1
    lines = [["M", *names, *(f"{name} / recursive" for name in others), *(["its products alone"] if floor else [])]]
    for size, values in measured.items():
        row = [pair(values, name, lambda own, _: 1e3 * own, "{:.2f} ({:.2f})") for name in names]
        row += [pair(values, name, lambda own, recursive: own / recursive, "{:.1f} ({:.1f})") for name in others]
        lines.append([str(size), *row, *([f"{1e3 * values['recursive']['floor']:.2f}"] if floor else [])])
    exponents: dict[str, dict[str, dict[str, float]]] = {}
    for label, least in {"exponent": 0, f"from {LARGE} on": LARGE}.items():
        known = {size: values for size, values in measured.items() if size >= least}
        exponents[label] = {
            name: {key: exponent({m: v[name][key] for m, v in known.items() if name in v}) for key in KEYS}
            for name in names
        }
        slopes = ["{inverse:.2f} ({refresh:.2f})".format(**exponents[label][name]) for name in names]
        lines.append([label, *slopes, *[""] * (len(lines[0]) - 1 - len(names))])
    show(result, f"{title}, from the last one, after C has moved", lines)
    result |= {"transformation": cells, "refresh": measured, "exponents": exponents}
    return write(options, result, {"complexity": lambda: plot(cells, measured, exponents["exponent"])})


if __name__ == "__main__":
    sys.exit(main())
