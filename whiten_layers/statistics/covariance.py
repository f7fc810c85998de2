"""Mean and covariance of rows of features: of one batch, and as a running average."""

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from .._torch.modules import WideBuffers
from .._torch.precision import full_precision
from ..state import safe_to_load


@safe_to_load
class Moments(NamedTuple):
    """Number of rows, of rows that tell something new, mean and covariance, for each group.

    Shapes: (groups,), (groups,), (groups, M), (groups, M, M). Where there are no rows the others are 0. For
    ``effective_rows`` see the function of that name.
    """

    rows: Tensor
    effective_rows: Tensor
    mean: Tensor
    covariance: Tensor


def zero_moments(mean: Tensor) -> Moments:
    """Moments of no rows, for the groups and features of a mean ``(groups, M)``."""
    groups, features = mean.shape
    none = mean.new_zeros(groups)
    return Moments(none, none, torch.zeros_like(mean), mean.new_zeros(groups, features, features))


def effective_rows(covariance: Tensor, squared: Tensor, samples: Tensor | int, rows: Tensor | int) -> Tensor:
    """Count how many independent Gaussian rows would estimate a covariance as well as `samples` samples did.

    The positions of one image, or of one sequence, are rows that resemble each other, so n of them tell less than n
    rows of n images. Samples are independent. With Sᵢ the covariance of sample i alone and S their mean, the error of S
    is ``E‖S − C‖² = Σ ‖Sᵢ − S‖² / N(N − 1)`` (Ledoit & Wolf 2004, with samples instead of rows). For n Gaussian rows it
    would be ``(tr(C²) + tr(C)²) / n``. The two are set equal. One sample does not tell how samples differ: it counts as
    one row.

    Args:
        covariance: S, ``(groups, M, M)``, or what has the same norm and trace.
        squared: ``Σ ‖Sᵢ‖² / N tr(S)²`` of each group.
        samples: N.
        rows: number of rows in all samples, which is the most that is returned.
    """
    trace = covariance.diagonal(dim1=-2, dim2=-1).sum(-1)
    norm = torch.linalg.vector_norm(covariance / trace[:, None, None], dim=(-2, -1)).square()
    effective = (norm + 1) * (samples - 1) / (squared - norm)
    # All, too, where no sample differs from another but by rounding
    effective = torch.where((effective > 0) & (effective < rows), effective, rows)
    return torch.where(torch.as_tensor(samples) < 2, 1, effective).clamp(min=1)


def moments(rows: Tensor, center: bool = True, samples: int | None = None, known: Tensor | None = None) -> Moments:
    """Compute the moments of rows ``(groups, n, M)``, at least one of each group.

    The covariance divides by the number of rows; it is 0 where it is only rounding of the mean. Rows of fewer than 32
    bits are computed with as float32.

    Args:
        rows: the rows.
        center: False for a mean of zero, and the second moment about zero instead of the covariance.
        samples: how many independent samples the rows come from, in order and as many of each; None for n.
        known: ``(groups, n)``, False for rows that are left out; None for all.
    """
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    groups, most, features = rows.shape
    number = rows.new_full((groups,), most) if known is None else known.sum(1).to(rows)
    total = number.clamp(min=1)
    if known is not None:
        rows = torch.where(known.unsqueeze(-1), rows, 0)
    mean = rows.sum(1) / total[:, None] if center else rows.new_zeros(groups, features)
    if center:
        rows = rows - mean.unsqueeze(1)
        rows = rows if known is None else torch.where(known.unsqueeze(-1), rows, 0)
    samples = most if samples is None else min(samples, most)
    size = most // samples
    with full_precision():
        covariance = (rows.mT @ rows).div_(total[:, None, None])
        trace = covariance.diagonal(dim1=-2, dim2=-1).sum(-1)
        if center:
            rounding = (4 * torch.finfo(rows.dtype).eps) ** 2 * torch.linalg.vecdot(mean, mean)
            covariance.masked_fill_((trace <= rounding)[:, None, None], 0)
        parts = rows[:, : samples * size].unflatten(1, (samples, size))
        if size == 1:
            grams = torch.linalg.vector_norm(parts, dim=-1, keepdim=True).square()
        else:
            grams = parts @ parts.mT if size <= features else parts.mT @ parts  # of equal norm
        share = number / most
        squared = (grams / (size * trace)[:, None, None, None]).square().sum((1, 2, 3)) / (samples * share)
    effective = effective_rows(covariance, squared, samples * share, number)
    return Moments(number, torch.where(number > 0, effective, 0), mean, covariance)


def merged(first: Moments, second: Moments) -> Moments:
    """Merge the moments of two sets of rows into those of all rows (Chan, Golub & LeVeque 1983)."""
    total = first.rows + second.rows
    weight = torch.where(total > 0, second.rows / total, 0).unsqueeze(-1)
    shift = second.mean - first.mean
    covariance = torch.lerp(first.covariance, second.covariance, weight.unsqueeze(-1))
    covariance.addcmul_((weight * (1 - weight) * shift).unsqueeze(-1), shift.unsqueeze(-2))
    return Moments(total, first.effective_rows + second.effective_rows, first.mean + weight * shift, covariance)


def aged(running: Moments, window: Moments, weight: float) -> Moments:
    """Let running moments count less beside those of a window. Of a group with none in the window they do not age."""
    is_new = window.rows > 0
    number, effective = (torch.where(is_new, weight * count, count) for count in running[:2])
    return Moments(number, effective, running.mean, running.covariance)


def is_in_range(batch: Moments, running_mean: Tensor) -> Tensor:
    """Tell of which groups no average with the running moments can be anything but finite: ``(groups,)``.

    A finite trace is proof enough, since |cᵢⱼ|² ≤ cᵢᵢ cⱼⱼ, and a mean that is not finite makes the variances so. So far
    from the running mean as the trace allows, no window and no average of windows is out of range: two means lie at
    most twice as far apart as the farther one from a third.
    """
    shift = batch.mean - running_mean
    return torch.isfinite(batch.covariance.diagonal(dim1=-2, dim2=-1).sum(-1) + 4 * torch.linalg.vecdot(shift, shift))


def of_valid_groups(valid: Tensor, batch: Moments) -> Moments:
    """Leave out the groups that are not `valid`, ``(groups,)``: let them have no rows."""
    rows, effective, mean, covariance = batch
    return Moments(
        torch.where(valid, rows, 0),
        torch.where(valid, effective, 0),
        torch.where(valid[:, None], mean, 0),
        torch.where(valid[:, None, None], covariance, 0),
    )


RUNNING = ("running_count", "running_effective_count", "running_mean", "running_covariance")  # buffers, as in `Moments`
PENDING_ROWS, PENDING_NUMBERS = 256, 2**18  # whichever allows more rows; 1 MiB of float32
WINDOW = ("window_count", "window_effective_count", "window_mean", "window_covariance")  # names of its moments, saved


@safe_to_load
class _Window:
    """Rows and moments observed since the last window was closed.

    A plain object and not buffers: what comes and goes among a module's buffers breaks averages of models
    (`torch.optim.swa_utils.AveragedModel`), and setting a module's attribute is slow.
    """

    def __init__(self, moments: Moments | None = None) -> None:
        self.moments = moments
        self.pending: list[tuple[Tensor, int]] = []  # rows, and how many of them are one sample; all of one kind
        self.number = 0  # of pending rows in each group
        self.has_marked_rows = False  # rows among them that are NaN, and to be left out
        self.measured: list[tuple[tuple[Tensor, ...], Tensor | bool]] = []  # by a subclass, which makes rows of it

    def move(self, like: Tensor) -> None:
        """Follow the buffers of the statistics, such as `like`, to another device or data type."""
        rows = [rows for rows, _ in self.pending] + [tensor for tensors, _ in self.measured for tensor in tensors]
        held = [*(self.moments or ()), *rows]
        if any(tensor.is_meta for tensor in held) and not like.is_meta:  # there is nothing to be moved
            vars(self).update(vars(_Window()))
            return
        self.moments = None if self.moments is None else Moments(*(part.to(like) for part in self.moments))
        self.pending = [(rows.to(like.device), size) for rows, size in self.pending]
        for place, (tensors, valid) in enumerate(self.measured):
            moved = tuple(tensor.to(like.device) for tensor in tensors)
            self.measured[place] = moved, valid.to(like.device) if isinstance(valid, Tensor) else valid


class FeatureCovariance(WideBuffers):
    """Running mean and covariance of features, one for each group, in which every row counts by its age.

    Batches are gathered in a *window*, in which every row counts alike. Closing the window takes it into the running
    average; until then each of several processes gathers its own part. A window of n rows enters with the weight n,
    and each batch that follows multiplies the weight by `decay`. So the first window counts in full, nothing is
    biased towards the initial zero, and batches of different sizes weigh as many rows as they have.

    With `block_size` the covariance is block-diagonal: at most so many channels, each with all its taps, share a
    *block*. The channels are dealt out in order, to blocks as equal as possible; features that are always zero
    fill up the last one.

    Args:
        groups, channels, taps: each group has ``channels · taps`` features, a channel's taps side by side.
        decay: factor on a row's weight at each later batch, in [0, 1).
        block_size: channels of a block at most; None for one block a group.
        trace: what the trace of a group's second moment in a window is scaled to before it counts, where only
            proportions matter; None for no scaling. A window of zeros is then ignored.
        dtype: float32 or float64. Casting the module to a narrower type leaves its buffers in float32.

    Buffers, for ``groups · blocks`` matrices of M features: ``running_count`` and ``running_effective_count``
    (groups·blocks,), ``running_mean`` (groups·blocks, M), ``running_covariance`` (groups·blocks, M, M). A checkpoint
    has no window, which is one process's: loading one drops what was observed since the last window was closed.
    """

    # Buffers that have no negative numbers, or, of matrices, none on the diagonal
    nonnegative: ClassVar[tuple[str, ...]] = ("running_count", "running_effective_count", "running_covariance")
    is_approximate: bool = False  # whether a refresh gets nearer to the exact result even when nothing new was observed
    keeps_its_tensors = True
    running_count: Tensor
    running_effective_count: Tensor
    running_mean: Tensor
    running_covariance: Tensor

    def __init__(
        self,
        groups: int,
        channels: int,
        taps: int = 1,
        *,
        decay: float,
        block_size: int | None = None,
        trace: float | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.blocks = math.ceil(channels / (block_size or channels))
        size = math.ceil(channels / self.blocks) * taps
        self.groups, self.features, self.decay, self.trace = groups, channels * taps, decay, trace
        self._padding = self.blocks * size - self.features
        matrices = groups * self.blocks
        for name in ("running_count", "running_effective_count"):
            self.register_buffer(name, torch.zeros(matrices, device=device, dtype=dtype))
        self.register_buffer("running_mean", torch.zeros(matrices, size, device=device, dtype=dtype))
        self.register_buffer("running_covariance", torch.zeros(matrices, size, size, device=device, dtype=dtype))
        self._window = _Window()

    def after_moving(self, before: dict[str, Tensor | None]) -> None:
        super().after_moving(before)
        self._window.move(self.running_mean)

    def leave_window(self, memo: dict[int, Any]) -> None:
        """Let a deep copy with this memo have an empty window, without the memory of this one."""
        memo[id(self._window)] = _Window()

    def split(self, rows: Tensor) -> Tensor:
        """Deal the features out to the blocks: ``(groups, n, features) -> (groups·blocks, n, M)``."""
        if self.blocks == 1:
            return rows
        rows = F.pad(rows, (0, self._padding)) if self._padding else rows
        return rearrange(rows, "g n (b m) -> (g b) n m", b=self.blocks)

    def join(self, rows: Tensor) -> Tensor:
        """Put the blocks' features together again: ``(groups·blocks, n, M) -> (groups, n, features)``."""
        if self.blocks == 1:
            return rows
        return rearrange(rows, "(g b) n m -> g n (b m)", b=self.blocks)[..., : self.features]

    def join_mean(self, mean: Tensor) -> Tensor:
        """Apply `join` to one row: ``(groups·blocks, M) -> (groups, features)``."""
        return self.join(mean.unsqueeze(1)).squeeze(1)

    @torch.no_grad()
    def clear(self) -> None:
        """Drop the window, and make every buffer zero."""
        self.window = None
        for buffer in self.buffers():
            buffer.zero_()

    @property
    def window(self) -> Moments | None:
        """Moments of what was observed since the last window was closed; None for nothing."""
        self._gather()
        return self._window.moments

    @window.setter
    def window(self, moments: Moments | None) -> None:
        self._window = _Window(moments)

    def observe_rows(self, rows: Tensor, samples: int | None = None, valid: Tensor | bool = True) -> Tensor | bool:
        """Take rows ``(groups, n, features)`` of so many independent samples into the window, if they are `valid`.

        They are copied, and their moments computed later, of several batches at once: a batch of few rows then costs
        little more than the copy. As many rows wait as a block has features, or `PENDING_ROWS`, or as make up
        `PENDING_NUMBERS`, whichever is most. No gradients are to be recorded meanwhile.

        Returns:
            Whether they were taken: not where they hold a NaN, an Inf, or numbers whose squares do.
        """
        norm = torch.linalg.vector_norm(rows, dtype=torch.promote_types(rows.dtype, torch.float32))
        groups, number, features = rows.shape
        most, is_marked = max(self.running_mean.shape[1], PENDING_ROWS, PENDING_NUMBERS // (groups * features)), False
        if norm.is_cpu and not isinstance(valid, Tensor):  # a number on the CPU can be read without waiting
            valid = valid and math.isfinite(norm)
            if not valid:
                return False
            rows = rows.clone() if number < most else rows  # so many are not kept
        else:
            valid = torch.lt(norm, math.inf) & torch.as_tensor(valid, device=norm.device)  # a NaN is not less either
            rows, is_marked = torch.where(valid, rows, torch.nan), True  # to be left out
        size = 1 if samples is None else number // min(samples, number)
        self._append(rows, size, is_marked)
        if self._window.number >= most:
            self._gather()
        return valid

    def _append(self, rows: Tensor, size: int, is_marked: bool) -> None:
        """Let rows wait, of which so many are one sample, and some may be marked by NaN."""
        window = self._window
        if window.pending and (window.pending[0][0].dtype, window.pending[0][1]) != (rows.dtype, size):
            self._gather()
        window.pending.append((rows, size))
        window.number += rows.shape[1]
        window.has_marked_rows |= is_marked

    def open_window(self) -> dict[str, Tensor]:
        """Return what was observed since the last window was closed, as tensors by name, for `restore_window`.

        Unlike `window` this changes nothing: rows that are pending stay so, and the next window is the same in its
        last bit.
        """
        self._make_rows()
        window = self._window
        moments = {} if window.moments is None else dict(zip(WINDOW, window.moments, strict=True))
        rows = {f"pending_{place}_by_{size}": part for place, (part, size) in enumerate(window.pending)}
        return moments | rows

    @torch.no_grad()
    def restore_window(self, state: Mapping[str, Tensor]) -> None:
        """Take the state that `open_window` returned, as a copy, in place of the present window.

        Raises:
            ValueError: a tensor is unknown, of another shape, or missing beside others. Nothing is changed then.
        """
        left, moments, pending = dict(state), [], []
        for name, running in zip(WINDOW, RUNNING, strict=True):
            part, like = left.pop(name, None), getattr(self, running)
            if part is None and any(other in state for other in WINDOW):
                raise ValueError(f"{name} is missing: a window has {', '.join(WINDOW)}")
            if part is not None and part.shape != like.shape:
                raise ValueError(f"{name} of shape {tuple(part.shape)} is not possible: give {tuple(like.shape)}")
            if part is not None:
                moments.append(part.to(like, copy=True))
        for name, part in left.items():
            match = re.fullmatch(r"pending_(\d+)_by_(\d+)", name)
            if match is None:
                raise ValueError(f"{name} is no part of a window")
            if part.dim() != 3 or part.shape[::2] != (self.groups, self.features):
                shape = f"({self.groups}, any number, {self.features})"
                raise ValueError(f"{name} of shape {tuple(part.shape)} is not possible: give {shape}")
            pending.append((int(match[1]), (part.to(self.running_mean.device, copy=True), int(match[2]))))
        self.window = Moments(*moments) if moments else None
        for _, (rows, size) in sorted(pending, key=lambda one: one[0]):
            self._append(rows, size, not torch.isfinite(rows).all())

    def _make_rows(self) -> None:
        """Turn what was measured into pending rows; for a subclass that measures something."""

    @torch.no_grad()
    def _gather(self) -> None:
        """Take the pending rows into the window."""
        self._make_rows()
        window = self._window
        if not window.pending:
            return
        parts, window.pending, window.number = window.pending, [], 0
        size = parts[0][1]
        whole = [part[:, : part.shape[1] // size * size] for part, _ in parts]
        rows = whole[0] if len(whole) == 1 else torch.cat(whole, 1)
        rows = self.split(rows.to(self.running_mean.device))
        known = None
        if window.has_marked_rows:
            known = torch.isfinite(torch.linalg.vector_norm(rows, dim=-1, dtype=self.running_mean.dtype))
            window.has_marked_rows = False
        self.observe(self._moments(rows, size, known))

    def _moments(self, rows: Tensor, size: int, known: Tensor | None) -> Moments:
        """Compute the moments of rows, of which so many are one sample, and those that are not `known` are left out."""
        return moments(rows, samples=rows.shape[1] // size, known=known)

    @torch.no_grad()
    def observe(self, batch: Moments, valid: Tensor | bool = True) -> Tensor:
        """Take a batch into the window: those of its groups that are `valid`, one flag for all or one each.

        Returns:
            Whether every group was taken, as a bool tensor on the buffers' device: nothing here waits
            for the device. Where one valid group is not in range the batch is a bad one, and none is taken.
        """
        batch = Moments(*(part.to(self.running_mean.dtype) for part in batch))
        in_range = is_in_range(batch, self.running_mean)
        valid = torch.as_tensor(valid, device=in_range.device).expand_as(in_range)
        valid = valid & (in_range | ~valid).all()
        if not (valid.is_cpu and valid.all()):  # what can be known without waiting spares a pass
            batch = of_valid_groups(valid, batch)
        before = self.window
        self._window.moments = batch if before is None else merged(before, batch)
        return valid.all()

    @torch.no_grad()
    def close_window(self, elapsed: int = 1) -> bool:
        """Take the window into the running average, in place, `elapsed` batches after the last one was closed.

        The average of a group with nothing in the window does not age.

        Returns:
            Whether there was a window.
        """
        window, self.window = self.window, None
        if window is None:
            return False
        if self.trace is not None:
            traces = window.covariance.diagonal(dim1=-2, dim2=-1).sum(-1) + torch.linalg.vecdot(
                window.mean, window.mean
            )
            ratio = (self.trace / traces.view(self.groups, self.blocks).sum(1)).repeat_interleave(self.blocks)
            known = torch.isfinite(ratio)
            ratio = torch.where(known, ratio, 0)
            number, effective = (torch.where(known, count, 0) for count in window[:2])
            window = Moments(
                number, effective, ratio.sqrt()[:, None] * window.mean, ratio[:, None, None] * window.covariance
            )
        running = Moments(*(getattr(self, name) for name in RUNNING))
        for past, now in zip(running, merged(aged(running, window, self.decay**elapsed), window), strict=True):
            past.copy_(now)
        return True

    def is_sound(self, state: Mapping[str, Tensor]) -> bool:
        """Tell whether a state, by the buffers' names, can be that of any features: an average or a sum may not be.

        Matrices are not decomposed for that: one that is indefinite makes refreshes fail, until new rows prevail.
        Tensors on the meta device count as sound.
        """
        known = {name: part for name, part in state.items() if not part.is_meta}
        signed = [known[name] for name in self.nonnegative if name in known]
        signed = [part.diagonal(dim1=-2, dim2=-1) if part.dim() == 3 else part for part in signed]
        is_finite = all(bool(torch.isfinite(part).all()) for part in known.values())
        mean = known.get("running_mean")
        is_finite &= mean is None or bool(torch.isfinite(mean.square().sum()))  # so is a covariance about another
        return is_finite and all(bool((part >= 0).all()) for part in signed)

    def before_loading(self, state_dict: dict, prefix: str) -> None:
        self.window = None
        key = f"{prefix}running_effective_count"
        if f"{prefix}running_count" in state_dict:  # a checkpoint of a version that did not count effective rows
            state_dict.setdefault(key, state_dict[f"{prefix}running_count"])


def snapshot_for_graph(state: Tensor) -> Tensor:
    """Return state to multiply a gradient by: a copy where a graph of the backward pass may outlive a refresh."""
    return state.clone() if torch.is_grad_enabled() else state


class SolvedStatistics(FeatureCovariance, ABC):
    """Statistics from which every process computes for itself what its transform needs: not a matrix's inverse."""

    @staticmethod
    @abstractmethod
    def renew(those: "Sequence[Any]", elapsed: int) -> None:
        """Close the windows of several such statistics, of one class, so many batches after the last were closed.

        What follows from them is then brought up to date, in place, where a window was not empty.
        """
