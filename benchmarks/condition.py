"""How fast does each method whiten? The condition number of P^½ C P^½ against refreshes and against seconds.

Each case is a constant covariance: of spectrum 1/i or 1/√i in a random basis, or that of a layer of a ResNet-20 after
some epochs on the crops, damped as the library damps it. A method refreshes from its own last result, in float32;
condition numbers are computed in float64. "textbook" is the recursion on which the method `recursive` improves, with
random directions at each refresh.
"""

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import whiten_layers.models
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from whiten_layers import FeatureWhitening, whiten
from whiten_layers._torch.precision import full_precision
from whiten_layers.inverse import METHODS, Inverse
from whiten_layers.statistics.whitening_factor import WhiteningFactor

from .data import DATASETS
from .environment import describe
from .options import POSITIVE_INT, PositiveInt, read, reject, several
from .output import annotate, show, write
from .timing import steady_allocator
from .training import Curve, train

PROGRAM = "python -m benchmarks.condition"
SPECTRA: dict[str, Callable[[Tensor], Tensor]] = {"1/i": lambda i: 1 / i, "1/√i": lambda i: i**-0.5}
SHOWN = (1, 2, 3, 5, 10, 20, 50, 100)  # refreshes in the table
Case = tuple[str, Tensor]  # a name and (1, M, M), float32


def textbook(covariance: Tensor, power: float, last: Inverse | None, rank: int) -> Inverse:
    """Block quasi-Newton with directions ``S = orth(P C R)``, R random, from ``P = I`` over the mean variance."""
    size = covariance.shape[-1]
    identity = torch.eye(size).to(covariance)
    matrix = identity / covariance.diagonal(dim1=-2, dim2=-1).mean() if last is None else last.matrix
    directions = torch.linalg.qr(matrix @ (covariance @ torch.randn(1, size, min(rank, size)).to(covariance))).Q
    images = covariance @ directions
    dual = directions @ torch.linalg.inv(directions.mT @ images)
    moved = matrix @ images
    cross = moved @ dual.mT
    matrix = matrix - cross - cross.mT + dual @ (images.mT @ moved) @ dual.mT + dual @ directions.mT
    return Inverse((matrix + matrix.mT) / 2)


def with_spectrum(values: Tensor) -> Tensor:
    """A covariance ``(1, M, M)`` with these eigenvalues, in a random basis."""
    basis = torch.linalg.qr(torch.randn(len(values), len(values), dtype=torch.float64)).Q
    return ((basis * values) @ basis.mT).float()[None]


def trained(epochs: int, seed: int) -> list[Case]:
    """Train a whitened ResNet-20 on the crops; return the damped patch covariances of its layers."""
    data = DATASETS["crops"]()
    torch.manual_seed(seed)
    network = whiten_layers.models.resnet20(data.num_classes)
    whiten(network, FeatureWhitening(features="patch", power=1.0))
    settings: dict[str, Any] = {"optimizer": "sgd", "lr": 0.1, "epochs": epochs, "batch_size": 128, "seed": seed}
    train(network, data, label="ResNet-20 for its covariances", curve=Curve(), **settings)
    factors = {n: m for n, m in network.named_modules() if isinstance(m, WhiteningFactor)}
    return [(name.removesuffix(".transform.inputs"), factor.damped().matrix) for name, factor in factors.items()]


def condition(matrix: Tensor, covariance: Tensor) -> float:
    """The condition number of ``P^½ C P^½``, infinite unless P is positive.

    Its eigenvalues are those of ``Lᵀ C L`` with ``L Lᵀ = P``.
    """
    lower, info = torch.linalg.cholesky_ex(matrix.double())
    values = torch.linalg.eigvalsh(lower.mT @ covariance.double() @ lower)[0]
    return (values[-1] / values[0]).item() if not info.any() else float("inf")


def refreshed(name: str, covariance: Tensor, power: float, rank: int, refreshes: int) -> dict[str, Any]:
    """Condition numbers and seconds of successive refreshes; three of an exact method, which never improves."""
    inverse: Callable[..., Inverse] = textbook if name == "textbook" else METHODS[name].inverse
    arguments = 4 if name == "textbook" else METHODS[name].arguments
    inverse(*(covariance, power, None, rank)[:arguments])  # to warm up
    last: Inverse | None = None
    seconds, conditions, total = [], {}, 0.0
    for number in range(1, (refreshes if name in ("recursive", "textbook") else 3) + 1):
        start = time.perf_counter()
        last = inverse(*(covariance, power, last, rank)[:arguments])
        seconds.append(time.perf_counter() - start)
        total += seconds[-1]
        if number in SHOWN:
            conditions[number] = {"condition": condition(last.matrix, covariance), "seconds": total}
    return {"method": name, "power": power, "seconds": statistics.median(seconds), "after": conditions}


def lines(case: str, size: int, before: float, runs: list[dict], shown: list[int]) -> list[list[str]]:
    """Rows of the table, one for each method: condition numbers, and the milliseconds of a refresh."""
    rows = []
    for run in runs:
        after = {number: value["condition"] for number, value in run["after"].items()}
        cells = [f"{after[n]:.3g}" if n in after else "" for n in shown]
        label = run["method"] if run["power"] == 1 else f"{run['method']}, power {run['power']:g}"
        rows.append([case, str(size), label, f"{before:.4g}", *cells, f"{1e3 * run['seconds']:.2f}"])
    return rows


def summary(layers: list[dict], shown: list[int]) -> list[list[str]]:
    """Rows of the table for all layers together: the median and the worst condition number."""
    rows = []
    for index, run in enumerate(layers[0]["runs"]):
        reductions: dict[str, Callable[..., float]] = {"median": statistics.median, "worst": max}
        for name, reduce in reductions.items():
            runs = [layer["runs"][index] for layer in layers]
            after = {n: {"condition": reduce(r["after"][n]["condition"] for r in runs)} for n in run["after"]}
            total = {**run, "after": after, "seconds": sum(r["seconds"] for r in runs)}
            before = reduce(layer["before"] for layer in layers)
            rows += lines(f"ResNet-20, {name}", len(layers), before, [total], shown)
    return rows


def plot(results: list[dict]) -> Figure:
    """Plot condition numbers against refreshes, and against seconds, for the largest case of each kind."""
    spectra = sorted((result for result in results if result["kind"] == "spectrum"), key=lambda result: result["size"])
    chosen = list({result["case"]: result for result in spectra}.values())
    layers = [one for one in results if one["kind"] == "layer"]
    chosen += [max(layers, key=lambda result: (result["size"], result["before"]))] if layers else []
    figure = Figure(figsize=(4 * len(chosen), 7), layout="constrained")
    panels = figure.subplots(2, len(chosen), squeeze=False)
    for column, result in enumerate(chosen):
        for run in result["runs"]:
            if run["power"] != 1:
                continue
            points = [(0, 0.0, result["before"])]
            points += [(n, value["seconds"], value["condition"]) for n, value in run["after"].items()]
            numbers, seconds, conditions = zip(*points, strict=True)
            panels[0, column].semilogy(numbers, conditions, "o-", markersize=3, label=run["method"])
            panels[1, column].loglog(seconds[1:], conditions[1:], "o-", markersize=3, label=run["method"])
        panels[0, column].set_title(f"{result['case']}, M = {result['size']}")
        for panel, x in zip(panels[:, column], ("refreshes", "seconds"), strict=True):
            annotate(panel, x, "condition number", legend=panel is panels[0, 0])
    return figure


@dataclass(frozen=True)
class Options:
    """The options of the benchmark."""

    sizes: Annotated[tuple[int, ...], several(tuple, POSITIVE_INT, least=0)] = (144, 576, 2304)  # M of the spectra
    epochs: int = 2  # of training for the layers' covariances; 0 for none
    rank: PositiveInt = 16
    refreshes: PositiveInt = 20  # of the recursive methods
    seed: int = 0
    out: Path = Path("results/condition")  # folder for the results


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; return the exit status."""
    options = read(Options(), PROGRAM, __doc__, arguments)
    if options.epochs < 0:
        reject(PROGRAM, f"--epochs {options.epochs}: give at least 0")
    if not options.sizes and not options.epochs:
        reject(PROGRAM, "--sizes and --epochs 0 leave nothing to measure")
    steady_allocator()
    print(describe())
    cases = [("layer", *case) for case in trained(options.epochs, options.seed)] if options.epochs else []
    torch.manual_seed(options.seed)
    for name, spectrum in SPECTRA.items():
        for size in options.sizes:
            cases.append(("spectrum", name, with_spectrum(spectrum(torch.arange(1.0, size + 1, dtype=torch.float64)))))
    results = []
    for kind, name, covariance in tqdm(cases, unit="case", dynamic_ncols=True):
        size = covariance.shape[-1]
        asked = [(method, 1.0) for method in ("textbook", *METHODS)] + [("eigh", 0.5), ("recursive", 0.5)]
        with full_precision():
            runs = [refreshed(m, covariance, power, options.rank, options.refreshes) for m, power in asked]
        before = condition(torch.eye(size)[None], covariance)
        results.append({"kind": kind, "case": name, "size": size, "before": before, "runs": runs})
    shown = [n for n in SHOWN if n <= options.refreshes]
    table = [["covariance", "M", "method", "at first", *(f"after {n}" for n in shown), "ms"]]
    layers = [one for one in results if one["kind"] == "layer"]
    if layers:
        table += summary(layers, shown)
    for one in results:
        if one["kind"] == "spectrum":
            table += lines(one["case"], one["size"], one["before"], one["runs"], shown)
    result: dict[str, Any] = {"cases": results}
    title = f"rank {options.rank}, condition number of P^½ C P^½ after so many refreshes, milliseconds a refresh"
    show(result, title, table)
    print("ResNet-20: M is the number of layers, all refreshed; the milliseconds are those of all.")
    return write(options, result, {"condition": lambda: plot(results)})


if __name__ == "__main__":
    sys.exit(main())
