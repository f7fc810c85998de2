"""What does covariance pooling cost with each root, how exact is it, and does it train better than average pooling?

Two parts in one run. Roots: the time of a layer, forward and with backward, and the errors of its output and of the
input's gradient against an exact root in float64, over channels; beside it the exact root by `torch.linalg.eigh` and
PyTorch's own autograd. Convergence: a ResNet-20 with average pooling and with covariance pooling by each root, with the
same initial convolutions, batches and schedule.
"""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import whiten_layers.models
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

from whiten_layers import CovariancePooling2d

from .convergence import EPOCHS, Runs, columns, curves, draw, run, summarise
from .data import DATASETS
from .environment import describe
from .options import PositiveFloat, PositiveInt, Switch, choice, read, reject
from .output import annotate, cells, interruptible, medians, show, write
from .timing import median_seconds, steady_allocator
from .training import SMOOTHING

PROGRAM = "python -m benchmarks.pooling"
BASELINE = "autograd"
METHODS = ("eigh", "newton_schulz", "pade")
KINDS = {
    "forward": "milliseconds of forward",
    "step": "milliseconds of forward and backward",
    "output_error": "relative error of the output",
    "gradient_error": "relative error of the gradient",
}
Pooling = Callable[[Tensor], Tensor]


def centred_covariance(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Centred positions ``(N, C, n)`` of feature maps, and their covariances."""
    positions = maps.flatten(2)
    positions = positions - positions.mean(-1, keepdim=True)
    return positions, positions @ positions.mT / positions.shape[-1]


def triangle(matrices: Tensor) -> Tensor:
    """The upper triangles of n matrices, row by row."""
    size = matrices.shape[-1]
    rows, places = torch.triu_indices(size, size)
    return matrices[:, rows, places]


def autograd_pooling(maps: Tensor) -> Tensor:
    """Covariance pooling as one would write it, with PyTorch's derivative of eigenvectors."""
    values, vectors = torch.linalg.eigh(centred_covariance(maps)[1])
    return triangle((vectors * values.clamp(min=0).sqrt().unsqueeze(-2)) @ vectors.mT)


def poolings(**steps: int) -> dict[str, Pooling]:
    """The poolings that are compared, by name."""
    return {BASELINE: autograd_pooling, **{name: CovariancePooling2d(name, **steps) for name in METHODS}}


def truth(maps: Tensor, grad_output: Tensor) -> tuple[Tensor, Tensor]:
    """Output and gradient in float64, by singular values of the positions: no squares of them are decomposed.

    With U and s of ``(X − m) / √n``, ``Σ^½ = U s Uᵀ``. Its gradient solves ``Σ^½ S + S Σ^½ = sym(G)`` where s is not 0.
    """
    positions, _ = centred_covariance(maps.double())
    vectors, roots, _ = torch.linalg.svd(positions / positions.shape[-1] ** 0.5)
    roots = torch.cat([roots, roots.new_zeros(len(roots), vectors.shape[-1] - roots.shape[-1])], -1)
    roots = torch.where(roots > 1e-12 * roots[:, :1], roots, 0)
    size = vectors.shape[-1]
    of_root = positions.new_zeros(len(positions), size, size)
    rows, places = torch.triu_indices(size, size)
    of_root[:, rows, places] = grad_output.double()
    turned = vectors.mT @ (of_root + of_root.mT) @ vectors / 2
    sums = roots.unsqueeze(-1) + roots.unsqueeze(-2)
    of_covariance = vectors @ torch.where(sums > 0, turned / sums, 0) @ vectors.mT
    grad = 2 / positions.shape[-1] * of_covariance @ positions
    return triangle((vectors * roots.unsqueeze(-2)) @ vectors.mT), grad.view(maps.shape)


def draw_maps(samples: int, channels: int, side: int) -> Tensor:
    """Draw feature maps whose channels are correlated, with variances that fall as 1/i."""
    mixing = torch.linalg.qr(torch.randn(channels, channels))[0] / torch.arange(1, channels + 1).sqrt()
    return (mixing @ torch.randn(samples, channels, side**2)).relu().view(samples, channels, side, side)


def step(pooling: Pooling, maps: Tensor, grad_output: Tensor) -> tuple[Tensor, Tensor]:
    """A forward and a backward pass: output and gradient."""
    maps = maps.detach().requires_grad_()
    output = pooling(maps)
    (grad,) = torch.autograd.grad(output, maps, grad_output)
    return output.detach(), grad


def relative(result: Tensor, exact: Tensor) -> float:
    """The error of a result, relative to the exact one's norm; not a number where the result is none."""
    return ((result.double() - exact).norm() / exact.norm()).item()


def check() -> None:
    """Check that every root, taken far enough, is the exact one, before anything is timed.

    Raises:
        AssertionError: a layer computes something else.
    """
    maps = draw_maps(2, 6, 5).double()
    grad_output = torch.randn(2, 21).double()
    exact = truth(maps, grad_output)
    for name, pooling in poolings(iterations=25, degree=80).items():
        for ours, theirs in zip(step(pooling, maps, grad_output), exact, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6, msg=f"{name} is not exact")


def measure(samples: int, channels: int, side: int, budget: float) -> dict[str, Any]:
    """Median seconds of each method's forward pass and step, in turns, and the errors of both results."""
    maps = draw_maps(samples, channels, side)
    grad_output = torch.randn(samples, channels * (channels + 1) // 2)
    calls: list[Callable[[], object]] = []
    for pooling in poolings().values():
        calls += [partial(pooling, maps), partial(step, pooling, maps, grad_output)]
    taken = iter(median_seconds(*calls, budget=budget))
    exact = truth(maps, grad_output)
    cell: dict[str, Any] = {"channels": channels, "positions": side**2, **{kind: {} for kind in KINDS}}
    for name, pooling in poolings().items():
        cell["forward"][name], cell["step"][name] = next(taken), next(taken)
        results = step(pooling, maps, grad_output)
        for kind, ours, theirs in zip(("output_error", "gradient_error"), results, exact, strict=True):
            cell[kind][name] = relative(ours, theirs)
    return cell


def table(measured: list[dict], kind: str) -> list[list[str]]:
    """A row for each map: milliseconds, and in brackets the ratio to autograd's; or errors."""
    lines = [["channels", "positions", BASELINE, *METHODS]]
    for cell in measured:
        row = [str(cell["channels"]), str(cell["positions"])]
        for name, figure in cell[kind].items():
            if kind.endswith("error"):
                row.append(f"{figure:.1e}" if math.isfinite(figure) else "not finite")
            else:
                ratio = "" if name == BASELINE else f" ({figure / cell[kind][BASELINE]:.2f})"
                row.append(f"{1e3 * figure:.2f}{ratio}")
        lines.append(row)
    return lines


def plot_roots(measured: list[dict]) -> Figure:
    """Plot times and errors over channels, a row of panels for each number of positions."""
    sizes = list(dict.fromkeys(cell["positions"] for cell in measured))
    figure = Figure(figsize=(16, 4 * len(sizes)), layout="constrained")
    grid = figure.subplots(len(sizes), len(KINDS), squeeze=False)
    for panels, positions in zip(grid, sizes, strict=True):
        of_size = [cell for cell in measured if cell["positions"] == positions]
        for panel, (kind, title) in zip(panels, KINDS.items(), strict=True):
            factor = 1 if kind.endswith("error") else 1e3
            for index, name in enumerate([BASELINE, *METHODS]):
                points = [(cell["channels"], factor * cell[kind][name]) for cell in of_size]
                color = "black" if name == BASELINE else f"C{index}"
                panel.loglog(*zip(*points, strict=True), "o-", color=color, markersize=4, label=name)
            panel.set_xticks([cell["channels"] for cell in of_size], [str(cell["channels"]) for cell in of_size])
            panel.minorticks_off()
            panel.set_title(f"{positions} positions")
            annotate(panel, "channels", title, legend=panel is grid[0][0])
    return figure


def plot_curves(runs: Runs, lr: float, title: str) -> Figure:
    """Plot the training curves."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    draw(figure.subplots(1, 2, sharey=True), runs, lr, "average")
    figure.suptitle(title)
    return figure


def network(num_classes: int, method: str) -> nn.Module:
    """Make a ResNet-20 with covariance pooling by a method."""
    made = whiten_layers.models.resnet20(num_classes)
    channels = made.fc.in_features
    made.avgpool = CovariancePooling2d(method)  # type: ignore[assignment]
    made.fc = nn.Linear(channels * (channels + 1) // 2, num_classes)
    return made


def networks(num_classes: int) -> dict[str, Callable[[], nn.Module]]:
    """Functions that make a ResNet-20 with average pooling, and with each covariance pooling."""
    average = partial(whiten_layers.models.resnet20, num_classes)
    return {"average": average, **{name: partial(network, num_classes, name) for name in METHODS}}


@dataclass(frozen=True)
class Options:
    """The options of the benchmark."""

    only: tuple[Literal["roots", "convergence"], ...] = ("roots", "convergence")  # parts to run
    quick: Switch = False  # two sizes, one epoch, one seed: two minutes
    channels: tuple[PositiveInt, ...] = (16, 32, 64, 128, 256, 512)
    sides: tuple[PositiveInt, ...] = (7, 32)  # of the square maps
    samples: PositiveInt = 8  # maps in a batch of the roots
    budget: PositiveFloat = 10.0  # seconds to time a number of channels for, about
    dataset: Annotated[str, choice(DATASETS)] = "crops"
    lr: tuple[PositiveFloat, ...] = (0.1,)  # of several average pooling's best is used
    epochs: PositiveInt | None = None  # None is 20 for digits and 5 for crops
    batch_size: PositiveInt = 128
    seeds: tuple[int, ...] = (0, 1, 2)
    out: Path = Path("results/pooling")  # folder for the results

    def settled(self) -> "Options":
        """The options with those that `quick` stands for."""
        few: dict[str, Any] = {"channels": (16, 64), "budget": 1.0, "epochs": 1, "seeds": (0,)}
        return replace(self, **few) if self.quick else replace(self, epochs=self.epochs or EPOCHS[self.dataset])


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; return the exit status: 130 where Ctrl-C cut it short."""
    options = read(Options(), PROGRAM, __doc__, arguments).settled()
    data = DATASETS[options.dataset]() if "convergence" in options.only else None
    if data is not None and options.batch_size > len(data.train[1]):
        images = f"{options.dataset} has {len(data.train[1])} training images"
        reject(PROGRAM, f"--batch-size {options.batch_size}: {images}")
    if min(options.sides) < 2:
        reject(PROGRAM, f"--sides {min(options.sides)}: a map needs at least 2 positions")
    steady_allocator()
    torch.manual_seed(0)
    print(describe())
    measured: list[dict] = []
    runs: Runs = {}
    result: dict[str, Any] = {"roots": measured}
    lr = options.lr[0]
    with interruptible(result):
        if "roots" in options.only:
            check()
            grid = [(channels, side) for side in options.sides for channels in options.channels]
            for channels, side in tqdm(grid, unit="map", desc="roots", dynamic_ncols=True):
                measured.append(measure(options.samples, channels, side, options.budget))
        if data is not None:
            settings = {"optimizer": "sgd", "batch_size": options.batch_size, "epochs": options.epochs}
            lr = run(runs, networks(data.num_classes), data, options.lr, options.seeds, **settings)
    figures: dict[str, Callable[[], Figure]] = {}
    if measured:
        for kind, title in KINDS.items():
            ratio = "" if kind.endswith("error") else " (over autograd's)"
            show(result, f"{title}{ratio}, {options.samples} maps", table(measured, kind))
        print("errors: against the exact root; newton_schulz and pade approximate it, autograd and eigh only round.")
        figures["roots"] = lambda: plot_roots(measured)
    if runs:
        rows = summarise(runs, "average")
        summary = medians([row for row in rows if row["lr"] == lr], ["variant", "lr"])
        title = f"ResNet-20 on {options.dataset}, sgd, lr {lr:g}"
        show(result, title, cells(columns("average"), [*rows, *(summary if len(options.seeds) > 1 else [])]))
        print(f"'to average': until the mean loss of {SMOOTHING} steps is at most average pooling's last, same seed.")
        result["convergence"] = {"lr": lr, "rows": rows, "medians": summary, "curves": curves(runs)}
        figures["curves"] = lambda: plot_curves(runs, lr, title)
    return write(options, result, figures)


if __name__ == "__main__":
    sys.exit(main())
