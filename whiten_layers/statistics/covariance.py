"""The running mean and covariance of a set of features."""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from .._torch.precision import WideBuffers, full_precision


class Moments(NamedTuple):
    """A number of rows, their mean and covariance, for each group: (groups,), (groups, M), (groups, M, M).

    Where there are no rows the others are 0.
    """

    rows: Tensor
    mean: Tensor
    covariance: Tensor


def zero_moments(mean: Tensor) -> Moments:
    """Those of no rows, of the groups and features of a mean ``(groups, M)``."""
    groups, features = mean.shape
    return Moments(mean.new_zeros(groups), mean.new_zeros(groups, features), mean.new_zeros(groups, features, features))


def moments(rows: Tensor, center: bool = True) -> Moments:
    """Moments of rows ``(groups, n, M)``, n of which are to be at least 1.

    The covariance divides by n. With ``center=False`` the mean is zero and the covariance is the
    second moment about zero. Rows of fewer than 32 bits are taken as float32.
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
    """Moments of the rows of both, with the covariance between them (Chan, Golub & LeVeque 1983)."""
    total = first.rows + second.rows
    weight = torch.where(total > 0, second.rows / total, 0).unsqueeze(-1)
    shift = second.mean - first.mean
    covariance = torch.lerp(first.covariance, second.covariance, weight.unsqueeze(-1))
    covariance += (weight * (1 - weight) * shift).unsqueeze(-1) * shift.unsqueeze(-2)
    return Moments(total, first.mean + weight * shift, covariance)


class FeatureCovariance(WideBuffers):
    """A count-weighted running mean and covariance, one for each group.

    What is observed is gathered in a window, in which every row counts alike, and comes into the average
    when the window is closed: until then, processes that average together each gather their own
    part. A window of n rows weighs n, and `decay` to the power of the batches that follow: the first one counts
    in full, nothing is biased towards the initial zero, and batches of different sizes weigh as many
    rows as they have.

    Args:
        groups, features: the shape of the statistics.
        decay: what a row's weight is multiplied by at each later batch; in [0, 1).
        dtype: float32 or float64. Casting the module to a narrower type leaves its buffers in float32.

    Buffers: ``running_count`` (groups,), ``running_mean`` (groups, M), ``running_covariance`` (groups, M, M); and, of
    the same shapes, ``window_count``, ``window_mean`` and ``window_covariance`` while a window is open. A checkpoint
    has no window, which is one process's: loading one forgets what was observed since the last was closed.
    """

    is_approximate: bool = False  # whether what follows comes nearer at every refresh, with nothing new
    running_count: Tensor
    running_mean: Tensor
    running_covariance: Tensor
    window_count: Tensor | None
    window_mean: Tensor | None
    window_covariance: Tensor | None

    def __init__(
        self,
        groups: int,
        features: int,
        *,
        decay: float,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("running_count", torch.zeros(groups, device=device, dtype=dtype))
        self.register_buffer("running_mean", torch.zeros(groups, features, device=device, dtype=dtype))
        self.register_buffer("running_covariance", torch.zeros(groups, features, features, device=device, dtype=dtype))
        for name in ("window_count", "window_mean", "window_covariance"):
            self.register_buffer(name, None, persistent=False)

    @torch.no_grad()
    def clear(self) -> None:
        """Forget the window, and make every buffer zero."""
        self.window = None
        for buffer in self.buffers():
            buffer.zero_()

    @property
    def window(self) -> Moments | None:
        """What was observed since the last window was closed."""
        if self.window_count is None or self.window_mean is None or self.window_covariance is None:
            return None
        return Moments(self.window_count, self.window_mean, self.window_covariance)

    @window.setter
    def window(self, window: Moments | None) -> None:
        self.window_count, self.window_mean, self.window_covariance = window or (None, None, None)

    @torch.no_grad()
    def observe(self, batch: Moments, valid: Tensor | bool = True) -> Tensor:
        """Take a batch into the window, its groups that are `valid`, one flag for all or one each.

        Returns:
            Whether every group was taken, as a bool tensor on the buffers' device: nothing here waits
            for the device. Where one valid group would not be finite the batch is a bad one, and
            none is taken. A finite trace is proof enough, since |cᵢⱼ|² ≤ cᵢᵢ cⱼⱼ, and a mean that is
            not finite makes the variances so. So far from the running mean as the trace allows, no
            window and no average of windows can be anything but finite: two means lie at most
            twice as far apart as the farther one from a third.
        """
        batch = Moments(*(part.to(self.running_mean.dtype) for part in batch))
        shift = batch.mean - self.running_mean
        spread = batch.covariance.diagonal(dim1=-2, dim2=-1).sum(-1) + 4 * torch.linalg.vecdot(shift, shift)
        valid = torch.as_tensor(valid, device=spread.device).expand_as(spread)
        valid = valid & (torch.isfinite(spread) | ~valid).all()
        batch = Moments(*(torch.where(valid.view(-1, *[1] * (part.dim() - 1)), part, 0) for part in batch))
        self.window = batch if self.window is None else merged(self.window, batch)
        return valid.all()

    @torch.no_grad()
    def close_window(self, elapsed: int = 1) -> None:
        """Take the window into the average, in place, `elapsed` batches after the last one was closed.

        A group of which there is nothing in the window does not age.
        """
        window, self.window = self.window, None
        if window is None:
            return
        aged = torch.where(window.rows > 0, self.decay**elapsed * self.running_count, self.running_count)
        running = Moments(aged, self.running_mean, self.running_covariance)
        count, mean, covariance = merged(running, window)
        self.running_count.copy_(count)
        self.running_mean.copy_(mean)
        self.running_covariance.copy_(covariance)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):  # type: ignore[no-untyped-def]
        self.window = None
        super()._load_from_state_dict(state_dict, prefix, copied(local_metadata), *args)


class SettledCovariance(FeatureCovariance, ABC):
    """Statistics from which follows, in every process for itself, what is in force: not a matrix's inverse."""

    @abstractmethod
    def settle(self) -> None:
        """Put in force, in place, what follows from the running statistics. Called when a window has been closed."""


def copied(local_metadata: dict) -> dict:
    """Metadata of a load that copies: an assigned tensor would bring its own device, and fewer digits than 32 bits."""
    return {**local_metadata, "assign_to_params_buffers": False}
