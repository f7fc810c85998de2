"""Report on the whitening of a model: condition numbers before and after, refreshes, skipped batches, memory."""

import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .conversion.messages import listed, reasons_left, share_of
from .layers import layers_of
from .options import check_model
from .statistics.eigenbasis import Eigenbasis
from .statistics.whitening_factor import WhiteningFactor
from .transforms import FeatureWhitening, GradientTransform

SHOWN = 10  # rows of a summary
SPECTRA = 5  # rows whose spectra are drawn
NEARLY_WHITE = 3  # condition number below which whitening changes little


def aligned(lines: list[list[str]]) -> list[str]:
    """Join the cells of each line, those of a column below one another."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]


@dataclass(frozen=True)
class Row:
    """One factor of one layer's transform: ``groups · blocks`` matrices of `size` features.

    `spectrum` are the eigenvalues of the damped covariance C + λI, largest first, with all blocks of a group together,
    of the group with the largest condition number; `whitened_spectrum` those of what P makes of it, of the group where
    that is worst. None are known before the first batch. `whitened_spectrum` is None where nothing is inverted, as for
    an `Eigenbasis`. `effective_rows` are those that the covariance comes from, of the group with the fewest.
    `component` is how many times as long as the plain gradient the component along it usually is, as measured on new
    batches, before that is corrected (that of a convolution without a bias is not); 1 where it is not measured.
    `bounded` counts the layer's gradients that were shortened to the bound. A layer's last row has the bytes of what
    its transform keeps beside the factors, too.
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
    rescued: int
    bounded: int
    effective_rows: float
    component: float
    spectrum: tuple[float, ...]
    whitened_spectrum: tuple[float, ...] | None
    bytes: int

    @property
    def condition(self) -> float:
        """Condition number of the damped covariance; infinite if nothing is known."""
        return self.spectrum[0] / self.spectrum[-1] if self.spectrum else math.inf

    @property
    def whitened(self) -> float | None:
        """Condition number after whitening."""
        spectrum = self.whitened_spectrum
        return None if spectrum is None else spectrum[0] / spectrum[-1] if spectrum else math.inf

    @property
    def shape(self) -> str:
        """Groups, blocks and features, without those that are 1."""
        return " × ".join([*(str(number) for number in (self.groups, self.blocks) if number > 1), str(self.size)])

    def to_dict(self) -> dict[str, Any]:
        numbers = {key: value for key, value in asdict(self).items() if "spectrum" not in key}
        return {**numbers, "condition": self.condition, "whitened": self.whitened}


@dataclass(frozen=True)
class Report:
    """A row per factor of each layer, and the modules left plain or never reached by a batch, with the reason.

    Printed, it is a summary: totals, what went wrong, and the ten rows with the largest condition numbers; or all rows,
    if it `is_full`. `layers` counts the whitened layers, `share` is their part of the parameters that train, and
    `batches` counts those that came to any of them. `is_idle` tells whether all whitened layers are in evaluation mode,
    and so plain.
    """

    rows: list[Row]
    left: dict[str, str]
    layers: int
    share: float
    batches: int
    is_idle: bool = False
    is_full: bool = False

    @property
    def bytes(self) -> int:
        """Size of the state of all transforms, which adds to the model's own parameters."""
        return sum(row.bytes for row in self.rows)

    @property
    def known(self) -> list[Row]:
        """The rows that have seen a batch, those with the largest condition numbers first."""
        return sorted((row for row in self.rows if row.spectrum), key=lambda row: -row.condition)

    def to_dict(self) -> dict[str, Any]:
        rows = [row.to_dict() for row in self.rows]
        numbers = {"layers": self.layers, "share": self.share, "batches": self.batches, "bytes": self.bytes}
        return {"rows": rows, "left": dict(self.left), **numbers}

    def __str__(self) -> str:
        rows = self.rows if self.is_full else self.known[:SHOWN]
        heads = ["layer", "factor", "size", "rows", "component", "condition", "whitened"]
        counts = (
            ["batches", "skipped", "bounded", "refreshes", "failed", "restarted", "rescued"] if self.is_full else []
        )
        lines = [[*heads, *counts, *(["KiB"] if self.is_full else [])]]
        for row in rows:
            known = (row.component, row.condition, row.whitened)
            ratios = ["–" if ratio is None else f"{ratio:.3g}" for ratio in known]
            numbers = [str(getattr(row, name)) for name in counts]
            kibibytes = [f"{row.bytes / 1024:.0f}"] if self.is_full else []
            lines.append([row.layer, row.factor, row.shape, f"{row.effective_rows:.0f}", *ratios, *numbers, *kibibytes])
        text = [*self._summary(), *self.warnings(), *(aligned(lines) if rows else [])]
        if len(rows) < len(self.rows):
            text.append(f"all {len(self.rows)} rows: report(model, full=True)")
        named = [f"not whitened: {name} ({reason})" for name, reason in self.left.items()]
        listed = named if self.is_full else named[:SHOWN]
        more = [f"not whitened: {len(named) - len(listed)} more"] if len(named) > len(listed) else []
        return "\n".join([*text, *listed, *more])

    def _summary(self) -> list[str]:
        refreshes = max((row.refreshes for row in self.rows), default=0)
        share = f"{100 * self.share:.0f} % of the parameters that train"
        mebibytes = f"{self.bytes / 2**20:.1f} MiB beside them"
        numbers = f"batches: {self.batches}; refreshes: {refreshes}"
        lines = [f"whitened layers: {self.layers} ({share}, {mebibytes}); {numbers}"]
        if not self.layers:
            return ["No layer is whitened: call whiten(model)."]
        if not self.batches:
            idle = " The model is in evaluation mode, where whitened layers are plain: see `in_evaluation` of `whiten`."
            return [*lines, f"No batch has been seen yet.{idle if self.is_idle else ''}"]
        if not self.known:
            return (
                [*lines, "No condition number is known: all inputs were constant, or not finite."]
                if self.rows
                else lines
            )
        typical = statistics.median(row.condition for row in self.known)
        if typical < NEARLY_WHITE:
            return [*lines, f"Nearly white already (condition number {typical:.3g} in the median): little to gain."]
        after = [row.whitened for row in self.known if row.whitened is not None]
        whitened = f", whitened {statistics.median(after):.3g}" if after else ""
        return [*lines, f"Condition number in the median of all rows: {typical:.3g}{whitened}."]

    def warnings(self) -> list[str]:
        """Say what went wrong, and in which layers, a line for each kind."""
        kinds: list[tuple[str, Callable[[Row], bool]]] = [
            ("refreshes failed, and the last inverse stays in use", lambda row: row.failed > 0),
            ("refreshes took float64 or more damping", lambda row: row.rescued > 0),
            ("batches with NaN or Inf were left out", lambda row: row.skipped > 0),
            (
                "fewer rows than features, so whitened but little",
                lambda row: row.spectrum != () and row.effective_rows < row.size,
            ),
        ]
        lines = []
        for what, applies in kinds:
            names = list(dict.fromkeys(row.layer for row in self.rows if applies(row)))
            if names:
                lines.append(f"{what}: {listed(names)}")
        return lines

    def numbers(self) -> dict[str, float]:
        """List the finite numbers of each row under names like "whitening/layer1.0.conv1/channels/condition"."""
        values: dict[str, float] = {"whitening/bytes": self.bytes}
        for row in self.rows:
            name = f"whitening/{row.layer}/{row.factor}"
            for of in ("condition", "whitened", "effective_rows", "component", "bounded", "skipped", "failed"):
                value = getattr(row, of)
                if value is not None and math.isfinite(value):
                    values[f"{name}/{of}"] = value
        return values

    def log(self, writer: Any, step: int) -> None:
        """Write `numbers` to a `SummaryWriter` of TensorBoard, or to a run of Weights & Biases."""
        values = self.numbers()
        if hasattr(writer, "add_scalar"):
            for name, value in values.items():
                writer.add_scalar(name, value, step)
        else:
            writer.log(values, step=step)

    def plot(self, path: str | Path) -> None:
        """Draw condition numbers, and the spectra of a few layers, before and after, into an image (needs matplotlib).

        The spectra are those of `SPECTRA` rows, from the largest condition number to the smallest: each eigenvalue
        divided by the mean of its matrix, against its place, largest first.
        """
        try:
            from matplotlib.figure import Figure
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("a plot needs matplotlib: pip install matplotlib") from error
        known = self.known
        if not known:
            raise ValueError("no batch has been seen: there is nothing to draw")
        figure = Figure(figsize=(max(6.0, 0.3 * len(self.rows)) + 5, 4.5), layout="constrained")
        axes, spectra = figure.subplots(1, 2, width_ratios=[max(6.0, 0.3 * len(self.rows)), 5])
        places = range(len(self.rows))
        axes.semilogy(places, [row.condition for row in self.rows], "o", color="tab:gray", label="covariance")
        whitened = [math.nan if row.whitened is None else row.whitened for row in self.rows]
        if not all(map(math.isnan, whitened)):
            axes.semilogy(places, whitened, "o", color="tab:blue", label="whitened")
        axes.set_xticks(list(places), [f"{row.layer} {row.factor}" for row in self.rows], rotation=90, fontsize=7)
        axes.set_ylabel("condition number")
        axes.legend()
        picked = [known[round(i * (len(known) - 1) / (SPECTRA - 1))] for i in range(SPECTRA)]
        for number, row in enumerate(dict.fromkeys(picked)):
            for spectrum, style in ((row.spectrum, "--"), (row.whitened_spectrum or (), "-")):
                values = [value * len(spectrum) / sum(spectrum) for value in spectrum] if spectrum else []
                label = f"{row.layer} {row.factor}" if style == "--" else None
                spectra.loglog(range(1, len(values) + 1), values, style, color=f"C{number}", label=label)
        spectra.set_xlabel("eigenvalue: its place")
        spectra.set_title("eigenvalues: covariance (dashed), whitened", fontsize=9)
        spectra.legend(fontsize=7)
        figure.savefig(path, dpi=120)


def _worst(eigenvalues: Tensor, blocks: int) -> tuple[float, ...]:
    """Return the spectrum of the group with the largest condition number, from those of the blocks of all groups."""
    groups = eigenvalues.view(-1, blocks * eigenvalues.shape[-1]).sort(descending=True).values
    worst = (groups[:, 0] / groups[:, -1]).argmax()
    return tuple(groups[worst].tolist())


def _spectra(factor: WhiteningFactor) -> tuple[tuple[float, ...], tuple[float, ...] | None]:
    """Compute the eigenvalues of C + λI and, where there is a P, of ``P^½ (C + λI) P^½``.

    Those of the second are those of ``Lᵀ P L`` with ``L Lᵀ = C + λI``.
    """
    damped = factor.damped().matrix.double().cpu()
    if isinstance(factor, Eigenbasis):  # nothing is damped, so values below float32's rounding are known as no more
        values = torch.linalg.eigvalsh(damped)
        values = values.clamp(min=values.amax().item() * torch.finfo(torch.float32).eps)
        return _worst(values, factor.blocks) if factor.running_count.any() and values.amax() > 0 else (), None
    lower, info = torch.linalg.cholesky_ex(damped)
    known = factor.group_sum(info) == 0  # a group that has seen no data, or only constants, has none
    if not known.any():
        return (), ()
    before = _worst(torch.linalg.eigvalsh(damped[known]), factor.blocks)
    lower = lower[known]
    after = torch.linalg.eigvalsh(lower.mT @ factor.precision.double().cpu()[known] @ lower)
    return before, _worst(after, factor.blocks)


def _transforms(model: nn.Module) -> Iterator[tuple[str, GradientTransform]]:
    """Yield every transform and its parts, each with the name of its layer."""
    for name, layer in layers_of(model).items():
        yield from ((name or "the model", part) for part in layer.transform.parts())


def _why_unseen(layer: nn.Module) -> str:
    """Say what may have kept all batches from a layer."""
    why = "frozen, unused, used as a function, or in evaluation mode"
    if isinstance(layer, nn.MultiheadAttention):
        why = f"query, key and value are not one tensor; or it is {why}"
    return f"{type(layer).__name__}, which has seen no batch: {why}"


@torch.no_grad()
def report(model: nn.Module, *, full: bool = False) -> Report:
    """Describe every whitened layer of a model.

    Printed, the result is a summary, or with `full` all of it; ``report(model).plot("report.png")`` draws it.

    Both condition numbers are those of the damped covariance C + λI, which P inverts: before and after whitening. Right
    after a refresh the second is 1 for power 1, and the root of the first for power ½. As the statistics move on, it
    shows how stale P is; with the recursive method, it also shows how far P has converged. Each call decomposes every
    covariance in float64 on the CPU, so call it between epochs, not at every step.

    Raises:
        TypeError: `model` is no module.
        ValueError: its whitening is on the meta device.
    """
    check_model(model)
    transforms = list(_transforms(model))
    if any(buffer.is_meta for _, transform in transforms for buffer in transform.buffers()):
        raise ValueError("the model is on the meta device: there is nothing to report before it is filled")
    rows = []
    for name, transform in transforms:
        whitening = transform if isinstance(transform, FeatureWhitening) else None
        norms = whitening and whitening.norms
        for factor_name, factor in transform.named_factors():
            spectrum, whitened_spectrum = _spectra(factor)
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
                    rescued=int(factor.num_refreshes_rescued),
                    bounded=int(whitening.num_batches_bounded) if whitening else 0,
                    effective_rows=factor.running_effective_count.min().item(),
                    component=norms.usual_component().item() if norms else 1.0,
                    spectrum=spectrum,
                    whitened_spectrum=whitened_spectrum,
                    bytes=transform.bytes_of(factor),
                )
            )
    left = reasons_left(model)
    layers = {name or "the model": layer for name, layer in layers_of(model).items()}
    batches = max((int(transform.num_batches_tracked) for _, transform in transforms), default=0)
    unseen = {row.layer for row in rows if batches and row.batches == 0}
    left |= {name: _why_unseen(layer) for name, layer in layers.items() if name in unseen}
    is_idle = not any(layer.training or layer.in_evaluation for layer in layers.values())
    return Report(rows, left, len(layers), share_of(model, layers.values()), batches, is_idle, full)
