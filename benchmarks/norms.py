"""What do the normalizations that whiten cost, compared with batch normalization, and what do they gain?

Three parts in one run: the time of one layer, forward and with backward; its memory; and the training of a
ResNet-20 with each of them, with the same initial weights, batches and schedule. SWBN's claim (arXiv 2106.04413) is
that it costs less than IterNorm: the two are compared at equal groups, of 64 channels and of all.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import whiten_layers.models
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

from whiten_layers import DecorrelatedBatchNorm1d, DecorrelatedBatchNorm2d, IterNorm1d, IterNorm2d
from whiten_layers import StochasticWhiteningBatchNorm1d as SWBN1d
from whiten_layers import StochasticWhiteningBatchNorm2d as SWBN2d

from .allocations import KeptMemory, PeakMemory
from .convergence import EPOCHS, Runs, columns, curves, draw, run, summarise
from .data import DATASETS
from .environment import describe
from .options import PositiveFloat, PositiveInt, choice, read, reject, several, value
from .output import annotate, cells, interruptible, medians, show, write
from .timing import median_seconds, steady_allocator
from .training import SMOOTHING

Shape = tuple[int, ...]
PROGRAM = "python -m benchmarks.norms"
NORMS: dict[str, tuple[Callable[..., nn.Module], Callable[..., nn.Module]]] = {  # of vectors, of images
    "BN": (nn.BatchNorm1d, nn.BatchNorm2d),
    "IterNorm": (IterNorm1d, IterNorm2d),
    "DBN": (DecorrelatedBatchNorm1d, DecorrelatedBatchNorm2d),
    "SWBN kl": (SWBN1d, SWBN2d),
    "SWBN frobenius": (partial(SWBN1d, criterion="frobenius"), partial(SWBN2d, criterion="frobenius")),
}
VARIANTS: dict[str, tuple[str, int | None]] = {  # a normalization and its group size
    "BN": ("BN", None),
    "IterNorm 64": ("IterNorm", 64),
    "IterNorm all": ("IterNorm", None),
    "DBN 16": ("DBN", 16),
    "SWBN kl 64": ("SWBN kl", 64),
    "SWBN kl all": ("SWBN kl", None),
    "SWBN frobenius 64": ("SWBN frobenius", 64),
    "SWBN frobenius all": ("SWBN frobenius", None),
}
CHECKED_STEP = 0.1  # large enough a step size for its effect to stand out from rounding


def make(variant: str, shape: Shape, **options: Any) -> nn.Module:
    """Make a layer for inputs of a shape."""
    name, group_size = VARIANTS[variant]
    options |= {} if name == "BN" else {"group_size": group_size}
    return NORMS[name][len(shape) == 4](shape[1], **options)


def applicable(channels: int) -> list[str]:
    """The variants that differ: a group of 64 is all of up to 64 channels."""
    return [name for name in VARIANTS if channels > 64 or not name.endswith(" all")]


def draw_samples(shape: Shape) -> tuple[Tensor, Tensor]:
    """Draw an input whose channels are correlated, and a gradient of the output."""
    channels = shape[1]
    mixing = torch.eye(channels) + 0.5 * torch.randn(channels, channels) / channels**0.5
    input = (torch.randn(*shape).transpose(1, -1) @ mixing + 0.5).transpose(1, -1).contiguous()
    return input.requires_grad_(), torch.randn(*shape)


def step(layer: nn.Module, input: Tensor, grad_output: Tensor) -> tuple[Tensor, ...]:
    """A forward and a backward pass; the gradients of the input and the parameters."""
    return torch.autograd.grad(layer(input), [input, *layer.parameters()], grad_output)


def covariances(samples: Tensor, width: int) -> Tensor:
    """Covariances of groups of `width` channels, in float64 ``(groups, width, width)``; no smaller last group."""
    rows = samples.detach().transpose(0, 1).flatten(1).double()
    rows = rows[: len(rows) // width * width]
    rows = (rows - rows.mean(1, keepdim=True)).view(-1, width, rows.shape[1])
    return rows @ rows.mT / rows.shape[-1]


def whitened(variant: str, covariance: Tensor, eps: float = 1e-5) -> Tensor:
    """The covariance that the first outputs of a layer must have, as a function of that of its inputs."""
    name, _ = VARIANTS[variant]
    if name.startswith("SWBN"):
        scale = (covariance.diagonal(dim1=-2, dim2=-1) + eps).rsqrt()
        covariance = scale.unsqueeze(-1) * covariance * scale.unsqueeze(-2)
    values, vectors = torch.linalg.eigh(covariance)
    if name == "DBN":
        root = (values + eps).rsqrt()
    elif name == "IterNorm":
        trace, root = (values + eps).sum(-1, keepdim=True), torch.ones_like(values)
        for _ in range(5):
            root = 1.5 * root - 0.5 * root**3 * (values + eps) / trace
        root = root / trace.sqrt()
    else:
        residual = values - 1
        kl = name == "SWBN kl"
        root = 1 - CHECKED_STEP * (residual if kl else residual * values / residual.norm(dim=-1, keepdim=True))
    return (vectors * (values * root**2).unsqueeze(-2)) @ vectors.mT


def check(shape: Shape, input: Tensor, grad_output: Tensor) -> None:
    """Check that layers whiten as they should, and that SWBN with a step size of 0 is BN, before anything is timed.

    Raises:
        AssertionError: a layer computes something else.
    """
    compare = partial(torch.testing.assert_close, rtol=1e-3, atol=1e-3)
    plain = make("BN", shape)
    output, gradients = plain(input), step(plain, input, grad_output)
    for variant in applicable(shape[1])[1:]:
        name, group_size = VARIANTS[variant]
        options = {"step_size": CHECKED_STEP} if name.startswith("SWBN") else {}
        width = min(group_size or shape[1], shape[1])
        expected = whitened(variant, covariances(input, width))
        compare(covariances(make(variant, shape, **options)(input), width), expected)
        if name.startswith("SWBN"):
            layer = make(variant, shape, step_size=0)
            compare(layer(input), output)
            for ours, theirs in zip(step(layer, input, grad_output), gradients, strict=True):
                compare(ours, theirs, atol=1e-3 * theirs.abs().max().item())


def times(shape: Shape, budget: float) -> dict[str, Any]:
    """Median seconds of every variant's training step and of its forward pass, all in turns."""
    input, grad_output = draw_samples(shape)
    check(shape, input, grad_output)
    names = applicable(shape[1])
    calls: list[Callable[[], object]] = []
    for layer in [make(name, shape) for name in names]:
        calls += [partial(step, layer, input, grad_output), partial(layer, input)]
    taken = iter(median_seconds(*calls, budget=budget))
    cell: dict[str, Any] = {"shape": shape, "step": {}, "forward": {}}
    for name in names:
        cell["step"][name], cell["forward"][name] = next(taken), next(taken)
    return cell


def bytes_of(variant: str, shape: Shape) -> dict[str, Any]:
    """Peak memory of a training step, including its output, and the memory that forward saves for backward."""
    input, grad_output = draw_samples(shape)
    layer = make(variant, shape)
    with PeakMemory() as peak:
        with KeptMemory() as kept:
            output = layer(input)
        torch.autograd.grad(output, [input, *layer.parameters()], grad_output)
    return {"shape": shape, "variant": variant, "input": input.nbytes, "saved": kept.bytes, "peak": peak.peak}


def networks(num_classes: int, step_sizes: Sequence[float]) -> dict[str, Callable[[], nn.Module]]:
    """Functions that make a ResNet-20 with each normalization, and with SWBN at each step size."""
    layers: dict[str, Callable[..., nn.Module]] = {}
    for name, (_, layer) in NORMS.items():
        swbn = {f"{name} {size:g}": partial(layer, step_size=size) for size in step_sizes}
        layers |= swbn if name.startswith("SWBN") else {name: layer}
    return {name: partial(whiten_layers.models.resnet20, num_classes, norm_layer=of) for name, of in layers.items()}


def named(shape: Shape) -> str:
    """A shape as text, such as 128×64×32."""
    return "×".join(str(size) for size in shape)


def time_table(cells: list[dict], kind: str) -> list[list[str]]:
    """A row for each shape: milliseconds, and in brackets the ratio to BN's; finally SWBN's ratios to IterNorm."""
    lines = [["shape", *VARIANTS, "SWBN / IterNorm 64", "all"]]
    for cell in cells:
        seconds = cell[kind]
        row = [named(cell["shape"])]
        for name in VARIANTS:
            ratio = "" if name == "BN" or name not in seconds else f" ({seconds[name] / seconds['BN']:.1f})"
            row.append(f"{1e3 * seconds[name]:.2f}{ratio}" if name in seconds else "")
        for group in ("64", "all"):
            known = f"IterNorm {group}" in seconds
            pair = [seconds[f"SWBN {c} {group}"] / seconds[f"IterNorm {group}"] for c in ("kl", "frobenius") if known]
            row.append("{:.2f} ({:.2f})".format(*pair) if known else "")
        lines.append(row)
    return lines


def memory_table(rows: list[dict]) -> list[list[str]]:
    """A row for each shape and variant: MiB, and in brackets the ratio to BN's."""
    lines = [["shape", "", "input MiB", "saved for backward MiB", "peak MiB"]]
    plain = {row["shape"]: row for row in rows if row["variant"] == "BN"}
    for row in rows:
        pairs = [(row[key], plain[row["shape"]][key]) for key in ("saved", "peak")]
        cells = [f"{size / 2**20:.2f} ({size / of_plain:.2f})" for size, of_plain in pairs]
        lines.append([named(row["shape"]), row["variant"], f"{row['input'] / 2**20:.2f}", *cells])
    return lines


def plot_times(cells: list[dict]) -> Figure:
    """Plot times over BN's, by shape."""
    figure = Figure(figsize=(12, 5), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for panel, (kind, title) in zip(panels, {"step": "forward + backward", "forward": "forward"}.items(), strict=True):
        for index, name in enumerate(VARIANTS):
            points = [(i, c[kind][name] / c[kind]["BN"]) for i, c in enumerate(cells) if name in c[kind]]
            if points:
                color = "black" if name == "BN" else f"C{index}"
                panel.semilogy(*zip(*points, strict=True), "o-", color=color, markersize=4, label=name)
        panel.set_xticks(range(len(cells)), [named(cell["shape"]) for cell in cells], rotation=60)
        panel.set_title(title)
        annotate(panel, y="time / that of BN", legend=panel is panels[0])
    return figure


def plot_curves(trained: dict[str, tuple[Runs, float]]) -> Figure:
    """Plot the training curves, a row of panels for each data set."""
    figure = Figure(figsize=(12, 5 * len(trained)), layout="constrained")
    rows = figure.subplots(len(trained), 2, sharey="row", squeeze=False)
    for panels, (name, (runs, lr)) in zip(rows, trained.items(), strict=True):
        draw(panels, runs, lr, "BN")
        panels[0].set_title(f"{name}, lr {lr:g}")
    return figure


def shape_of(text: str) -> Shape:
    """Read a shape: 128x64x32 is (128, 64, 32, 32), of images; 256x512 is (256, 512), of vectors."""
    sizes = tuple(int(size) for size in text.split("x"))
    if len(sizes) not in (2, 3) or min(sizes) < 1 or sizes[0] < 2:
        raise ValueError
    return sizes if len(sizes) == 2 else (*sizes, sizes[2])


GRID = "128x16x32 128x32x16 128x64x8 128x64x32 128x128x16 128x256x8 128x512x4 64x64x32 64x512x4 256x64 256x512"
SHAPES = tuple(shape_of(one) for one in GRID.split())
Shapes = Annotated[tuple[Shape, ...], several(tuple, value("shape", shape_of))]


@dataclass(frozen=True)
class Options:
    """The options of the benchmark."""

    only: tuple[Literal["time", "memory", "convergence"], ...] = ("time", "memory", "convergence")  # parts to run
    shapes: Shapes = SHAPES  # of time, N x C (x H)
    budget: PositiveFloat = 10.0  # seconds to time a shape for, about
    memory_shapes: Shapes = (SHAPES[3], SHAPES[6])
    dataset: tuple[Annotated[str, choice(DATASETS)], ...] = tuple(DATASETS)
    lr: tuple[PositiveFloat, ...] = (0.1,)  # of several BN's best is used
    epochs: PositiveInt | None = None  # None is 20 for digits and 5 for crops
    batch_size: PositiveInt = 128
    seeds: tuple[int, ...] = (0, 1, 2)
    step_size: tuple[PositiveFloat, ...] = (1e-5, 1e-2)  # SWBN's at the highest lr: the paper's, and one for short runs
    out: Path = Path("results/norms")  # folder for the results


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; return the exit status: 130 where Ctrl-C cut it short."""
    options = read(Options(), PROGRAM, __doc__, arguments)
    opened = {name: DATASETS[name]() for name in options.dataset} if "convergence" in options.only else {}
    for name, data in opened.items():
        if options.batch_size > len(data.train[1]):
            reject(PROGRAM, f"--batch-size {options.batch_size}: {name} has {len(data.train[1])} training images")
    steady_allocator()
    torch.manual_seed(0)
    print(describe())
    timed: list[dict] = []
    sizes: list[dict] = []
    trained: dict[str, tuple[Runs, float]] = {}
    result: dict[str, Any] = {"time": timed, "memory": sizes, "convergence": {}}
    with interruptible(result):
        if "time" in options.only:
            for one in tqdm(options.shapes, unit="shape", desc="time", dynamic_ncols=True):
                timed.append(times(one, options.budget))
        if "memory" in options.only:
            for one in tqdm(options.memory_shapes, unit="shape", desc="memory", dynamic_ncols=True):
                sizes += [bytes_of(variant, one) for variant in applicable(one[1])]
        for name, data in opened.items():
            runs: Runs = {}
            trained[name] = runs, options.lr[0]
            settings = {"optimizer": "sgd", "batch_size": options.batch_size}
            settings["epochs"] = options.epochs or EPOCHS[name]
            made = networks(data.num_classes, options.step_size)
            trained[name] = runs, run(runs, made, data, options.lr, options.seeds, **settings)
    figures: dict[str, Callable[[], Figure]] = {}
    if timed:
        for kind, title in {"step": "forward and backward", "forward": "forward in training"}.items():
            title += " of one layer: milliseconds (over BN's); SWBN / IterNorm by kl (frobenius)"
            show(result, title, time_table(timed, kind))
        print("64, 16, all: channels that are whitened together. Of up to 64 channels 64 is all.")
        figures["times"] = lambda: plot_times(timed)
    if sizes:
        show(result, "forward and backward of one layer: MiB (over BN's)", memory_table(sizes))
        print("saved: the input included. peak: of what operations return, the output included, the input not.")
    for name, (runs, lr) in trained.items():
        rows = summarise(runs, "BN")
        summary = medians([row for row in rows if row["lr"] == lr], ["variant", "lr"])
        title = f"ResNet-20 on {name}, sgd, lr {lr:g}; SWBN's number is its step size at that rate"
        show(result, title, cells(columns("BN"), [*rows, *(summary if len(options.seeds) > 1 else [])]))
        result["convergence"][name] = {"lr": lr, "rows": rows, "medians": summary, "curves": curves(runs)}
    if trained:
        print(f"'to BN': until the mean loss of {SMOOTHING} steps is at most BN's last, with the same seed.")
        figures["curves"] = lambda: plot_curves(trained)
    return write(options, result, figures)


if __name__ == "__main__":
    sys.exit(main())
