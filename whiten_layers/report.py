"""Report on the whitening of a model: condition numbers before and after, refreshes, skipped batches, memory."""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .conversion.messages import reasons_left
from .layers import layers_of
from .options import check_model
from .statistics.eigenbasis import Eigenbasis
from .statistics.whitening_factor import WhiteningFactor
from .transforms import FeatureWhitening, GradientTransform


def aligned(lines: list[list[str]]) -> list[str]:
    """Join the cells of each line, those of a column below one another."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]


@dataclass(frozen=True)
class Row:
    """One factor of one layer's transform: ``groups · blocks`` matrices of `size` features.

    Condition numbers are those of the damped covariance, with all blocks of a group together; the worst group counts.
    `effective_rows` are those that the covariance comes from, of the group with the fewest. `component` is how many
    times as long as the plain gradient the component along it usually is, as measured on new batches, before that is
    corrected (that of a convolution without a bias is not); 1 where it is not measured. `bounded` counts the layer's
    gradients that were shortened to the bound. `whitened` is None where nothing is inverted, as for an `Eigenbasis`. A
    layer's last row has the bytes of what its transform keeps beside the factors, too.
    """

    layer: str
    factor: str
    groups: int
    blocks: int
    size: int
    batches: int
    skipped: int
    refreshes: int
    failed: int
    restarted: int
    bounded: int
    effective_rows: float
    component: float
    condition: float
    whitened: float | None
    bytes: int


@dataclass(frozen=True)
class Report:
    """A row per factor of each layer, and the modules left plain or never reached by a batch, with the reason."""

    rows: list[Row]
    left: dict[str, str]

    @property
    def bytes(self) -> int:
        """Size of the state of all transforms, which adds to the model's own parameters."""
        return sum(row.bytes for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        return {"rows": [asdict(row) for row in self.rows], "left": dict(self.left), "bytes": self.bytes}

    def __str__(self) -> str:
        heads = "layer factor size rows batches skipped bounded refreshes failed restarted component condition whitened"
        lines = [[*heads.split(), "KiB"]]
        for row in self.rows:
            size = " × ".join([*(str(n) for n in (row.groups, row.blocks) if n > 1), str(row.size)])
            counts = [row.batches, row.skipped, row.bounded, row.refreshes, row.failed, row.restarted]
            known = (row.component, row.condition, row.whitened)
            ratios = ["–" if ratio is None else f"{ratio:.3g}" for ratio in known]
            rows = f"{row.effective_rows:.0f}"
            lines.append([row.layer, row.factor, size, rows, *map(str, counts), *ratios, f"{row.bytes / 1024:.0f}"])
        text = [*aligned(lines), f"{self.bytes / 2**20:.1f} MiB in all"]
        text += [f"not whitened: {name} ({reason})" for name, reason in self.left.items()]
        return "\n".join(text)

    def plot(self, path: str | Path) -> None:
        """Draw the condition numbers before and after, layer by layer, into an image file (needs matplotlib)."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(max(6.0, 0.3 * len(self.rows)), 4), layout="constrained")
        axes = figure.subplots()
        places = range(len(self.rows))
        axes.semilogy(places, [row.condition for row in self.rows], "o", color="tab:gray", label="covariance")
        whitened = [math.nan if row.whitened is None else row.whitened for row in self.rows]
        axes.semilogy(places, whitened, "o", color="tab:blue", label="whitened")
        axes.set_xticks(list(places), [f"{row.layer} {row.factor}" for row in self.rows], rotation=90, fontsize=7)
        axes.set_ylabel("condition number")
        axes.legend()
        figure.savefig(path, dpi=120)


def _conditions(factor: WhiteningFactor) -> tuple[float, float | None]:
    """Compute the condition numbers of C + λI and, where there is a P, of ``P^½ (C + λI) P^½``.

    The eigenvalues of the second are those of ``Lᵀ P L`` with ``L Lᵀ = C + λI``.
    """
    damped = factor.damped().matrix.double().cpu()
    lower, info = torch.linalg.cholesky_ex(damped)
    known = factor.group_sum(info) == 0  # a group that has seen no data, or only constants, has none
    if not known.any():
        return math.inf, None if isinstance(factor, Eigenbasis) else math.inf
    lower = lower[known]
    before = torch.linalg.eigvalsh(damped[known])
    if isinstance(factor, Eigenbasis):
        before = before.view(-1, factor.blocks * before.shape[-1])
        return (before.amax(1) / before.amin(1)).max().item(), None
    after = torch.linalg.eigvalsh(lower.mT @ factor.precision.double().cpu()[known] @ lower)
    groups = [values.view(-1, factor.blocks * values.shape[-1]) for values in (before, after)]
    return tuple((values.amax(1) / values.amin(1)).max().item() for values in groups)  # type: ignore[return-value]


def _transforms(model: nn.Module) -> Iterator[tuple[str, GradientTransform]]:
    """Yield every transform and its parts, each with the name of its layer."""
    for name, layer in layers_of(model).items():
        yield from ((name or "the model", part) for part in layer.transform.parts())


@torch.no_grad()
def report(model: nn.Module) -> Report:
    """Describe every whitened layer of a model.

    Both condition numbers are those of the damped covariance C + λI, which P inverts: before and after whitening. Right
    after a refresh the second is 1 for power 1, and the root of the first for power ½. As the statistics move on, it
    shows how stale P is; with the recursive method, it also shows how far P has converged. Each call decomposes every
    covariance in float64 on the CPU, so call it between epochs, not at every step.

    Raises:
        TypeError: `model` is no module.
    """
    check_model(model)
    rows = []
    for name, transform in _transforms(model):
        whitening = transform if isinstance(transform, FeatureWhitening) else None
        norms = whitening and whitening.norms
        for factor_name, factor in transform.named_factors():
            condition, whitened = _conditions(factor)
            rows.append(
                Row(
                    layer=name,
                    factor=factor_name,
                    groups=factor.groups,
                    blocks=factor.blocks,
                    size=factor.mean.shape[1],
                    batches=int(transform.num_batches_tracked),
                    skipped=int(transform.num_batches_skipped),
                    refreshes=int(factor.num_refreshes),
                    failed=int(factor.num_refreshes_failed),
                    restarted=int(factor.num_refreshes_restarted),
                    bounded=int(whitening.num_batches_bounded) if whitening else 0,
                    effective_rows=factor.running_effective_count.min().item(),
                    component=norms.usual_component().item() if norms else 1.0,
                    condition=condition,
                    whitened=whitened,
                    bytes=transform.bytes_of(factor),
                )
            )
    left = reasons_left(model)
    kinds = {name or "the model": type(module).__name__ for name, module in model.named_modules()}
    has_trained = any(row.batches for row in rows)
    for row in rows:
        if has_trained and row.batches == 0:
            left[row.layer] = f"{kinds[row.layer]}, which has seen no batch: frozen, unused, or used as a function"
    return Report(rows, left)
