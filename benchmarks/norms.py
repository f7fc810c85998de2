"""What do the normalizations that whiten cost, against batch normalization, and what do they gain?

Three parts in one run: the time of one layer, forward and with backward; its memory; and the training of a
ResNet-20 with each of them, with the same initial weights, batches and schedule. SWBN's claim (arXiv 2106.04413) is
that it costs less than IterNorm: the two are compared at equal groups, of 64 channels and of all.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import whiten_layers.models
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

from whiten_layers import (
    DecorrelatedBatchNorm1d,
    DecorrelatedBatchNorm2d,
    IterNorm1d,
    IterNorm2d,
    StochasticWhiteningBatchNorm1d,
    StochasticWhiteningBatchNorm2d,
)

from .convergence import EPOCHS, Runs, draw, medians, run, summarise, table
from .data import DATASETS
from .environment import describe, environment
from .memory import KeptMemory, PeakMemory
from .output import aligned, write
from .timing import median_seconds, steady_allocator
from .training import SMOOTHING, positive

Shape = tuple[int, ...]
PARTS = ("time", "memory", "convergence")
NORMS: dict[str, tuple[Callable[..., nn.Module], Callable[..., nn.Module]]] = {  # of vectors, of images
    "BN": (nn.BatchNorm1d, nn.BatchNorm2d),
    "IterNorm": (IterNorm1d, IterNorm2d),
    "DBN": (DecorrelatedBatchNorm1d, DecorrelatedBatchNorm2d),
    "SWBN kl": (StochasticWhiteningBatchNorm1d, StochasticWhiteningBatchNorm2d),
    "SWBN frobenius": (
        partial(StochasticWhiteningBatchNorm1d, criterion="frobenius"),
        partial(StochasticWhiteningBatchNorm2d, criterion="frobenius"),
    ),
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
    """A layer for inputs of this shape."""
    name, group_size = VARIANTS[variant]
    options |= {} if name == "BN" else {"group_size": group_size}
    return NORMS[name][len(shape) == 4](shape[1], **options)


def applicable(channels: int) -> list[str]:
    """The variants that differ: a group of 64 is all of up to 64 channels."""
    return [name for name in VARIANTS if channels > 64 or not name.endswith(" all")]


def draw_samples(shape: Shape) -> tuple[Tensor, Tensor]:
    """An input whose channels are correlated, and a gradient of the output."""
    channels = shape[1]
    mixing = torch.eye(channels) + 0.5 * torch.randn(channels, channels) / channels**0.5
    input = (torch.randn(*shape).transpose(1, -1) @ mixing + 0.5).transpose(1, -1).contiguous()
    return input.requires_grad_(), torch.randn(*shape)


def step(layer: nn.Module, input: Tensor, grad_output: Tensor) -> tuple[Tensor, ...]:
    """A forward and a backward pass; the gradients of the input and the parameters."""
    return torch.autograd.grad(layer(input), [input, *layer.parameters()], grad_output)


def covariances(samples: Tensor, width: int) -> Tensor:
    """Of the groups of so many channels, in float64 ``(groups, width, width)``; a smaller last group is left out."""
    rows = samples.detach().transpose(0, 1).flatten(1).double()
    rows = rows[: len(rows) // width * width]
    rows = (rows - rows.mean(1, keepdim=True)).view(-1, width, rows.shape[1])
    return rows @ rows.mT / rows.shape[-1]


def whitened(variant: str, covariance: Tensor, eps: float = 1e-5) -> Tensor:
    """The covariance that a layer's first outputs must have, from that of its inputs: a map of the eigenvalues."""
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
    """The answers, before anything is timed: whitened as they should be, and without steps SWBN is BN.

    Raises:
        AssertionError: a layer of the two gives something else.
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
    """What a training step allocates at most, its output included, and what its forward pass saves for backward."""
    input, grad_output = draw_samples(shape)
    layer = make(variant, shape)
    with PeakMemory() as peak:
        with KeptMemory() as kept:
            output = layer(input)
        torch.autograd.grad(output, [input, *layer.parameters()], grad_output)
    return {"shape": shape, "variant": variant, "input": input.nbytes, "saved": kept.bytes, "peak": peak.peak}


def networks(num_classes: int, step_sizes: list[float]) -> dict[str, Callable[[], nn.Module]]:
    """What makes a ResNet-20 with each normalization; SWBN with each step size."""
    layers: dict[str, Callable[..., nn.Module]] = {}
    for name, (_, layer) in NORMS.items():
        swbn = {f"{name} {size:g}": partial(layer, step_size=size) for size in step_sizes}
        layers |= swbn if name.startswith("SWBN") else {name: layer}
    return {name: partial(whiten_layers.models.resnet20, num_classes, norm_layer=of) for name, of in layers.items()}


def named(shape: Shape) -> str:
    """Such as 128×64×32."""
    return "×".join(str(size) for size in shape)


def time_table(cells: list[dict], kind: str) -> str:
    """A row for each shape: milliseconds, and in brackets that over BN's; at last SWBN over IterNorm."""
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
    return aligned(lines)


def memory_table(rows: list[dict]) -> str:
    """A row for each shape and variant: MiB, and in brackets that over BN's."""
    lines = [["shape", "", "input MiB", "saved for backward MiB", "peak MiB"]]
    plain = {row["shape"]: row for row in rows if row["variant"] == "BN"}
    for row in rows:
        pairs = [(row[key], plain[row["shape"]][key]) for key in ("saved", "peak")]
        cells = [f"{size / 2**20:.2f} ({size / of_plain:.2f})" for size, of_plain in pairs]
        lines.append([named(row["shape"]), row["variant"], f"{row['input'] / 2**20:.2f}", *cells])
    return aligned(lines)


def plot_times(cells: list[dict]) -> Figure:
    """Times over BN's, by shape."""
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
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("time / that of BN")
    panels[0].legend()
    return figure


def plot_curves(trained: dict[str, tuple[Runs, float]]) -> Figure:
    """A row of panels for each data set."""
    figure = Figure(figsize=(12, 5 * len(trained)), layout="constrained")
    rows = figure.subplots(len(trained), 2, sharey="row", squeeze=False)
    for panels, (name, (runs, lr)) in zip(rows, trained.items(), strict=True):
        draw(panels, runs, lr, "BN")
        panels[0].set_title(f"{name}, lr {lr:g}")
    return figure


def shape(text: str) -> Shape:
    """128x64x32 is (128, 64, 32, 32), images; 256x512 is (256, 512), vectors."""
    sizes = tuple(int(size) for size in text.split("x"))
    if len(sizes) not in (2, 3) or min(sizes) < 1 or sizes[0] < 2:
        raise ValueError
    return sizes if len(sizes) == 2 else (*sizes, sizes[2])


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; a wrong option ends the program with one line and status 2."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.norms", description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", choices=PARTS, nargs="+", default=list(PARTS), help="parts to run")
    grid = "128x16x32 128x32x16 128x64x8 128x64x32 128x128x16 128x256x8 128x512x4 64x64x32 64x512x4 256x64 256x512"
    parser.add_argument(
        "--shapes", type=shape, nargs="+", default=[shape(one) for one in grid.split()], help="of time, N x C (x H)"
    )
    parser.add_argument("--budget", type=positive(float), default=10.0, help="seconds to time a shape for, about")
    parser.add_argument(
        "--memory-shapes", type=shape, nargs="+", default=[shape("128x64x32"), shape("128x512x4")], metavar="SHAPE"
    )
    parser.add_argument("--dataset", choices=DATASETS, nargs="+", default=list(DATASETS))
    parser.add_argument("--lr", type=positive(float), nargs="+", default=[0.1], help="several: BN's best is used")
    parser.add_argument("--epochs", type=positive(int), help="default: 20 for digits, 5 for crops")
    parser.add_argument("--batch-size", type=positive(int), default=128)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--step-size",
        type=positive(float),
        nargs="+",
        default=[1e-5, 1e-2],
        help="of SWBN, at the highest learning rate: the paper's, for long runs, and one for short runs",
    )
    parser.add_argument("--out", type=Path, default=Path("results/norms"), help="folder for the results")
    options = parser.parse_args(arguments)
    options.data = {name: DATASETS[name]() for name in options.dataset} if "convergence" in options.only else {}
    for name, data in options.data.items():
        if options.batch_size > len(data.train[1]):
            parser.error(f"--batch-size {options.batch_size}: {name} has {len(data.train[1])} training images")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; return the exit status: 130 where Ctrl-C cut it short."""
    options = parse(arguments)
    steady_allocator()
    torch.manual_seed(0)
    print(describe())
    cells: list[dict] = []
    sizes: list[dict] = []
    trained: dict[str, tuple[Runs, float]] = {}
    interrupted = False
    try:
        if "time" in options.only:
            for one in tqdm(options.shapes, unit="shape", desc="time", dynamic_ncols=True):
                cells.append(times(one, options.budget))
        if "memory" in options.only:
            for one in tqdm(options.memory_shapes, unit="shape", desc="memory", dynamic_ncols=True):
                sizes += [bytes_of(variant, one) for variant in applicable(one[1])]
        for name, data in options.data.items():
            runs: Runs = {}
            trained[name] = runs, options.lr[0]
            settings = {"optimizer": "sgd", "batch_size": options.batch_size}
            settings["epochs"] = options.epochs or EPOCHS[name]
            made = networks(data.num_classes, options.step_size)
            trained[name] = runs, run(runs, made, data, options.lr, options.seeds, **settings)
    except KeyboardInterrupt:
        interrupted = True
        print("\ninterrupted: what follows is what was measured until then", file=sys.stderr)
    chosen = {key: value for key, value in vars(options).items() if key not in ("data", "out")}
    result = {"environment": environment(), "options": chosen, "interrupted": interrupted}
    result |= {"time": cells, "memory": sizes, "convergence": {}}
    figures: dict[str, Callable[[], Figure]] = {}
    if cells:
        for kind, title in {"step": "forward and backward", "forward": "forward in training"}.items():
            print(f"\n{title} of one layer: milliseconds (over BN's); SWBN / IterNorm by kl (frobenius)")
            print(time_table(cells, kind))
        print("64, 16, all: channels that are whitened together. Of up to 64 channels 64 is all.")
        figures["times"] = lambda: plot_times(cells)
    if sizes:
        print("\nforward and backward of one layer: MiB (over BN's)")
        print(memory_table(sizes))
        print("saved: the input included. peak: of what operations return, the output included, the input not.")
    for name, (runs, lr) in trained.items():
        rows = summarise(runs, "BN")
        variants = dict.fromkeys(variant for variant, _, _ in runs)
        summary = [medians(rows, variant, lr) for variant in variants]
        print(f"\nResNet-20 on {name}, sgd, lr {lr:g}; SWBN's number is its step size at that rate")
        print(table([*rows, *(summary if len(options.seeds) > 1 else [])], "BN"))
        curves = [{"variant": v, "lr": r, "seed": s, **vars(c)} for (v, r, s), c in runs.items()]
        result["convergence"][name] = {"lr": lr, "rows": rows, "medians": summary, "curves": curves}
    if trained:
        print(f"'to BN': until the mean loss of {SMOOTHING} steps is at most BN's last, with the same seed.")
        figures["curves"] = lambda: plot_curves(trained)
    write(options.out, result, figures)
    return 130 if interrupted else 0


if __name__ == "__main__":
    sys.exit(main())
