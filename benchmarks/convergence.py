"""Does a network of whitened layers converge in fewer steps and less time than the plain one?

Trains the same network plain and whitened, from the same initial weights, on the same batches, with the same schedule.
Of several learning rates the one that is best for the plain network is used for both.
"""

import math
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import whiten_layers.models
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import nn

from whiten_layers import GradientTransform, whiten

from .data import DATASETS, Images
from .environment import describe
from .options import PositiveFloat, PositiveInt, choice, read, reject
from .output import Column, annotate, cells, interruptible, medians, show, write
from .training import SMOOTHING, Curve, train
from .transforms import TransformOptions, settings_of

PROGRAM = "python -m benchmarks.convergence"
PLAIN = [name for name in whiten_layers.models.__all__ if not name.startswith("whitened_")]
# Those for images as small as the data sets'.
MODELS = [name for name in PLAIN if getattr(whiten_layers.models, name).__module__.endswith("resnet_cifar")]
EPOCHS = {"digits": 20, "crops": 5}
Runs = dict[tuple[str, float, int], Curve]  # by variant, learning rate, seed


@dataclass(frozen=True)
class Options:
    """The options of the benchmark."""

    dataset: Annotated[str, choice(DATASETS)] = "digits"
    model: Annotated[str, choice(MODELS)] = "resnet20"
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: tuple[PositiveFloat, ...] = ()  # of several the plain network's best is used; none is 0.1 (adamw 0.003)
    epochs: PositiveInt | None = None  # None is 20 for digits and 5 for crops
    batch_size: PositiveInt = 128
    seeds: tuple[int, ...] = (0, 1, 2)
    out: Path = Path("results/convergence")  # folder for results.json and curves.png
    compare: tuple[str, ...] = ()  # several transforms, each as NAME=VALUE[,NAME=VALUE]: rank=8 transform=optimal_gain
    transform: TransformOptions = field(default_factory=TransformOptions)

    def transforms(self) -> dict[str, GradientTransform]:
        """The transforms to compare, by name."""
        if not self.compare:
            return {"whitened": self.transform.make()}
        return {text: self.transform.changed(text).make() for text in self.compare}


def variants(
    model: str, num_classes: int, transforms: dict[str, GradientTransform]
) -> dict[str, Callable[[], nn.Module]]:
    """Functions that make the plain network, and one with each transform."""
    plain = partial(getattr(whiten_layers.models, model), num_classes=num_classes)

    def whitened(transform: GradientTransform) -> nn.Module:
        return whiten(plain(), transform)

    return {"plain": plain, **{name: partial(whitened, one) for name, one in transforms.items()}}


def run(
    runs: Runs,
    networks: Mapping[str, Callable[[], nn.Module]],
    data: Images,
    rates: Sequence[float],
    seeds: Sequence[int],
    **settings: Any,
) -> float:
    """Fill `runs`, the first network at every learning rate and the others at its best; return that rate."""
    baseline, *others = networks

    def measure(variant: str, lr: float, seed: int) -> None:
        torch.manual_seed(seed)
        network = networks[variant]()
        name = f"{variant:8}  lr {lr:g}  seed {seed}"
        curve = runs[variant, lr, seed] = Curve()
        train(network, data, lr=lr, seed=seed, label=name, curve=curve, **settings)

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
    """One row for each run; its target is the final smoothed loss of the baseline with the same seed and rate."""
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


def columns(baseline: str = "plain") -> list[Column]:
    """The columns of the table of `summarise`'s rows."""

    def reached(row: dict, unit: str, form: str) -> str:
        value = row[f"{unit}_to_{baseline}"]
        return "never" if value is None or value == math.inf else format(value, form)

    return [
        ("", "{variant}"),
        ("lr", "{lr:g}"),
        ("seed", "{seed}"),
        ("steps", "{steps:g}"),
        ("seconds", "{seconds:.1f}"),
        ("training loss", "{training_loss:.4f}"),
        ("test loss", "{test_loss:.4f}"),
        ("test acc.", "{test_accuracy:.4f}"),
        (f"steps to {baseline}", lambda row: reached(row, "steps", "g")),
        (f"seconds to {baseline}", lambda row: reached(row, "seconds", ".1f")),
    ]


def curves(runs: Runs) -> list[dict]:
    """The curves of all runs, for a JSON file."""
    return [{"variant": v, "lr": r, "seed": s, **vars(curve)} for (v, r, s), curve in runs.items()]


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
            panel.plot(xs, losses, color=colors[variant], alpha=0.8, label=variant)
    for panel, name in zip(panels, ["steps", "seconds of training"], strict=True):
        panel.set_yscale("log")
        annotate(panel, name, f"training loss (mean of {SMOOTHING} steps)", legend=panel is panels[0])


def plot(runs: Runs, lr: float, title: str) -> Figure:
    """Draw the curves of every run at the rate `lr`."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    draw(figure.subplots(1, 2, sharey=True), runs, lr)
    figure.suptitle(title)
    return figure


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; return the exit status: 130 where Ctrl-C cut it short."""
    options = read(Options(), PROGRAM, __doc__, arguments)
    rates = options.lr or {"sgd": (0.1,), "adamw": (0.003,)}[options.optimizer]
    options = replace(options, lr=rates, epochs=options.epochs or EPOCHS[options.dataset])
    data = DATASETS[options.dataset]()
    if options.batch_size > len(data.train[1]):
        images = f"{options.dataset} has {len(data.train[1])} training images"
        reject(PROGRAM, f"--batch-size {options.batch_size}: {images}")
    try:
        transforms = options.transforms()
    except ValueError as error:
        reject(PROGRAM, str(error))
    print(describe())
    runs: Runs = {}
    best = rates[0]
    result: dict[str, Any] = {}
    with interruptible(result):
        settings = {name: getattr(options, name) for name in ("optimizer", "epochs", "batch_size")}
        best = run(runs, variants(options.model, data.num_classes, transforms), data, rates, options.seeds, **settings)
    rows = summarise(runs)
    summary = medians([row for row in rows if row["lr"] == best], ["variant", "lr"])
    parts = [part for transform in transforms.values() for part in transform.parts()]
    described = "; ".join(part.extra_repr() for part in parts if part.extra_repr())
    title = f"{options.model} on {options.dataset}, {options.optimizer}, lr {best:g}"
    show(result, f"{title}, {described}", cells(columns(), [*rows, *(summary if len(options.seeds) > 1 else [])]))
    print(f"'to plain': until the mean loss of {SMOOTHING} steps is at most the plain run's last, with the same seed.")
    result |= {"lr": best, "transforms": {name: settings_of(transform) for name, transform in transforms.items()}}
    result |= {"rows": rows, "medians": summary, "curves": curves(runs)}
    return write(options, result, {"curves": lambda: plot(runs, best, title)})


if __name__ == "__main__":
    sys.exit(main())
