"""Against what people would use instead: how far do whitened layers get in equal steps, and in equal seconds?

Every method is trained on every task. Its learning rate and weight decay are searched with two seeds, of which the
worse counts: five rates (each twice the next, with two on either side of the best) and four decays; once for the least
training loss, once for the least loss on what is held out. With both, other seeds are trained, and with the former
those of equal seconds too: as many steps as fit into the time that SGD takes for its own. The learning rate rises over
the first tenth of the steps and falls as a cosine to 0.

Runs are kept in the folder, one a line. An interrupted benchmark goes on where it stopped, and several programs may
share a folder if they have different tasks.
"""

import dataclasses
import json
import math
import statistics
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from ..environment import describe
from ..options import PositiveInt, Switch, Wrong, choice, read, reject, value
from ..output import Column, annotate, cells, interruptible, replace, show, write
from ..timing import steady_allocator
from .methods import BOTH_SIDES, METHODS, find
from .runs import Setting, Store, pace
from .search import best_setting
from .tasks import TASKS

PROGRAM = "python -m benchmarks.peers"
SEARCHED = (1000, 1001)  # seeds of the search, none of those that are reported
QUICK = ("mlp-mnist1d", "mlp-diamonds")
CRITERIA = ("loss", "test_loss")
OURS = ("whitened-sgd", "whitened-adamw")  # and these with options


def known(name: str) -> str | Wrong:
    """Return the name of a method."""
    try:
        find(name)
    except ValueError as error:
        reason = "" if str(error) == name else f": {error}"
        return Wrong(f"invalid choice: {name!r} (choose from {', '.join(METHODS)}){reason}")
    return name


METHOD = value("method", known)


@dataclass(frozen=True)
class Options:
    """The options of the benchmark."""

    tasks: tuple[Annotated[str, choice(TASKS)], ...] = tuple(TASKS)
    # The names of those that whiten may have options after a colon.
    methods: tuple[Annotated[str, METHOD], ...] = (*METHODS, *BOTH_SIDES)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    steps: PositiveInt | None = None  # None is what each task needs
    quick: Switch = False  # two small tasks of 50 steps, one seed: three minutes
    out: Path = Path("results/peers")  # folder for the runs, results.json and peers.png

    def of_the_run(self) -> "Options":
        """The options with those that `quick` stands for."""
        return dataclasses.replace(self, tasks=QUICK, steps=50, seeds=(0,)) if self.quick else self


Row = dict[str, Any]


def measure(task: str, method: str, options: Options, store: Store, pace_ratio: float, bar: tqdm) -> Row:
    """Search, then train all seeds; return medians, least and most over the seeds."""
    steps = options.steps or TASKS[task].steps
    start = find(method)

    def trained(lr: float, weight_decay: float, seed: int, steps: int = steps) -> Row:
        bar.set_description(f"{task}, {method}, lr {lr:.2g}, decay {weight_decay:.2g}, seed {seed}")
        bar.update()
        return store.get(Setting(task, method, lr, weight_decay, seed, steps))

    def searched(lr: float, weight_decay: float) -> Row:
        runs = [trained(lr, weight_decay, seed) for seed in SEARCHED]
        return {name: max(run[name] for run in runs) for name in CRITERIA}

    row: Row = {"task": task, "method": method, "pace": pace_ratio}
    for criterion in CRITERIA:
        prefix = "" if criterion == "loss" else "test_"
        try:
            lr, decay = best_setting(searched, start.lr, start.decay, criterion)
        except ArithmeticError as error:
            print(f"{task}, {method}: {error}", file=sys.stderr)
            lr, decay = start.lr, start.decay
        losses = [trained(lr, decay, seed)[criterion] for seed in options.seeds]
        row |= {f"{prefix}lr": lr, f"{prefix}decay": decay, criterion: statistics.median(losses)}
        row |= {f"{criterion}_least": min(losses), f"{criterion}_most": max(losses)}
    at_best = [trained(row["test_lr"], row["test_decay"], seed)["test_accuracy"] for seed in options.seeds]
    accuracies = [one for one in at_best if one is not None]
    row["accuracy"] = statistics.median(accuracies) if len(accuracies) == len(at_best) else math.nan
    fewer = max(10, round(steps / pace_ratio))
    equal = [trained(row["lr"], row["decay"], seed, fewer)["loss"] for seed in options.seeds]
    return row | {"equal_steps": fewer, "equal_seconds": statistics.median(equal)}


COLUMNS: list[Column] = [
    ("task", "{task}"),
    ("method", "{method}"),
    ("lr", "{lr:.2g}"),
    ("decay", "{decay:.2g}"),
    ("loss", "{loss:.4g}"),
    ("least", "{loss_least:.4g}"),
    ("most", "{loss_most:.4g}"),
    ("held out", "{test_loss:.4g}"),
    ("accuracy", lambda row: "" if math.isnan(row["accuracy"]) else f"{row['accuracy']:.4f}"),
    ("a step", "{pace:.2f}"),
    ("in equal seconds", "{equal_seconds:.4g}"),
]
TITLE = "each method at its best learning rate and weight decay"
MEANING = """loss: mean training loss of the last tenth of the steps, median of the seeds, with least and most
held out, accuracy: on other samples, with the learning rate and decay that are best there
a step: seconds, as a multiple of SGD's; in equal seconds: the loss with as many steps as SGD's seconds allow"""


def leader(rows: Iterable[Row], criterion: str) -> Row:
    """Return the row with the least median."""
    return min(rows, key=lambda row: row[criterion])


def summarise(rows: list[Row]) -> list[Row]:
    """Compare, task by task, the best of SGD and AdamW with whitened layers with the best of all others."""
    summary = []
    for task in dict.fromkeys(row["task"] for row in rows):
        own = [row for row in rows if row["task"] == task and row["method"].partition(":")[0] in OURS]
        others = [row for row in rows if row["task"] == task and not row["method"].startswith("whitened")]
        if not own or not others:
            continue
        one: Row = {"task": task}
        for name in ("loss", "equal_seconds", "test_loss"):
            ours, theirs = leader(own, name), leader(others, name)
            one |= {f"{name}_ours": ours["method"], f"{name}_theirs": theirs["method"]}
            one[f"{name}_ratio"] = ours[name] / theirs[name] if theirs[name] else math.nan
        summary.append(one)
    return summary


SUMMARY: list[Column] = [
    ("task", "{task}"),
    ("whitened", "{loss_ours}"),
    ("best other", "{loss_theirs}"),
    ("loss", "{loss_ratio:.3f}"),
    ("in equal seconds", "{equal_seconds_ours}"),
    ("best other", "{equal_seconds_theirs}"),
    ("loss", "{equal_seconds_ratio:.3f}"),
    ("held out", "{test_loss_ours}"),
    ("best other", "{test_loss_theirs}"),
    ("loss", "{test_loss_ratio:.3f}"),
]
SUMMARY_TITLE = "the best of SGD and AdamW with whitened layers, divided by the best of all others"


def plot(rows: list[Row]) -> Figure:
    """Draw a panel for each task: the loss of each method after equal steps and after equal seconds, the best first."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    columns = min(2, len(tasks)) or 1
    lines = -(-len(tasks) // columns) or 1
    figure = Figure(figsize=(7 * columns, 4.2 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).flatten()
    for panel, task in zip(panels, tasks, strict=False):
        members = sorted((row for row in rows if row["task"] == task), key=lambda row: row["loss"])
        members = [row for row in members if math.isfinite(row["loss"])]
        places = range(len(members))
        spread = [
            [row["loss"] - row["loss_least"] for row in members],
            [row["loss_most"] - row["loss"] for row in members],
        ]
        if all(map(math.isfinite, spread[1])):
            panel.errorbar([row["loss"] for row in members], places, xerr=spread, fmt="o", label="equal steps")
        else:
            panel.plot([row["loss"] for row in members], places, "o", label="equal steps")
        panel.plot([row["equal_seconds"] for row in members], places, "x", label="equal seconds")
        panel.set_yticks(places, [row["method"] for row in members])
        panel.invert_yaxis()
        panel.set(xscale="log", title=task)
        annotate(panel, "training loss", legend=panel is panels[0])
    for panel in panels[len(tasks) :]:
        panel.set_visible(False)
    return figure


def content(rows: list[Row]) -> Mapping[str, Any]:
    """Make what is kept of the rows."""
    tables = [{"title": SUMMARY_TITLE, "cells": cells(SUMMARY, summarise(rows))}]
    return {"tables": [*tables, {"title": TITLE, "cells": cells(COLUMNS, rows)}], "rows": rows}


def paces(task: str, methods: list[str], options: Options) -> dict[str, float]:
    """Measure how long the methods' steps are, as multiples of SGD's; what the folder has is not measured again."""
    path = options.out / "runs" / f"{task}-paces.json"
    found: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}
    missing = [name for name in methods if name not in found]
    if missing:
        taken = pace(task, dict.fromkeys(["sgd", *missing]))
        found |= {name: taken[name] / taken["sgd"] for name in missing}
        path.parent.mkdir(parents=True, exist_ok=True)
        replace(path, json.dumps(found, indent=1).encode())
    return found


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; return the exit status: 130 where Ctrl-C cut it short."""
    options = read(Options(), PROGRAM, __doc__, arguments).of_the_run()
    for seed in set(options.seeds) & set(SEARCHED):
        reject(PROGRAM, f"--seeds {seed}: the search has seen it")
    steady_allocator()
    print(describe())
    rows: list[Row] = []
    result: dict[str, Any] = {}
    with interruptible(result), tqdm(unit="run", dynamic_ncols=True) as bar:
        for task in options.tasks:
            try:
                network = TASKS[task].network()
                TASKS[task].data()
                methods = [name for name in dict.fromkeys(options.methods) if find(name).suits(network)]
                ratios = paces(task, methods, options)
            except ModuleNotFoundError as error:
                reject(PROGRAM, f"--tasks {task}: {error.name} is missing: pip install 'whiten-layers[bench,peers]'")
            store = Store(options.out / "runs" / f"{task}.jsonl")
            for method in methods:
                rows.append(measure(task, method, options, store, ratios[method], bar))
    result |= content(rows)
    show({}, TITLE, cells(COLUMNS, rows))
    print(MEANING)
    show({}, SUMMARY_TITLE, cells(SUMMARY, summarise(rows)))
    return write(options, result, {"peers": lambda: plot(rows)})


if __name__ == "__main__":
    torch.set_num_threads(1)  # small networks are not faster with more, and runs do not depend on the machine's cores
    sys.exit(main())
