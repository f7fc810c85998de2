"""Does a network of whitened layers converge in fewer steps and less time than the plain one?

Trains the same network plain and whitened: same initial weights, same batches, same schedule. Of
several learning rates the one that is best for the plain network is used for both.
"""

import argparse
import math
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import whiten_layers.models
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import nn

from whiten_layers import GradientTransform, whiten

from .data import DATASETS, Images
from .environment import describe, environment
from .output import aligned, write
from .training import (
    OPTIMIZERS,
    SMOOTHING,
    Curve,
    add_transform_options,
    changed,
    positive,
    train,
    transform_from,
    transform_options,
)

PLAIN = [name for name in whiten_layers.models.__all__ if not name.startswith("whitened_")]
# Those for images as small as the data sets'.
MODELS = [name for name in PLAIN if getattr(whiten_layers.models, name).__module__.endswith("resnet_cifar")]
EPOCHS = {"digits": 20, "crops": 5}
Runs = dict[tuple[str, float, int], Curve]  # by variant, learning rate, seed


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; a wrong option ends the program with one line and status 2."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.convergence", description=__doc__.split("\n\n")[0])
    parser.add_argument("--dataset", choices=DATASETS, default="digits")
    parser.add_argument("--model", choices=MODELS, default="resnet20")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="sgd")
    parser.add_argument(
        "--lr", type=positive(float), nargs="+", help="several: the plain network's best is used (0.1; adamw 0.003)"
    )
    parser.add_argument("--epochs", type=positive(int), help="default: 20 for digits, 5 for crops")
    parser.add_argument("--batch-size", type=positive(int), default=128)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--out", type=Path, default=Path("results/convergence"), help="folder for results.json and curves.png"
    )
    add_transform_options(parser)
    parser.add_argument(
        "--compare",
        nargs="+",
        default=[],
        metavar="NAME=VALUE[,NAME=VALUE]",
        help="several transforms, each given by what is different in it: rank=8 transform=optimal_gain",
    )
    options = parser.parse_args(arguments)
    options.lr = options.lr or [{"sgd": 0.1, "adamw": 0.003}[options.optimizer]]
    options.epochs = options.epochs or EPOCHS[options.dataset]
    options.data = DATASETS[options.dataset]()
    images = len(options.data.train[1])
    if options.batch_size > images:
        parser.error(f"--batch-size {options.batch_size}: {options.dataset} has {images} training images")
    try:
        options.transforms = {"whitened": transform_from(options)}
        if options.compare:
            options.transforms = {text: transform_from(changed(options, text)) for text in options.compare}
    except ValueError as error:
        parser.error(str(error))
    return options


def variants(options: argparse.Namespace) -> dict[str, Callable[[], nn.Module]]:
    """What makes the plain network, and one with each transform."""

    def plain() -> nn.Module:
        return getattr(whiten_layers.models, options.model)(num_classes=options.data.num_classes)

    def whitened(transform: GradientTransform) -> nn.Module:
        return whiten(plain(), transform)

    return {"plain": plain, **{name: partial(whitened, one) for name, one in options.transforms.items()}}


def run(
    runs: Runs,
    networks: Mapping[str, Callable[[], nn.Module]],
    data: Images,
    rates: list[float],
    seeds: list[int],
    **settings: Any,
) -> float:
    """Fill `runs`, the first network at every learning rate and the others at its best; return that rate."""
    baseline, *others = networks

    def measure(variant: str, lr: float, seed: int) -> None:
        torch.manual_seed(seed)
        network = networks[variant]()
        label = f"{variant:8}  lr {lr:g}  seed {seed}"
        curve = runs[variant, lr, seed] = Curve()
        train(network, data, lr=lr, seed=seed, label=label, curve=curve, **settings)

    def last(curve: Curve) -> float:
        return curve.final_loss if math.isfinite(curve.final_loss) else math.inf  # a rate that diverged is the worst

    # At one rate all take turns, so that a machine that slows down slows all.
    best = rates[0]
    if len(rates) > 1:
        for lr in rates:
            for seed in seeds:
                measure(baseline, lr, seed)
        best = min(rates, key=lambda lr: statistics.median(last(runs[baseline, lr, seed]) for seed in seeds))
    for seed in seeds:
        for variant in others if len(rates) > 1 else networks:
            measure(variant, best, seed)
    return best


def summarise(runs: Runs, baseline: str = "plain") -> list[dict]:
    """One row a run; the target of a run is the final smoothed loss of the baseline's with its seed and rate."""
    rows = []
    for (variant, lr, seed), curve in runs.items():
        reached = curve.steps_until(runs.get((baseline, lr, seed), Curve()).final_loss)
        rows.append(
            {
                "variant": variant,
                "lr": lr,
                "seed": seed,
                "steps": len(curve.losses),
                "seconds": curve.seconds[-1] if curve.seconds else 0.0,
                "training_loss": curve.final_loss,
                "test_loss": curve.test_loss,
                "test_accuracy": curve.test_accuracy,
                f"steps_to_{baseline}": reached,
                f"seconds_to_{baseline}": None if reached is None else curve.seconds[reached - 1],
            }
        )
    return rows


def medians(rows: list[dict], variant: str, lr: float) -> dict:
    """The median over seeds of every figure; a run that never reached the plain loss counts as infinitely late."""
    chosen = [row for row in rows if row["variant"] == variant and row["lr"] == lr]
    if not chosen:
        return {}
    median = {"variant": variant, "lr": lr, "seed": "median"}
    for key in [key for key in chosen[0] if key not in median]:
        median[key] = statistics.median(float("inf") if row[key] is None else row[key] for row in chosen)
    return median


def table(rows: list[dict], baseline: str = "plain") -> str:
    """The rows of `summarise` and `medians`, aligned."""
    heads = [
        "",
        "lr",
        "seed",
        "steps",
        "seconds",
        "training loss",
        "test loss",
        "test acc.",
        f"steps to {baseline}",
        f"seconds to {baseline}",
    ]
    lines = [heads]
    for row in rows:
        steps, seconds = (row[f"{unit}_to_{baseline}"] for unit in ("steps", "seconds"))
        late = steps is None or steps == float("inf")
        lines.append(
            [
                row["variant"],
                f"{row['lr']:g}",
                str(row["seed"]),
                f"{row['steps']:g}",
                f"{row['seconds']:.1f}",
                f"{row['training_loss']:.4f}",
                f"{row['test_loss']:.4f}",
                f"{row['test_accuracy']:.4f}",
                "never" if late else f"{steps:g}",
                "never" if late else f"{seconds:.1f}",
            ]
        )
    return aligned(lines)


def draw(panels: Sequence[Axes], runs: Runs, lr: float, baseline: str = "plain") -> None:
    """Draw the smoothed loss of every run at the rate `lr` into two panels, against steps and against seconds."""
    names = list(dict.fromkeys(variant for variant, _, _ in runs))
    colors = {variant: "tab:gray" if variant == baseline else f"C{i}" for i, variant in enumerate(names)}
    for (variant, rate, _), curve in runs.items():
        losses = curve.smoothed()
        if rate != lr or not losses:
            continue
        steps = range(SMOOTHING, len(curve.losses) + 1)
        for panel, xs in zip(panels, [steps, curve.seconds[SMOOTHING - 1 :]], strict=True):
            known = variant in panel.get_legend_handles_labels()[1]
            panel.plot(xs, losses, color=colors[variant], alpha=0.8, label=None if known else variant)
    for panel, name in zip(panels, ["steps", "seconds of training"], strict=True):
        panel.set_xlabel(name)
        panel.set_yscale("log")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel(f"training loss (mean of {SMOOTHING} steps)")
    if panels[0].lines:
        panels[0].legend()


def plot(runs: Runs, lr: float, title: str) -> Figure:
    """The curves of every run at the rate `lr`."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    draw(figure.subplots(1, 2, sharey=True), runs, lr)
    figure.suptitle(title)
    return figure


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; return the exit status: 130 where Ctrl-C cut it short."""
    options = parse(arguments)
    print(describe())
    runs: Runs = {}
    best, interrupted = options.lr[0], False
    try:
        settings = {name: getattr(options, name) for name in ("optimizer", "epochs", "batch_size")}
        best = run(runs, variants(options), options.data, options.lr, options.seeds, **settings)
    except KeyboardInterrupt:
        interrupted = True
        print("\ninterrupted: what follows is what was measured until then", file=sys.stderr)
    rows, names = summarise(runs), ["plain", *options.transforms]
    summary = [row for row in (medians(rows, name, best) for name in names) if row]
    parts = [part for transform in options.transforms.values() for part in transform.parts()]
    transforms = "; ".join(part.extra_repr() for part in parts if part.extra_repr())
    title = f"{options.model} on {options.dataset}, {options.optimizer}, lr {best:g}, {transforms}"
    print(f"\n{title}\n{table([*rows, *(summary if len(options.seeds) > 1 else [])])}")
    print(f"'to plain': until the mean loss of {SMOOTHING} steps is at most the plain run's last, with the same seed.")
    chosen = {key: value for key, value in vars(options).items() if key not in ("transforms", "data", "out")}
    result = {"environment": environment(), "options": chosen, "lr": best}
    result["transforms"] = {name: transform_options(transform) for name, transform in options.transforms.items()}
    result |= {"interrupted": interrupted, "rows": rows, "medians": summary}
    result["curves"] = [{"variant": v, "lr": r, "seed": s, **vars(c)} for (v, r, s), c in runs.items()]
    write(options.out, result, {"curves": lambda: plot(runs, best, title)})
    return 130 if interrupted else 0


if __name__ == "__main__":
    sys.exit(main())
