"""How close do first-order trainers with optimal input gains come to Levenberg–Marquardt, and at what cost?

Networks of one hidden layer on seven regression sets: the four trainers of `whiten_layers.TwoStageNetwork`, plain
backpropagation (a Newton scalar step along the gradient of all weights) and Levenberg–Marquardt (MINPACK's, by
`scipy.optimize.least_squares`, with the exact Jacobian), all from the same weights: hidden ones drawn at random, output
ones solved for. Inputs and targets are standardised, a quarter is held out; errors are means over outputs, so that
predicting the mean has an error of 1.
"""

import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy.optimize import least_squares
from sklearn import datasets
from torch import Tensor
from tqdm import tqdm

from whiten_layers.two_stage import HALVINGS, TwoStageNetwork, augmented, negative_gradient

from .environment import describe
from .options import PositiveFloat, PositiveInt, choice, read, reject
from .output import Column, annotate, cells, interruptible, medians, show, write

PROGRAM = "python -m benchmarks.two_stage"
Arrays = tuple[np.ndarray, np.ndarray]


def linear_plus_sine(seed: int) -> Arrays:
    """Draw 1,000 rows of 20 features with variances 1 to 1/1000 along random axes; targets are linear plus a sine."""
    generator = np.random.default_rng(seed)
    axes = np.linalg.qr(generator.normal(size=(20, 20)))[0]
    inputs = generator.normal(size=(1000, 20)) * np.logspace(0, -1.5, 20) @ axes
    line, across = generator.normal(size=(2, 20))
    return inputs, inputs @ line + np.sin(2 * inputs @ across) + 0.1 * generator.normal(size=1000)


def digits(_: int) -> Arrays:
    """Load the pixels of 1,797 handwritten digits, and their classes as one-hot vectors."""
    data = datasets.load_digits()
    return data.data, np.eye(10)[data.target]


def shipped(load: Callable) -> Callable[[int], Arrays]:
    """Make a function of the seed that loads the same set for every seed."""
    return lambda _: load(return_X_y=True)


# The data as a function of a seed, and the number of hidden units.
SETS: dict[str, tuple[Callable[[int], Arrays], int]] = {
    "diabetes": (shipped(datasets.load_diabetes), 10),
    "linnerud": (shipped(datasets.load_linnerud), 3),
    "digits": (digits, 20),
    "friedman1": (lambda seed: datasets.make_friedman1(1000, noise=1.0, random_state=seed), 10),
    "friedman2": (lambda seed: datasets.make_friedman2(1000, noise=125.0, random_state=seed), 10),
    "friedman3": (lambda seed: datasets.make_friedman3(1000, noise=0.1, random_state=seed), 10),
    "linear+sine": (linear_plus_sine, 10),
}
TWO_STAGE = {
    "OWO-BP": {"direction": "bp", "gains": False},
    "OIG-BP": {"direction": "bp", "gains": True},
    "OWO-HWO": {"direction": "hwo", "gains": False},
    "OIG-HWO": {"direction": "hwo", "gains": True},
}
TRAINERS = ("BP", *TWO_STAGE, "LM")


@dataclass(frozen=True)
class Problem:
    """Inputs and targets (rows, features), standardised by those of training, and the number of hidden units."""

    inputs: Tensor
    targets: Tensor
    held_inputs: Tensor
    held_targets: Tensor
    hidden: int

    @staticmethod
    def draw(name: str, seed: int, hidden: int | None = None) -> "Problem":
        """Make the set of this name, split at random; `hidden` replaces its own number of hidden units."""
        make, own = SETS[name]
        arrays = [torch.as_tensor(array, dtype=torch.float64) for array in make(seed)]
        arrays = [array.unsqueeze(1) if array.dim() == 1 else array for array in arrays]
        order = torch.randperm(len(arrays[0]), generator=torch.Generator().manual_seed(seed))
        held, kept = order[: len(order) // 4], order[len(order) // 4 :]
        parts = []
        for array in arrays:
            mean, spread = array[kept].mean(0), array[kept].std(0, correction=0)
            array = (array - mean) / torch.where(spread > 0, spread, 1)
            parts.append((array[kept], array[held]))
        (inputs, held_inputs), (targets, held_targets) = parts
        return Problem(inputs, targets, held_inputs, held_targets, hidden or own)

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """The numbers of rows N, features M with the constant, hidden units h, and outputs o."""
        return len(self.inputs), self.inputs.shape[1] + 1, self.hidden, self.targets.shape[1]

    @property
    def jacobian(self) -> tuple[int, int]:
        """The size of the Jacobian that Levenberg–Marquardt decomposes: residuals and parameters."""
        rows, features, hidden, outputs = self.sizes
        return rows * outputs, hidden * features + outputs * (hidden + features)


@dataclass(frozen=True)
class Weights:
    """The weights of a network: hidden (h, M), output (o, h) and direct (o, M)."""

    hidden: Tensor
    output: Tensor
    direct: Tensor

    @staticmethod
    def of(network: TwoStageNetwork) -> "Weights":
        """Copy the weights of a network."""
        weights = (network.hidden_weight, network.output_weight, network.direct_weight)
        return Weights(*(weight.clone() for weight in weights))

    def residuals(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """``t − y``. Multiplications: N (h M + h o + M o)."""
        rows = augmented(inputs)
        return targets - (rows @ self.hidden.mT).sigmoid() @ self.output.mT - rows @ self.direct.mT

    def jacobian(self, inputs: Tensor) -> Tensor:
        """The derivatives of `residuals`, flattened, by all weights in their order. Multiplications: N o h (1 + M)."""
        rows, outputs = augmented(inputs), len(self.output)
        values = (rows @ self.hidden.mT).sigmoid()
        inner = (values * (1 - values)).unsqueeze(1) * self.output  # (N, o, h)
        eye = torch.eye(outputs).to(rows)
        parts = [torch.einsum("poh,pm->pohm", inner, rows)]
        parts += [torch.einsum("oq,pm->poqm", eye, part) for part in (values, rows)]
        return -torch.cat([part.reshape(len(rows) * outputs, -1) for part in parts], 1)

    def plus(self, step: float, others: "Weights") -> "Weights":
        """These weights plus `step` times others."""
        pairs = zip(vars(self).values(), vars(others).values(), strict=True)
        return Weights(*(weight + step * other for weight, other in pairs))


@dataclass
class Curve:
    """Measurements of a run at the start and after each iteration: errors, seconds, multiplications."""

    training: list[float] = field(default_factory=list)
    held: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    multiplications: list[int] = field(default_factory=list)

    def take(self, problem: Problem, weights: Weights, seconds: float, multiplications: int) -> None:
        """Add a point."""
        self.training.append(weights.residuals(problem.inputs, problem.targets).square().mean().item())
        self.held.append(weights.residuals(problem.held_inputs, problem.held_targets).square().mean().item())
        self.seconds.append(seconds)
        self.multiplications.append(multiplications)

    def best_within(self, multiplications: float) -> float:
        """The lowest training error that was reached within a number of multiplications; infinite if there is none."""
        pairs = zip(self.training, self.multiplications, strict=True)
        return min((error for error, spent in pairs if spent <= multiplications), default=math.inf)

    def spent_until(self, error: float) -> float:
        """The multiplications at the first point with at most this training error; infinite if there is none."""
        pairs = zip(self.training, self.multiplications, strict=True)
        return next((float(spent) for reached, spent in pairs if reached <= error), math.inf)


Point = tuple[Weights, int]  # weights, and the multiplications up to them


def two_stage(problem: Problem, seed: int, iterations: int, options: dict) -> Iterator[Point]:
    """Train by a trainer of the library."""
    network = TwoStageNetwork(problem.hidden, iterations=iterations, seed=seed, **options)
    for progress in network.iterate(problem.inputs, problem.targets):
        yield Weights.of(network), progress.multiplications


def backpropagation(problem: Problem, seed: int, iterations: int) -> Iterator[Point]:
    """Move all weights along their gradient, by the two-stage trainers' Newton step, halved while the error would rise.

    Multiplications of an iteration: N h (M + o) for the hidden weights' gradient, N o (h + M) for the others';
    N (h M + 2 h o + M o) for the derivatives u of the outputs along it; a forward pass for each step that is tried.
    """
    number, features, hidden, outputs = problem.sizes
    forward = number * (hidden * features + hidden * outputs + features * outputs)
    weights, spent = next(two_stage(problem, seed, 1, TWO_STAGE["OWO-BP"]))
    rows, residuals = augmented(problem.inputs), weights.residuals(problem.inputs, problem.targets)
    yield weights, spent
    for _ in range(iterations):
        values = (rows @ weights.hidden.mT).sigmoid()  # at hand from the forward pass, and so not counted
        slopes = values * (1 - values)
        gradient = Weights(
            negative_gradient(rows, slopes, weights.output, residuals),
            2 / number * residuals.mT @ values,
            2 / number * residuals.mT @ rows,
        )
        along = (slopes * (rows @ gradient.hidden.mT)) @ weights.output.mT
        along = along + values @ gradient.output.mT + rows @ gradient.direct.mT
        spent += number * (2 * hidden * features + 4 * hidden * outputs + 2 * features * outputs)
        step = ((residuals * along).sum() / along.square().sum()).item()
        for _ in range(HALVINGS if math.isfinite(step) else 0):
            tried = weights.plus(step, gradient)
            left = tried.residuals(problem.inputs, problem.targets)
            spent += forward
            if left.square().sum() < residuals.square().sum():
                weights, residuals = tried, left
                break
            step /= 2
        yield weights, spent


def decomposition(problem: Problem) -> int:
    """Multiplications of a QR decomposition of the Jacobian by Householder's reflections: m n² − n³/3."""
    residuals, parameters = problem.jacobian
    return residuals * parameters**2 - parameters**3 // 3


def levenberg_marquardt(problem: Problem, seed: int, iterations: int, curve: Curve) -> None:
    """Run MINPACK's lmder until it converges or has tried `iterations` steps; every tried step is an iteration.

    Multiplications: a forward pass for each function evaluation; for each Jacobian, of m = N o residuals by n
    parameters, those to build it and of its QR `decomposition`. What is left out favours it: the solutions for the
    step's length, of order n³ for each step that is tried.
    """
    number, features, hidden, outputs = problem.sizes
    start, spent = next(two_stage(problem, seed, 1, TWO_STAGE["OWO-BP"]))
    shapes = [weight.shape for weight in vars(start).values()]
    ends = np.cumsum([shape.numel() for shape in shapes])[:-1]
    points: list[tuple[Weights, float, int]] = []
    lowest = math.inf

    def unpacked(vector: np.ndarray) -> Weights:
        parts = np.split(vector.copy(), ends)
        return Weights(*(torch.from_numpy(part).view(shape) for part, shape in zip(parts, shapes, strict=True)))

    def function(vector: np.ndarray) -> np.ndarray:
        nonlocal spent, lowest
        weights = unpacked(vector)
        left = weights.residuals(problem.inputs, problem.targets)
        spent += number * (hidden * features + hidden * outputs + features * outputs)
        error = left.square().mean().item()
        kept = weights if error < lowest else points[-1][0]
        lowest = min(lowest, error)
        points.append((kept, time.perf_counter() - began, spent))
        return left.flatten().numpy()

    def jacobian(vector: np.ndarray) -> np.ndarray:
        nonlocal spent
        spent += number * outputs * hidden * (1 + features) + decomposition(problem)
        return unpacked(vector).jacobian(problem.inputs).numpy()

    began = time.perf_counter()
    first = np.concatenate([weight.flatten().numpy() for weight in vars(start).values()])
    least_squares(function, first, jac=jacobian, method="lm", x_scale="jac", max_nfev=iterations + 1)
    for weights, seconds, multiplications in points:
        curve.take(problem, weights, seconds, multiplications)


def left_out(problem: Problem, limit: float) -> str | None:
    """The reason why Levenberg–Marquardt is not run on a problem; None if it is run."""
    residuals, parameters = problem.jacobian
    size = f"{residuals} residuals × {parameters} parameters"
    if residuals < parameters:
        return f"{size}: MINPACK takes no fewer residuals than parameters"
    cost = decomposition(problem)
    return f"{size}: {cost:.1e} multiplications a Jacobian, beyond --lm-limit {limit:.0e}" if cost > limit else None


def measure(trainer: str, problem: Problem, seed: int, iterations: int, curve: Curve) -> None:
    """Fill a curve point by point, so that it survives an interruption; evaluations do not count as seconds."""
    if trainer == "LM":
        levenberg_marquardt(problem, seed, iterations, curve)
        return
    if trainer == "BP":
        points = backpropagation(problem, seed, iterations)
    else:
        points = two_stage(problem, seed, iterations, TWO_STAGE[trainer])
    seconds = 0.0
    while True:
        began = time.perf_counter()
        point = next(points, None)
        seconds += time.perf_counter() - began
        if point is None:
            return
        curve.take(problem, point[0], seconds, point[1])


@dataclass(frozen=True)
class Options:
    """The options of the benchmark."""

    sets: tuple[Annotated[str, choice(SETS)], ...] = tuple(SETS)
    trainers: tuple[Annotated[str, choice(TRAINERS)], ...] = TRAINERS
    iterations: PositiveInt = 300
    hidden: PositiveInt | None = None  # units, of every set; None is each set's own number
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    lm_limit: PositiveFloat = 1e9  # multiplications of one Jacobian's QR above which LM is left out
    out: Path = Path("results/two_stage")  # folder for the results


Runs = dict[tuple[str, str, int], Curve]  # by set, trainer, seed


def run(options: Options, runs: Runs, reasons: dict[str, str]) -> None:
    """Fill `runs`, and `reasons`: why Levenberg–Marquardt is left out, by set."""
    total = len(options.sets) * len(options.seeds) * len(options.trainers)
    with tqdm(total=total, unit="run", dynamic_ncols=True) as bar:
        for name in options.sets:
            for seed in options.seeds:
                problem = Problem.draw(name, seed, options.hidden)
                for trainer in options.trainers:
                    bar.set_description(f"{name} {trainer} seed {seed}")
                    reason = left_out(problem, options.lm_limit) if trainer == "LM" else None
                    if reason is None:
                        curve = runs[name, trainer, seed] = Curve()
                        measure(trainer, problem, seed, options.iterations, curve)
                    else:
                        reasons[name] = reason
                    bar.update()


def summarise(runs: Runs) -> list[dict]:
    """One row for each run: its last errors and its cost."""
    return [
        {
            "set": name,
            "trainer": trainer,
            "seed": seed,
            "iterations": len(curve.training) - 1,
            "training_error": curve.training[-1],
            "held_out_error": curve.held[-1],
            "seconds": curve.seconds[-1],
            "multiplications": curve.multiplications[-1],
            # Multiplications of Levenberg–Marquardt until it reached this run's last error, over all of this run's.
            "lm_to_reach": runs.get((name, "LM", seed), Curve()).spent_until(curve.training[-1])
            / curve.multiplications[-1],
            "held_out_start": curve.held[0],
        }
        for (name, trainer, seed), curve in runs.items()
        if curve.training
    ]


def columns(other: dict | None) -> list[Column]:
    """The columns of the table of a set, whose row of Levenberg–Marquardt is `other`."""

    def compared(compute: Callable[[dict, dict], float]) -> Callable[[dict], str]:
        return lambda row: "–" if other is None else f"{compute(row, other):.3g}"

    return [
        ("", "{trainer}"),
        ("iterations", "{iterations:g}"),
        ("training", "{training_error:.4g}"),
        ("held out", "{held_out_error:.4g}"),
        ("(start)", "{held_out_start:.3g}"),
        ("seconds", "{seconds:.3f}"),
        ("multiplications", "{multiplications:.2e}"),
        ("training / LM", compared(lambda row, lm: row["training_error"] / max(lm["training_error"], 1e-30))),
        ("LM / mult.", compared(lambda row, lm: lm["multiplications"] / row["multiplications"])),
        ("LM to reach it / mult.", compared(lambda row, lm: row["lm_to_reach"])),
    ]


def verdicts(summary: list[dict], runs: Runs) -> dict[str, dict[str, bool]]:
    """Answer each question for each set; a set that lacks the trainers of a question has no answer.

    A trainer is within 10 % of Levenberg–Marquardt if, in the median over seeds, the error that it had reached at a
    tenth of the other's multiplications is at most 1.1 times the other's last error.
    """
    errors = {(row["set"], row["trainer"]): row["training_error"] for row in summary}
    names = list(dict.fromkeys(row["set"] for row in summary))
    result: dict[str, dict[str, bool]] = {}
    for better, than in [("OIG-BP", "OWO-BP"), ("OIG-HWO", "OWO-HWO")]:
        asked = [name for name in names if {(name, better), (name, than)} <= set(errors)]
        result[f"{better} ≤ {than}"] = {name: errors[name, better] <= errors[name, than] for name in asked}
    for trainer in TWO_STAGE:
        answers = {}
        for name in names:
            ratios = []
            for seed in [seed for which, who, seed in runs if (which, who) == (name, "LM")]:
                curve, other = runs.get((name, trainer, seed)), runs[name, "LM", seed]
                if curve is not None and curve.training and other.training:
                    within = curve.best_within(other.multiplications[-1] / 10)
                    ratios.append(within / max(other.training[-1], 1e-30))
            if ratios:
                answers[name] = statistics.median(ratios) <= 1.1
        result[f"{trainer} within 10 % of LM at a tenth of its multiplications"] = answers
    return {question: answers for question, answers in result.items() if answers}


def plot(runs: Runs) -> Figure:
    """Plot training errors of every run against iterations, seconds and multiplications, in a column for each set."""
    names = list(dict.fromkeys(name for name, _, _ in runs))
    figure = Figure(figsize=(3.2 * len(names) + 1, 9), layout="constrained")
    panels = figure.subplots(3, len(names), squeeze=False, sharey="col")
    for (name, trainer, _), curve in runs.items():
        column = names.index(name)
        for row, xs in enumerate([range(len(curve.training)), curve.seconds, curve.multiplications]):
            panel = panels[row, column]
            color = f"C{TRAINERS.index(trainer)}"
            panel.plot(xs, curve.training, color=color, alpha=0.7, lw=1, label=trainer)
            panel.set_yscale("log")
            if row:
                panel.set_xscale("log")
        panels[0, column].set_title(name)
    for row, name in zip(panels, ["iterations", "seconds", "multiplications"], strict=True):
        for panel in row:
            annotate(panel, name, "training error", legend=panel is panels[0, 0])
    return figure


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; return the exit status: 130 where Ctrl-C cut it short."""
    options = read(Options(), PROGRAM, __doc__, arguments)
    if min(options.seeds) < 0:
        reject(PROGRAM, f"--seeds {min(options.seeds)}: give at least 0")
    print(describe())
    runs: Runs = {}
    reasons: dict[str, str] = {}
    result: dict[str, Any] = {"left_out": reasons}
    with interruptible(result):
        run(options, runs, reasons)
    rows = summarise(runs)
    summary = medians(rows, ["set", "trainer"])
    answers = verdicts(summary, runs)
    print(f"\nmedians over seeds, after at most {options.iterations} iterations")
    for name in dict.fromkeys(row["set"] for row in summary):
        chosen = {row["trainer"]: row for row in summary if row["set"] == name}
        note = f", LM left out, {reasons[name]}" if name in reasons else ""
        show(result, f"{name}{note}", cells(columns(chosen.get("LM")), chosen.values()))
    print()
    for question, found in answers.items():
        failed = [name for name, so in found.items() if not so]
        but = f"; not {', '.join(failed)}" if failed else ""
        print(f"{question}: {sum(found.values())} of {len(found)} sets{but}")
    result |= {"rows": rows, "medians": summary, "verdicts": answers}
    result["curves"] = [{"set": n, "trainer": t, "seed": s, **vars(curve)} for (n, t, s), curve in runs.items()]
    return write(options, result, {"two_stage": lambda: plot(runs)} if rows else {})


if __name__ == "__main__":
    sys.exit(main())
