"""Should a normalization that whitens take its inverse root by eigenvectors or by Newton steps?

Two tables in float32, each figure the median of several covariances. (a) Rounding errors of the steps of IterNorm's
paper, on one matrix, and of the same steps in their coupled form. (b) Errors and time, with backward, of the exact
inverse root by eigenvectors, as in DecorrelatedBatchNorm, and of coupled steps that are taken until they come close.
"""

import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from whiten_layers.inverse.newton_steps import newton_root, newton_root_adjoint
from whiten_layers.norm.decorrelated import zca, zca_adjoint

from .environment import describe
from .options import PositiveFloat, PositiveInt, read, reject
from .output import Column, cells, show, write
from .timing import median_seconds, steady_allocator

PROGRAM = "python -m benchmarks.inverse_roots"
Pair = tuple[Tensor, Tensor]  # an inverse root, and the gradient of the covariance


def draw(size: int, condition: float, seed: int) -> Pair:
    """Draw a covariance ``(1, M, M)`` whose eigenvalues are evenly spread in logarithm, and a gradient."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(2, size, size, generator=generator).double()
    basis = torch.linalg.qr(noise[0])[0]
    values = condition ** -torch.linspace(0, 1, size).double()
    return (basis * values) @ basis.mT[None], noise[1:]


def by_eigenvectors(covariance: Tensor, grad: Tensor) -> Pair:
    """As in DecorrelatedBatchNorm."""
    result, *kept = zca(covariance, 0.0)
    return result, zca_adjoint(grad, result, *kept)


def by_coupled_steps(covariance: Tensor, grad: Tensor, iterations: int) -> Pair:
    """As in IterNorm."""
    result = newton_root(covariance, iterations, power=-0.5)
    return result, newton_root_adjoint(grad, result, covariance, iterations, power=-0.5)


def by_single_steps(covariance: Tensor, grad: Tensor, iterations: int) -> Pair:
    """As in IterNorm's paper, eq. 5: ``P ← (3P − P³ Σ_N) / 2``; the gradient by autograd."""
    leaf = covariance.detach().requires_grad_()
    trace = leaf.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]
    result = torch.eye(leaf.shape[-1], dtype=leaf.dtype).expand_as(leaf)
    for _ in range(iterations):
        result = 1.5 * result - 0.5 * result @ result @ result @ (leaf / trace)
    result = result / trace.sqrt()
    (of_covariance,) = torch.autograd.grad(result, leaf, grad)
    return result.detach(), (of_covariance + of_covariance.mT) / 2


def error(compute: Callable[..., Pair], exact: Callable[..., Pair], covariance: Tensor, grad: Tensor) -> list[float]:
    """The errors of an inverse root and of a gradient in float32, relative to a float64 result."""
    ours, theirs = compute(covariance.float(), grad.float()), exact(covariance, grad)
    return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(ours, theirs, strict=True)]


def check() -> None:
    """Check that all of them agree in float64 where that is easy, before anything is measured.

    Raises:
        AssertionError: one computes something else.
    """
    covariance, grad = draw(5, 4.0, 0)
    for compute in (by_coupled_steps, by_single_steps):
        for ours, theirs in zip(compute(covariance, grad, 12), by_eigenvectors(covariance, grad), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@dataclass(frozen=True)
class Options:
    """The options of the benchmark."""

    sizes: tuple[PositiveInt, ...] = (16, 64, 256)  # channels that are whitened together
    conditions: tuple[PositiveFloat, ...] = (1e1, 1e3, 1e5)  # numbers
    iterations: tuple[PositiveInt, ...] = (5, 10, 15, 20)
    seeds: tuple[int, ...] = (0, 1, 2)
    budget: PositiveFloat = 2.0  # seconds to time a size for, about
    out: Path = Path("results/inverse_roots")  # folder for the results


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; return the exit status."""
    options = read(Options(), PROGRAM, __doc__, arguments)
    if min(options.conditions) < 1:
        reject(PROGRAM, f"--conditions {min(options.conditions):g}: a condition number is at least 1")
    steady_allocator()
    print(describe())
    check()
    coupled = {f"coupled {n}": partial(by_coupled_steps, iterations=n) for n in options.iterations}
    single = {f"single {n}": partial(by_single_steps, iterations=n) for n in options.iterations}
    exact: dict[str, Callable[..., Pair]] = {"eigenvectors": by_eigenvectors, **coupled}
    rows: list[dict[str, Any]] = []
    grid = [(size, condition) for size in options.sizes for condition in options.conditions]
    for size, condition in tqdm(grid, unit="covariance", dynamic_ncols=True):
        drawn = [draw(size, condition, seed) for seed in options.seeds]

        def errors(name: str, compute: Callable, truth: Callable, drawn: list[Pair] = drawn) -> dict[str, Any]:
            of_seeds = zip(*(error(compute, truth, *pair) for pair in drawn), strict=True)
            return {name: [statistics.median(figures) for figures in of_seeds]}

        row: dict[str, Any] = {"size": size, "condition": condition, "rounding": {}, "exact": {}}
        for (one, first), (other, second) in zip(single.items(), coupled.items(), strict=True):
            row["rounding"] |= errors(one, first, second) | errors(other, second, second)
        for name, compute in exact.items():
            row["exact"] |= errors(name, compute, by_eigenvectors)
        covariance, grad = (one.float() for one in drawn[0])
        calls = [partial(compute, covariance, grad) for compute in exact.values()]
        row["seconds"] = dict(zip(exact, median_seconds(*calls, budget=options.budget), strict=True))
        rows.append(row)
    result: dict[str, Any] = {"rows": rows}
    head = [("M", "{size}"), ("condition", "{condition:g}")]
    names = [name for pair in zip(single, coupled, strict=True) for name in pair]
    rounding = [(name, "{rounding[" + name + "][0]:.0e}, {rounding[" + name + "][1]:.0e}") for name in names]
    show(result, "(a) rounding errors of the inverse root, and of its gradient", cells([*head, *rounding], rows))

    def figures(name: str) -> Callable[[dict], str]:
        return lambda row: "{:.0e}, {:.0e}; {:.2f} ms".format(*row["exact"][name], 1e3 * row["seconds"][name])

    columns: list[Column] = [*head, *((name, figures(name)) for name in exact)]
    show(result, "(b) errors of both against the exact ones; milliseconds of both", cells(columns, rows))
    return write(options, result)


if __name__ == "__main__":
    sys.exit(main())
