"""Mean and covariance of rows of features: of one batch, and as a running average."""

import math
from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from .._torch.modules import WideBuffers
from .._torch.precision import full_precision


class Moments(NamedTuple):
    """Number of rows, their mean and covariance, for each group: (groups,), (groups, M), (groups, M, M).

    Where there are no rows the others are 0.
    """

    rows: Tensor
    mean: Tensor
    covariance: Tensor


def zero_moments(mean: Tensor) -> Moments:
    """Moments of no rows, for the groups and features of a mean ``(groups, M)``."""
    groups, features = mean.shape
    return Moments(mean.new_zeros(groups), mean.new_zeros(groups, features), mean.new_zeros(groups, features, features))


def moments(rows: Tensor, center: bool = True) -> Moments:
    """Compute the moments of rows ``(groups, n, M)``, at least one of each group.

    The covariance divides by n. With ``center=False`` the mean is zero and the covariance is the
    second moment about zero. Rows of fewer than 32 bits are computed with as float32.
    """
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    if center:
        mean = rows.mean(dim=1)
        rows = rows - mean.unsqueeze(1)
    else:
        mean = rows.new_zeros(rows.shape[0], rows.shape[2])
    with full_precision():
        covariance = rows.mT @ rows / rows.shape[1]
    return Moments(rows.new_full((len(rows),), rows.shape[1]), mean, covariance)


def merged(first: Moments, second: Moments) -> Moments:
    """Merge the moments of two sets of rows into those of all rows (Chan, Golub & LeVeque 1983)."""
    total = first.rows + second.rows
    weight = torch.where(total > 0, second.rows / total, 0).unsqueeze(-1)
    shift = second.mean - first.mean
    covariance = torch.lerp(first.covariance, second.covariance, weight.unsqueeze(-1))
    covariance += (weight * (1 - weight) * shift).unsqueeze(-1) * shift.unsqueeze(-2)
    return Moments(total, first.mean + weight * shift, covariance)


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
        trace: what the trace of a group's window is scaled to before it counts, where only proportions matter;
            None for no scaling. A window without any variance is then ignored.
        dtype: float32 or float64. Casting the module to a narrower type leaves its buffers in float32.

    Buffers, for ``groups · blocks`` matrices of M features: ``running_count`` (groups·blocks,), ``running_mean``
    (groups·blocks, M), ``running_covariance`` (groups·blocks, M, M); and, of the same shapes, ``window_count``,
    ``window_mean`` and ``window_covariance`` while a window is open. A checkpoint has no window, which is one
    process's: loading one drops what was observed since the last window was closed.
    """

    is_approximate: bool = False  # whether a refresh gets nearer to the exact result even when nothing new was observed
    keeps_its_tensors = True
    running_count: Tensor
    running_mean: Tensor
    running_covariance: Tensor
    window_count: Tensor | None
    window_mean: Tensor | None
    window_covariance: Tensor | None

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
        self.register_buffer("running_count", torch.zeros(matrices, device=device, dtype=dtype))
        self.register_buffer("running_mean", torch.zeros(matrices, size, device=device, dtype=dtype))
        self.register_buffer("running_covariance", torch.zeros(matrices, size, size, device=device, dtype=dtype))
        for name in ("window_count", "window_mean", "window_covariance"):
            self.register_buffer(name, None, persistent=False)

    def split(self, rows: Tensor) -> Tensor:
        """Deal the features out to the blocks: ``(groups, n, features) -> (groups·blocks, n, M)``."""
        if self.blocks == 1:
            return rows
        rows = F.pad(rows, (0, self._padding))
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
        if self.window_count is None or self.window_mean is None or self.window_covariance is None:
            return None
        return Moments(self.window_count, self.window_mean, self.window_covariance)

    @window.setter
    def window(self, window: Moments | None) -> None:
        self.window_count, self.window_mean, self.window_covariance = window or (None, None, None)

    def observe_rows(self, rows: Tensor, center: bool = True, valid: Tensor | bool = True) -> Tensor:
        """Call `observe` with the moments of rows ``(groups, n, features)``."""
        return self.observe(moments(self.split(rows), center), valid)

    @torch.no_grad()
    def observe(self, batch: Moments, valid: Tensor | bool = True) -> Tensor:
        """Take a batch into the window: those of its groups that are `valid`, one flag for all or one each.

        Returns:
            Whether every group was taken, as a bool tensor on the buffers' device: nothing here waits
            for the device. Where one valid group would not be finite the batch is a bad one, and
            none is taken. A finite trace is proof enough, since |cᵢⱼ|² ≤ cᵢᵢ cⱼⱼ, and a mean that is
            not finite makes the variances so. So far from the running mean as the trace allows, no
            window and no average of windows can be anything but finite: two means lie at most
            twice as far apart as the farther one from a third.
        """
        dtype = self.running_mean.dtype
        rows, mean, covariance = batch.rows.to(dtype), batch.mean.to(dtype), batch.covariance.to(dtype)
        shift = mean - self.running_mean
        spread = covariance.diagonal(dim1=-2, dim2=-1).sum(-1) + 4 * torch.linalg.vecdot(shift, shift)
        valid = torch.as_tensor(valid, device=spread.device).expand_as(spread)
        valid = valid & (torch.isfinite(spread) | ~valid).all()
        mean, covariance = torch.where(valid[:, None], mean, 0), torch.where(valid[:, None, None], covariance, 0)
        batch = Moments(torch.where(valid, rows, 0), mean, covariance)
        window = self.window
        self.window = batch if window is None else merged(window, batch)
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
            traces = window.covariance.diagonal(dim1=-2, dim2=-1).sum(-1).view(self.groups, self.blocks).sum(1)
            ratio = (self.trace / traces).repeat_interleave(self.blocks)
            known = torch.isfinite(ratio)
            covariance = torch.where(known, ratio, 0)[:, None, None] * window.covariance
            window = Moments(torch.where(known, window.rows, 0), window.mean, covariance)
        aged = torch.where(window.rows > 0, self.decay**elapsed * self.running_count, self.running_count)
        count, mean, covariance = merged(Moments(aged, self.running_mean, self.running_covariance), window)
        self.running_count.copy_(count)
        self.running_mean.copy_(mean)
        self.running_covariance.copy_(covariance)
        return True

    def before_loading(self, state_dict: dict, prefix: str) -> None:
        self.window = None


class SolvedStatistics(FeatureCovariance, ABC):
    """Statistics from which every process computes for itself what its transform needs: not a matrix's inverse."""

    @abstractmethod
    def solve_in_place(self) -> None:
        """Bring what follows from the running statistics up to date, in place. Called when a window was closed."""
