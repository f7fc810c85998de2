"""One side of a whitening: a covariance, and the inverse of it that is in force."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ..inverse import METHODS, Inverse, resolve
from .covariance import FeatureCovariance, Moments

PROBES = 16


def transformed_trace(inverse: Tensor, covariance: Tensor, kept: Tensor | None = None) -> Tensor:
    """``tr(P C P)`` of n pairs of matrices, over the features that are `kept` ``(n, M)``, or all.

    Up to M = 512 exactly. Above, where the product would outweigh a recursive inverse, as the mean
    over 16 fixed vectors z of random signs, E[(Pz)ᵀ C (Pz)] = tr(PCP) (Hutchinson 1989). Its relative
    standard deviation is √(1 / 8 r), with r the effective rank tr(A)² / tr(A²) of A = PCP: 5 % where that is 50.
    """
    size = covariance.shape[-1]
    if size <= 512:
        columns = inverse if kept is None else inverse * kept.unsqueeze(-2)
    else:
        signs = 2 * torch.randint(0, 2, (size, PROBES), generator=torch.Generator().manual_seed(0)) - 1
        probes = signs.to(inverse) if kept is None else signs.to(inverse) * kept.unsqueeze(-1)
        columns = inverse @ probes / math.sqrt(PROBES)
    return torch.linalg.vecdot(columns.flatten(1), (covariance @ columns).flatten(1))


class Outcome(NamedTuple):
    """What a refresh puts in force where it is `valid` (n,): see the buffers of `WhiteningFactor`."""

    valid: Tensor
    restarted: Tensor
    scale: Tensor
    precision: Tensor
    directions: Tensor | None = None


class WhiteningFactor(FeatureCovariance):
    """A running covariance C and, from it, what is in force: ``precision = k·(C/m + λI)^(-p)`` and ``mean``.

    m is the mean variance of a group's features, so λ, `damping`, is relative to it. k is ``m^(-p)``
    (for an approximate inverse and power 1 such that the whitened features have variance 1 on the mean)
    or, with `rescale`, the factor that keeps the expected norm of a gradient ``G = Σ δ xᵀ`` whose δ
    does not depend on x: with E‖G‖² ∝ tr C and E‖GP‖² ∝ tr(PCP), ``k = sqrt(tr C / tr(PCP))``. It
    depends on the statistics alone, so the transform stays linear.

    With `block_size`, C is block-diagonal: at most so many channels, each with all its taps, are whitened
    together. The channels are dealt out in order, to blocks as equal as they can be; the last is
    filled up with features that are always zero. The blocks of a group share m and k.

    Args:
        groups, channels, taps: the features are ``channels · taps`` a group, a channel's taps together.
        method, power, damping, decay, rescale, block_size, rank: as for `FeatureWhitening`.
        trace: what the trace of a group's window is brought to before it counts, where only proportions matter;
            None leaves it. A window in which nothing varies then tells nothing.

    Buffers, beside the statistics (one each for ``groups · blocks`` matrices of M features): ``precision``
    (groups·blocks, M, M), ``scale`` (groups·blocks,) the k inside it, ``mean`` (groups·blocks, M),
    ``directions`` (groups·blocks, M, rank) of the recursive method, and ``num_refreshes``,
    ``num_refreshes_failed`` and ``num_refreshes_restarted`` (). Until a matrix's first refresh its
    precision is the identity, its mean and its scale are zero.
    """

    precision: Tensor
    scale: Tensor
    mean: Tensor
    directions: Tensor | None
    num_refreshes: Tensor
    num_refreshes_failed: Tensor
    num_refreshes_restarted: Tensor

    def __init__(
        self,
        groups: int,
        channels: int,
        taps: int = 1,
        *,
        method: str,
        power: float,
        damping: float,
        decay: float,
        rescale: bool,
        block_size: int | None = None,
        rank: int = 16,
        trace: float | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.blocks = math.ceil(channels / (block_size or channels))
        size = math.ceil(channels / self.blocks) * taps
        super().__init__(groups * self.blocks, size, decay=decay, device=device, dtype=dtype)
        self.method, self.power, self.damping, self.rescale = resolve(method, power), power, damping, rescale
        self.groups, self.features, self.rank, self.trace = groups, channels * taps, min(rank, size), trace
        self._padding = self.blocks * size - self.features
        covariance = self.running_covariance
        self.register_buffer("precision", torch.eye(size).to(covariance).repeat(len(covariance), 1, 1))
        self.register_buffer("scale", covariance.new_zeros(len(covariance)))
        self.register_buffer("mean", torch.zeros_like(self.running_mean))
        self.is_approximate = METHODS[self.method].is_approximate
        directions = covariance.new_zeros(*self.mean.shape, self.rank) if self.is_approximate else None
        self.register_buffer("directions", directions)
        for name in ("num_refreshes", "num_refreshes_failed", "num_refreshes_restarted"):
            self.register_buffer(name, torch.zeros((), device=device, dtype=torch.long))

    @torch.no_grad()
    def reset_state(self) -> None:
        """Forget everything: the buffers as they were when made."""
        self.clear()
        self.precision.diagonal(dim1=-2, dim2=-1).fill_(1)

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
        """`join` for one row: ``(groups·blocks, M) -> (groups, features)``."""
        return self.join(mean.unsqueeze(1)).squeeze(1)

    def group_sum(self, values: Tensor) -> Tensor:
        """Sum over the blocks of a group, at each of them: ``(groups·blocks,) -> (groups·blocks,)``."""
        if self.blocks == 1:
            return values
        return values.view(self.groups, self.blocks).sum(1).repeat_interleave(self.blocks)

    @torch.no_grad()
    def close_window(self, elapsed: int = 1) -> None:
        if self.window is not None and self.trace is not None:
            count, mean, covariance = self.window
            ratio = self.trace / self.group_sum(covariance.diagonal(dim1=-2, dim2=-1).sum(-1))
            known = torch.isfinite(ratio)
            self.window = Moments(
                torch.where(known, count, 0), mean, torch.where(known, ratio, 0)[:, None, None] * covariance
            )
        super().close_window(elapsed)

    def _trace(self) -> Tensor:
        return self.group_sum(self.running_covariance.diagonal(dim1=-2, dim2=-1).sum(-1))

    def _whitened_trace(self, inverse: Tensor) -> Tensor:
        """``tr(P (C/m + λI))`` of each group, for an inverse P of `damped()`."""
        diagonal = self.join(inverse.diagonal(dim1=-2, dim2=-1).unsqueeze(1)).sum((1, 2))
        product = torch.linalg.vecdot(inverse.flatten(1), self.running_covariance.flatten(1))
        whitened = self.group_sum(product) * self.features / self._trace()
        return whitened + self.damping * diagonal.repeat_interleave(self.blocks)

    def damped(self) -> Tensor:
        """``C/m + λI``, of mean variance 1 + λ, which is also the variance of the features that fill up a block."""
        variance = self._trace() / self.features
        covariance = self.running_covariance / variance[:, None, None]
        diagonal = covariance.diagonal(dim1=-2, dim2=-1)
        diagonal.add_(self.damping)
        if self._padding:
            diagonal[self.blocks - 1 :: self.blocks, -self._padding :] += 1
        return covariance

    def last(self) -> Inverse:
        """Where the next refresh may start from: the inverse power of the last `damped()`, NaN before the first."""
        scale = torch.where(self.scale > 0, self.scale, torch.nan)
        return Inverse(self.precision / scale[:, None, None], self.directions)

    def outcome(self, inverse: Inverse) -> Outcome:
        """What inverses of `damped()` come to; where one is not finite none of its group is valid."""
        matrix, trace = inverse.matrix, self._trace()
        if self.rescale:
            kept = self.split(matrix.new_ones(self.groups, 1, self.features)).squeeze(1) if self._padding else None
            scale = (trace / self.group_sum(transformed_trace(matrix, self.running_covariance, kept))).sqrt()
        else:
            scale = (trace / self.features).pow(-self.power)
            if self.power == 1 and self.is_approximate:
                scale = scale * self.features / self._whitened_trace(matrix)
        valid = torch.isfinite(self.group_sum(scale * matrix.diagonal(dim1=-2, dim2=-1).sum(-1)))
        restarted = torch.zeros_like(valid) if inverse.restarted is None else inverse.restarted
        return Outcome(valid, restarted, scale, matrix.mul_(scale[:, None, None]), inverse.directions)

    def install(self, outcome: Outcome) -> None:
        """Put what is valid in force, in place; the groups that are not stay as they are."""
        valid, precision = outcome.valid, outcome.precision
        if not (valid.is_cpu and valid.all()):  # what can be known without waiting spares a pass
            precision = torch.where(valid[:, None, None], precision, self.precision)
        self.precision.copy_(precision)
        self.scale.copy_(torch.where(valid, outcome.scale, self.scale))
        self.mean.copy_(torch.where(valid[:, None], self.running_mean, self.mean))
        if self.directions is not None and outcome.directions is not None:
            self.directions.copy_(torch.where(valid[:, None, None], outcome.directions, self.directions))
        self.num_refreshes.add_(valid.all())
        # A group that has seen nothing yet has nothing to fail at.
        self.num_refreshes_failed.add_((~valid & (self.running_count > 0)).any())
        self.num_refreshes_restarted.add_(outcome.restarted.any())

    def extra_repr(self) -> str:
        sizes = {"groups": self.groups, "blocks": self.blocks}
        more = [f"{name}={number}" for name, number in sizes.items() if number > 1]
        return ", ".join([str(self.features), *more, f"power={self.power}", repr(self.method)])

    def multiply(self, rows: Tensor) -> Tensor:
        """``rows @ P``, P block-diagonal: ``(groups, n, features) -> (groups, n, features)``."""
        return self.join(self.split(rows) @ constant(self.precision))

    def feature_mean(self) -> Tensor:
        """The mean in force, ``(groups, features)``."""
        return self.join_mean(constant(self.mean))


def constant(state: Tensor) -> Tensor:
    """State as a factor of the gradient: a copy where a graph of the backward pass may outlive the next refresh."""
    return state.clone() if torch.is_grad_enabled() else state
