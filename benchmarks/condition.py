"""How fast does each method whiten? The condition number of P^½ C P^½ against refreshes and against seconds.

Each case is a covariance that stays as it is: the spectra 1/i and 1/√i in a random basis, and what the
layers of a ResNet-20 have, damped as the library damps it, after some epochs on the crops. A method
refreshes from its own last result, in float32; condition numbers are taken in float64. "textbook" is the
recursion that `recursive` started from, with random directions at each refresh.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
from .environment import describe, environment
from .output import aligned, write
from .timing import steady_allocator
from .training import Curve, positive, train

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
    """The damped patch covariances of all layers of a ResNet-20, after training it whitened on the crops."""
    data = DATASETS["crops"]()
    torch.manual_seed(seed)
    network = whiten_layers.models.resnet20(data.num_classes)
    whiten(network, FeatureWhitening(features="patch", power=1.0))
    settings: dict[str, Any] = {"optimizer": "sgd", "lr": 0.1, "epochs": epochs, "batch_size": 128, "seed": seed}
    train(network, data, label="ResNet-20 for its covariances", curve=Curve(), **settings)
    factors = {n: m for n, m in network.named_modules() if isinstance(m, WhiteningFactor)}
    return [(name.removesuffix(".transform.inputs"), factor.damped()) for name, factor in factors.items()]


def condition(matrix: Tensor, covariance: Tensor) -> float:
    """Of ``P^½ C P^½``, whose eigenvalues are those of ``Lᵀ C L`` with ``L Lᵀ = P``; infinite unless P is positive."""
    lower, info = torch.linalg.cholesky_ex(matrix.double())
    values = torch.linalg.eigvalsh(lower.mT @ covariance.double() @ lower)[0]
    return (values[-1] / values[0]).item() if not info.any() else float("inf")


def refreshed(name: str, covariance: Tensor, power: float, rank: int, refreshes: int) -> dict[str, Any]:
    """Refresh as often as is asked; an exact method has no more to tell after a few."""
    inverse, arguments = (textbook, 4) if name == "textbook" else METHODS[name][:2]
    inverse(*(covariance, power, None, rank)[:arguments])  # to warm up
    last, seconds, conditions, total = None, [], {}, 0.0
    for number in range(1, (refreshes if name in ("recursive", "textbook") else 3) + 1):
        start = time.perf_counter()
        last = inverse(*(covariance, power, last, rank)[:arguments])
        seconds.append(time.perf_counter() - start)
        total += seconds[-1]
        if number in SHOWN:
            conditions[number] = {"condition": condition(last.matrix, covariance), "seconds": total}
    return {"method": name, "power": power, "seconds": statistics.median(seconds), "after": conditions}


def lines(case: str, size: int, before: float, runs: list[dict], shown: list[int]) -> list[list[str]]:
    """Rows of the table: a method's condition numbers, and the milliseconds of a refresh."""
    rows = []
    for run in runs:
        after = {number: value["condition"] for number, value in run["after"].items()}
        cells = [f"{after[n]:.3g}" if n in after else "" for n in shown]
        label = run["method"] if run["power"] == 1 else f"{run['method']}, power {run['power']:g}"
        rows.append([case, str(size), label, f"{before:.4g}", *cells, f"{1e3 * run['seconds']:.2f}"])
    return rows


def summary(layers: list[dict], shown: list[int]) -> list[list[str]]:
    """Of many layers: the median and the worst condition number after each number of refreshes."""
    rows = []
    for index, run in enumerate(layers[0]["runs"]):
        for name, reduce in {"median": statistics.median, "worst": max}.items():
            runs = [layer["runs"][index] for layer in layers]
            after = {n: {"condition": reduce(r["after"][n]["condition"] for r in runs)} for n in run["after"]}
            total = {**run, "after": after, "seconds": sum(r["seconds"] for r in runs)}
            rows += lines(
                f"ResNet-20, {name}", len(layers), reduce(layer["before"] for layer in layers), [total], shown
            )
    return rows


def plot(results: list[dict]) -> Figure:
    """Condition numbers against refreshes, and against seconds, for the largest case of each kind."""
    spectra = sorted((result for result in results if result["kind"] == "spectrum"), key=lambda result: result["size"])
    chosen = list({result["case"]: result for result in spectra}.values())
    layers = [result for result in results if result["kind"] == "layer"]
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
        panels[0, column].set_xlabel("refreshes")
        panels[1, column].set_xlabel("seconds")
    for row in panels:
        row[0].set_ylabel("condition number")
    panels[0, 0].legend()
    return figure


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.condition", description=__doc__.split("\n\n")[0])
    parser.add_argument("--sizes", type=positive(int), nargs="*", default=[144, 576, 2304], help="M of the spectra")
    parser.add_argument("--epochs", type=int, default=2, help="of training for the layers' covariances; 0 for none")
    parser.add_argument("--rank", type=positive(int), default=16)
    parser.add_argument("--refreshes", type=positive(int), default=20, help="of the recursive methods")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("results/condition"), help="folder for the results")
    options = parser.parse_args(arguments)
    if options.epochs < 0:
        parser.error(f"--epochs {options.epochs}: give at least 0")
    if not options.sizes and not options.epochs:
        parser.error("--sizes and --epochs 0 leave nothing to measure")
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
    layers = [result for result in results if result["kind"] == "layer"]
    if layers:
        table += summary(layers, shown)
    for result in results:
        if result["kind"] == "spectrum":
            table += lines(result["case"], result["size"], result["before"], result["runs"], shown)
    print(f"\nrank {options.rank}, condition number of P^½ C P^½ after so many refreshes, milliseconds a refresh")
    print(aligned(table))
    print("ResNet-20: M is the number of layers, all refreshed; the milliseconds are those of all.")
    chosen = {key: value for key, value in vars(options).items() if key != "out"}
    result = {"environment": environment(), "options": chosen, "cases": results}
    write(options.out, result, {"condition": lambda: plot(results)})
    return 0


if __name__ == "__main__":
    sys.exit(main())
