"""Against what people would use instead: how far do whitened layers get in equal steps, and in equal seconds?

Every method is trained on every task. Its learning rate and weight decay are searched: rates four times apart, then
twice apart until two are on either side of the best, and four decays. Between the best three rates a second seed
decides, by the worse of both. With those of the least training loss other seeds are trained; so with those, of all that
were tried, of the least loss on samples that were held out, and tested on others. For equal seconds, as many steps as
fit into the time that SGD takes for its own, the rate is chosen again among half, the same and twice. The rate rises
over the first tenth of the steps and falls as a cosine to 0.

Whitened layers were tuned on half of the tasks; the others confirm.

Runs are kept in the folder, one a line, and found again as long as the method's first losses are the same. An
interrupted benchmark goes on where it stopped, and several programs may share a folder if they have different tasks.
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
from .methods import METHODS, VARIANTS, find
from .runs import LOSSES, Setting, Store, pace, version_of
from .search import search
from .tasks import TASKS, TUNED

PROGRAM = "python -m benchmarks.peers"
SEARCHED = (1000, 1001)  # seeds of the search and of its finalists, none of those that are reported
QUICK = ("mlp-mnist1d", "mlp-diamonds")
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
    # Names may have options after a colon: whitened-sgd:power=1,rank=8, kfac:damping=0.1.
    methods: tuple[Annotated[str, METHOD], ...] = (*METHODS, *VARIANTS)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    steps: PositiveInt | None = None  # None is what each task needs
    quick: Switch = False  # two small tasks of 30 steps, one seed: three minutes
    out: Path = Path("results/peers")  # folder for the runs, results.json and peers.png

    def of_the_run(self) -> "Options":
        """The options with those that `quick` stands for."""
        return dataclasses.replace(self, tasks=QUICK, steps=30, seeds=(0,)) if self.quick else self


Row = dict[str, Any]


def measure(task: str, method: str, options: Options, store: Store, timed: Row, bar: tqdm) -> Row:
    """Search, then train all seeds; return medians, least and most over the seeds."""
    steps, start = options.steps or TASKS[task].steps, find(method)

    def trained(lr: float, decay: float, seed: int, steps: int = steps) -> Row:
        bar.set_description(f"{task}, {method}, lr {lr:.2g}, decay {decay:.2g}, seed {seed}")
        bar.update()
        return store.get(Setting(task, method, lr, decay, seed, steps, timed["version"]))

    def medians(lr: float, decay: float, steps: int = steps) -> Row:
        runs = [trained(lr, decay, seed, steps) for seed in options.seeds]
        accuracies = [run["test_accuracy"] for run in runs]
        found: Row = {name: statistics.median(run[name] for run in runs) for name in LOSSES}
        found |= {"least": min(run["loss"] for run in runs), "most": max(run["loss"] for run in runs)}
        return found | {"accuracy": None if None in accuracies else statistics.median(accuracies)}

    def again(lr: float, decay: float) -> Row:
        return trained(lr, decay, SEARCHED[1])

    found = search(lambda lr, decay: trained(lr, decay, SEARCHED[0]), start.lr, start.decay)
    lr, decay = found.confirmed("loss", again)
    row: Row = {"task": task, "method": method, "lr": lr, "decay": decay, "is_inside": found.is_inside}
    row |= {name: value for name, value in medians(lr, decay).items() if name in ("loss", "least", "most")}
    test_lr, test_decay = found.confirmed("valid_loss", again)
    tested = medians(test_lr, test_decay)
    row |= {"test_lr": test_lr, "test_decay": test_decay}
    row |= {"test_loss": tested["test_loss"], "accuracy": tested["accuracy"]}
    fewer = max(10, round(steps / timed["pace"]))
    near = [lr] if fewer == steps else [lr / 2, lr, 2 * lr]
    fast = min(near, key=lambda rate: trained(rate, decay, SEARCHED[0], fewer)["loss"])
    row |= {"pace": timed["pace"], "equal_steps": fewer, "equal_lr": fast}
    return row | {"equal_seconds": medians(fast, decay, fewer)["loss"]}


COLUMNS: list[Column] = [
    ("task", "{task}"),
    ("method", "{method}"),
    ("lr", lambda row: f"{row['lr']:.2g}" + ("" if row["is_inside"] else " (edge)")),
    ("decay", "{decay:.2g}"),
    ("loss", "{loss:.4g}"),
    ("least", "{least:.4g}"),
    ("most", "{most:.4g}"),
    ("held out", "{test_loss:.4g}"),
    ("accuracy", lambda row: "" if row["accuracy"] is None else f"{row['accuracy']:.4f}"),
    ("a step", "{pace:.2f}"),
    ("in equal seconds", "{equal_seconds:.4g}"),
]
TITLE = "each method at its best learning rate and weight decay"
MEANING = """loss: mean training loss of the last tenth of the steps, median of the seeds, with least and most
held out, accuracy: of testing, with the learning rate and decay that were best on the samples for choosing
a step: the processor's seconds, as a multiple of SGD's; in equal seconds: the loss with as many steps as SGD's allow
(edge): no best was found inside the rates that were tried"""


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
        one: Row = {"task": task, "tuned": task in TUNED}
        for name in ("loss", "equal_seconds", "test_loss"):
            ours, theirs = leader(own, name), leader(others, name)
            one |= {f"{name}_ours": ours["method"], f"{name}_theirs": theirs["method"]}
            one[f"{name}_ratio"] = ours[name] / theirs[name] if theirs[name] else math.nan
        summary.append(one)
    return sorted(summary, key=lambda one: not one["tuned"])


SUMMARY: list[Column] = [
    ("task", "{task}"),
    ("tuned on", lambda row: "yes" if row["tuned"] else "no"),
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
            [row["loss"] - row["least"] for row in members],
            [row["most"] - row["loss"] for row in members],
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


def timings(task: str, methods: list[str], options: Options) -> dict[str, Row]:
    """Measure how long the methods' runs take, as multiples of SGD's; what the folder has is not measured again."""
    path = options.out / "runs" / f"{task}-pace.json"
    kept: dict[str, Row] = json.loads(path.read_text()) if path.exists() else {}
    steps = options.steps or TASKS[task].steps
    found = {name: {"version": version_of(task, name), "steps": steps} for name in methods}
    missing = [name for name, one in found.items() if {**kept.get(name, {}), "pace": 0} != one | {"pace": 0}]
    if missing:
        taken = pace(task, dict.fromkeys(["sgd", *missing]), steps)
        kept |= {name: found[name] | {"pace": taken[name] / taken["sgd"]} for name in missing}
        path.parent.mkdir(parents=True, exist_ok=True)
        replace(path, json.dumps(kept, indent=1).encode())
    return {name: kept[name] for name in methods}


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
                timed = timings(task, methods, options)
            except ModuleNotFoundError as error:
                reject(PROGRAM, f"--tasks {task}: {error.name} is missing: pip install 'whiten-layers[bench,peers]'")
            store = Store(options.out / "runs" / f"{task}.jsonl")
            for method in methods:
                rows.append(measure(task, method, options, store, timed[method], bar))
    result |= content(rows)
    show({}, TITLE, cells(COLUMNS, rows))
    print(MEANING)
    show({}, SUMMARY_TITLE, cells(SUMMARY, summarise(rows)))
    return write(options, result, {"peers": lambda: plot(rows)})


if __name__ == "__main__":
    torch.set_num_threads(1)  # small networks are not faster with more, and runs do not depend on the machine's cores
    sys.exit(main())
