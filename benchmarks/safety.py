"""With the defaults, at the rate that is best for the plain network: is the whitened one ever behind, does it diverge?

On tasks of many kinds, plain and whitened networks are trained from the same initial weights, on the same batches and
with the same noise, at several learning rates around the plain network's best. They take turns by steps. If the best
rate has no other at half or twice of it, that one is added.

The rate is constant: from the first step on, when the statistics are those of a single batch, until the last, it is the
rate that stands in the table. A schedule that starts and ends low would hide both a bad start and a restless end.
"""

import math
import statistics
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Generator
from tqdm import tqdm

from whiten_layers import GradientTransform, whiten

from .environment import describe
from .options import PositiveFloat, PositiveInt, choice, read, reject
from .output import Column, annotate, cells, interruptible, show, write
from .safety_tasks import TASKS, Task
from .timing import steady_allocator
from .training import OPTIMIZERS
from .transforms import TransformOptions, settings_of

PROGRAM = "python -m benchmarks.safety"
DIVERGED = 1.5  # times the first loss
EXTRA = 4  # how often learning rates are added at most
SLOW, WORTH_TIMING = 1.5, 20.0  # times the plain seconds, for plain steps of so many milliseconds
TWICE = 1.05  # how far behind a network may be at twice the best rate


@dataclass(frozen=True)
class Options:
    """The options of the benchmark."""

    tasks: tuple[Annotated[str, choice(TASKS)], ...] = tuple(TASKS)
    optimizer: tuple[Annotated[str, choice(OPTIMIZERS)], ...] = ("sgd", "adamw")
    factors: tuple[PositiveFloat, ...] = (0.25, 0.5, 1.0, 2.0, 4.0)  # of the learning rate that the task names
    steps: PositiveInt | None = None  # None is what the task needs
    seeds: tuple[int, ...] = (0, 1, 2)
    out: Path = Path("results/safety")  # folder for results.json and safety.png
    compare: tuple[str, ...] = ()  # several transforms, each as NAME=VALUE[,NAME=VALUE]: power=1 power=0.5,rank=8
    transform: TransformOptions = field(default_factory=TransformOptions)

    def variants(self) -> dict[str, GradientTransform | None]:
        """The transforms to compare, by name; the plain network has none."""
        if not self.compare:
            return {"plain": None, "whitened": self.transform.make()}
        return {"plain": None, **{text: self.transform.changed(text).make() for text in self.compare}}


@dataclass
class Run:
    """The training of one network: the loss of every step, and the seconds of all steps."""

    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def is_finite(self) -> bool:
        """Whether the run went on to its end."""
        return all(map(math.isfinite, self.losses))

    @property
    def final_loss(self) -> float:
        """The mean loss of the last tenth of the steps, of at least ten; infinite if a loss was not finite."""
        return statistics.fmean(self.losses[-max(10, len(self.losses) // 10) :]) if self.is_finite else math.inf

    @property
    def diverged(self) -> bool:
        """Whether the run ended well above where it began."""
        return not self.final_loss <= DIVERGED * self.losses[0]


Runs = dict[tuple[str, float, int], Run]  # by variant, learning rate, seed
Measured = dict[tuple[str, str], Runs]  # by task, optimizer


def train(
    task: Task, variants: Mapping[str, GradientTransform | None], optimizer: str, lr: float, seed: int, bar: tqdm
) -> Runs:
    """Train all variants, which take turns by steps; one whose loss is no longer finite stops."""
    runs: Runs = {(name, lr, seed): Run() for name in variants}
    trained = {}
    for key, transform in zip(runs, variants.values(), strict=True):
        torch.manual_seed(seed)
        networks = task.networks()
        for network in networks if transform is not None else ():
            whiten(network, transform)
        trained[key] = networks, tuple(OPTIMIZERS[optimizer](network.parameters(), lr) for network in networks)
    for step, batch in enumerate(islice(task.batches(Generator().manual_seed(seed)), task.steps)):
        # The second to use a batch finds it in the cache: each is the second in turn.
        for key in list(trained) if step % 2 else list(trained)[::-1]:
            networks, methods = trained[key]
            torch.manual_seed(1_000_003 * seed + step)  # dropout and the like are the same for all
            start = time.perf_counter()
            loss = task.update(networks, methods, batch)
            runs[key].seconds += time.perf_counter() - start
            runs[key].losses.append(loss)
            if not math.isfinite(loss):
                del trained[key]
        bar.update()
    return runs


def rates(runs: Runs) -> list[dict[str, Any]]:
    """Summarise the seeds: one row for each variant and learning rate, the lowest rate first."""
    rows = []
    for variant, lr in sorted({(variant, lr): None for variant, lr, _ in runs}, key=lambda key: key[1]):
        members = [run for (name, rate, _), run in runs.items() if (name, rate) == (variant, lr)]
        losses = [run.final_loss for run in members]
        row = {"variant": variant, "lr": lr, "loss": statistics.median(losses), "least": min(losses)}
        rows.append({**row, "most": max(losses), "diverged": sum(run.diverged for run in members)})
    return rows


def best_rate(runs: Runs) -> float:
    """Return the learning rate with the least median loss of the plain network."""
    return min((row for row in rates(runs) if row["variant"] == "plain"), key=lambda row: row["loss"])["lr"]


def measure(
    runs: Runs,
    label: str,
    task: Task,
    variants: Mapping[str, GradientTransform | None],
    optimizer: str,
    options: Options,
) -> None:
    """Fill `runs` with all learning rates, and those that are added so that the best has half and twice beside it."""
    missing = sorted(task.centre(optimizer) * factor for factor in dict.fromkeys(options.factors))
    measured: list[float] = []
    with tqdm(desc=label, total=0, unit="step", dynamic_ncols=True) as bar:
        while missing and len(measured) < len(options.factors) + EXTRA:
            bar.total += len(missing) * len(options.seeds) * task.steps
            for lr in missing:
                bar.set_postfix(lr=f"{lr:g}")
                for seed in options.seeds:
                    runs |= train(task, variants, optimizer, lr, seed, bar)
            measured += missing
            best = best_rate(runs)
            missing = [lr for lr in (best / 2, 2 * best) if lr not in measured]


def ratio(ours: float, theirs: float) -> float:
    """Divide two losses; equal ones, even infinite or zero, have the ratio one."""
    if ours == theirs:
        return 1.0
    return ours / theirs if theirs else math.inf


def summarise(runs: Runs, variant: str) -> dict[str, Any]:
    """Compare a variant with the plain network.

    Seconds are those of pairs of runs that both went on to their end.
    """
    plain, ours = ({row["lr"]: row for row in rates(runs) if row["variant"] == name} for name in ("plain", variant))
    best = best_rate(runs)
    pairs = [(run, runs[variant, lr, seed]) for (name, lr, seed), run in runs.items() if name == "plain"]
    timed = [pair for pair in pairs if all(run.is_finite for run in pair)]
    seconds = [sum(run.seconds for run in side) for side in zip(*timed, strict=True)] or [math.nan, math.nan]
    steps = sum(len(one.losses) for one, _ in timed) or math.nan
    twice = 2 * best
    row = {
        "variant": variant,
        "lr": best,
        "plain": plain[best]["loss"],
        "whitened": ours[best]["loss"],
        "ratio": ratio(ours[best]["loss"], plain[best]["loss"]),
        "ratio_at_twice": ratio(ours[twice]["loss"], plain[twice]["loss"]) if twice in ours else math.nan,
        "plain_diverged": sum(one.diverged for one, _ in pairs),
        "diverged": sum(other.diverged for _, other in pairs),
        "diverged_alone": sum(other.diverged and not one.diverged for one, other in pairs),
        "runs": len(pairs),
        "best_whitened": min(row["loss"] for row in ours.values()),
        "ms": 1e3 * seconds[0] / steps,
        "seconds_ratio": seconds[1] / seconds[0],
    }
    return {**row, "verdict": verdict(row)}


def verdict(row: Mapping[str, Any]) -> str:
    """Say "ok", or what failed."""
    failed = {
        "behind": not row["ratio"] <= 1,
        "behind at twice": not row["ratio_at_twice"] <= TWICE,
        "diverges": row["diverged_alone"] > 0,
        "slow": row["ms"] >= WORTH_TIMING and row["seconds_ratio"] > SLOW,
    }
    return ", ".join(name for name, has_failed in failed.items() if has_failed) or "ok"


def columns(several: bool) -> list[Column]:
    """The columns of the table of `summarise`'s rows; there is one for the variant if there are several."""
    return [
        ("task", "{task}"),
        ("optimizer", "{optimizer}"),
        *([("transform", "{variant}")] if several else []),
        ("best lr", "{lr:.3g}"),
        ("plain", "{plain:.4g}"),
        ("whitened", "{whitened:.4g}"),
        ("ratio", "{ratio:.3f}"),
        ("at twice", "{ratio_at_twice:.3f}"),
        ("diverged", "{plain_diverged} / {diverged} of {runs}"),
        ("at any lr", "{best_whitened:.4g}"),
        ("ms a step", "{ms:.1f}"),
        ("seconds", "{seconds_ratio:.2f}"),
        ("verdict", "{verdict}"),
    ]


TITLE = "plain and whitened networks, at the learning rate that is best for the plain one"
RATE_COLUMNS: list[Column] = [
    ("", "{variant}"),
    ("lr", "{lr:.3g}"),
    ("loss", "{loss:.4g}"),
    ("least", "{least:.4g}"),
    ("most", "{most:.4g}"),
    ("diverged", "{diverged}"),
]
MEANING = f"""loss: the mean of the last tenth of the steps, median of the seeds
ratio: whitened to plain at the rate that is best for plain, and at twice that rate
diverged: runs, plain and whitened, with a loss that is not finite, or ends above {DIVERGED:g} times the first
at any lr: the best whitened loss; seconds: whitened to plain, of all steps
verdict: behind (ratio above 1), behind at twice (above {TWICE:g}), diverges (where plain does not),
  slow (above {SLOW:g}, where a plain step takes {WORTH_TIMING:g} ms or more)"""


def in_place(line: list[str], head: list[str]) -> str:
    """Format a line of a table whose other lines are not known yet."""
    widths = [max(map(len, TASKS)), *(max(9, len(cell)) for cell in head[1:])]
    return "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))


def content(measured: Measured, rows: list[dict[str, Any]], form: list[Column]) -> dict[str, Any]:
    """Make what is kept of the runs: first the table of the rows, then one of the learning rates for each task."""
    tables = [{"title": TITLE, "cells": cells(form, rows)}]
    kept: dict[str, Any] = {"tables": tables, "rows": rows, "rates": [], "runs": []}
    for (name, optimizer), runs in measured.items():
        given = {"task": name, "optimizer": optimizer}
        tables.append({"title": f"{name}, {optimizer}", "cells": cells(RATE_COLUMNS, rates(runs))})
        kept["rates"] += [{**given, **row} for row in rates(runs)]
        for (variant, lr, seed), run in runs.items():
            one = {**given, "variant": variant, "lr": lr, "seed": seed, "steps": len(run.losses)}
            one |= {"first_loss": run.losses[0], "final_loss": run.final_loss, "diverged": run.diverged}
            kept["runs"].append({**one, "total_seconds": run.seconds})
    return kept


def draw(panel: Axes, runs: Runs) -> None:
    """Draw final losses against learning rates, medians with least and most; twice the first loss is the ceiling."""
    ceiling = 2 * statistics.median(run.losses[0] for run in runs.values())  # before any step: the same at every rate
    for number, variant in enumerate(dict.fromkeys(name for name, _, _ in runs)):
        rows = [row for row in rates(runs) if row["variant"] == variant]
        middle, least, most = ([min(row[name], ceiling) for row in rows] for name in ("loss", "least", "most"))
        bars = [
            [m - one for m, one in zip(middle, least, strict=True)],
            [o - m for m, o in zip(middle, most, strict=True)],
        ]
        color = f"C{number - 1}" if number else "tab:gray"
        panel.errorbar([row["lr"] for row in rows], middle, bars, color=color, marker="o", capsize=3, label=variant)
    panel.axvline(best_rate(runs), color="tab:gray", linestyle=":")
    panel.set(xscale="log", yscale="log")
    shown = sorted({lr for _, lr, _ in runs})
    panel.set_xticks(shown, [f"{lr:.3g}" for lr in shown])
    panel.set_xticks([], minor=True)


def plot(measured: Measured) -> Figure:
    """Draw a panel for each task, below one another, and optimizer, side by side."""
    names, optimizers = (list(dict.fromkeys(key[place] for key in measured)) for place in (0, 1))
    size = len(names) or 1, len(optimizers) or 1
    figure = Figure(figsize=(5 * size[1], 3.2 * size[0]), layout="constrained")
    panels = figure.subplots(*size, squeeze=False)
    for (name, optimizer), runs in measured.items():
        panel = panels[names.index(name)][optimizers.index(optimizer)]
        draw(panel, runs)
        panel.set_title(f"{name}, {optimizer}")
        annotate(panel, "learning rate", "final loss", legend=panel is panels[0][0])
    return figure


def make_tasks(options: Options) -> dict[str, Task]:
    """Make the tasks, and load their data; a package that is missing ends the program with one line."""
    given = () if options.steps is None else (options.steps,)
    made = {}
    for name in options.tasks:
        try:
            made[name] = TASKS[name](*given)
        except ModuleNotFoundError as error:
            reject(PROGRAM, f"--tasks {name}: {error.name} is missing: pip install 'whiten-layers[bench]'")
    return made


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; return the exit status: 130 where Ctrl-C cut it short."""
    options = read(Options(), PROGRAM, __doc__, arguments)
    try:
        variants = options.variants()
    except ValueError as error:
        reject(PROGRAM, str(error))
    tasks = make_tasks(options)
    steady_allocator()
    print(describe())
    measured: Measured = {}
    rows: list[dict[str, Any]] = []
    settings = {name: settings_of(transform) for name, transform in variants.items() if transform is not None}
    result: dict[str, Any] = {"transforms": settings}
    form = columns(several=len(settings) > 1)
    with interruptible(result):
        for name, task in tasks.items():
            for optimizer in dict.fromkeys(options.optimizer):
                runs = measured[name, optimizer] = {}
                measure(runs, f"{name}, {optimizer}", task, variants, optimizer, options)
                rows += ({"task": name, "optimizer": optimizer} | summarise(runs, one) for one in settings)
                head, *lines = cells(form, rows)
                for line in ([] if len(measured) > 1 else [head]) + lines[-len(settings) :]:
                    print(in_place(line, head), flush=True)
            # As one that was interrupted, which it is if nothing follows.
            write(options, {**result, **content(measured, rows, form), "interrupted": True})
    measured = {key: runs for key, runs in measured.items() if runs}  # it may have been cut short at once
    result |= content(measured, rows, form)
    show({}, TITLE, cells(form, rows))
    print(MEANING)
    return write(options, result, {"safety": lambda: plot(measured)})


if __name__ == "__main__":
    sys.exit(main())
