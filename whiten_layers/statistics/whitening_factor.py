"""Whitening of one side: a running covariance, and the inverse power of it that gradients are multiplied by."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..inverse import METHODS, Inverse, Method, resolve
from ..state import COUNT
from .covariance import FeatureCovariance, snapshot_for_graph


def shrinkage(covariance: Tensor, rows: Tensor, features: Tensor | int) -> Tensor:
    """Compute how far to shrink covariances ``(n, M, M)`` of so many rows towards ``m I``, m their mean variance.

    The weight of ``m I`` that comes nearest to the true covariance, for Gaussian rows: the oracle-approximating
    shrinkage of Chen, Wiesel, Eldar & Hero (2010), eq. 23, without its terms of order 1 / M, as scikit-learn has it.
    Other features than `features` are zero.
    """
    trace = covariance.diagonal(dim1=-2, dim2=-1).sum(-1)
    norm = torch.linalg.vector_norm(covariance / trace[:, None, None], dim=(-2, -1)).square()
    weight = (norm + 1) / ((rows + 1) * (norm - 1 / features))
    return torch.where(weight < 1, weight, 1).clamp(min=0)  # 1 also where the covariance is m I, or zero


COUNTS = ("num_refreshes", "num_refreshes_failed", "num_refreshes_restarted", "num_refreshes_rescued")


class Damped(NamedTuple):
    """``C/m + λI`` (n, M, M) of a `WhiteningFactor`, the diagonal (n, M) of C/m, and m (n,)."""

    matrix: Tensor
    diagonal: Tensor
    variance: Tensor


class RefreshResult(NamedTuple):
    """New values for n matrices of a `WhiteningFactor`, to be used where they are `valid` (n,); see its buffers.

    ``attempt`` (n,) numbers the attempt that succeeded, from 1; 0 for none. ``restarted`` (n,) tells which iterations
    had to restart.
    """

    attempt: Tensor
    restarted: Tensor
    scale: Tensor
    precision: Tensor
    directions: Tensor | None = None

    @property
    def valid(self) -> Tensor:
        """Which matrices have a result, ``(n,)``."""
        return self.attempt > 0


class WhiteningFactor(FeatureCovariance):
    """Running covariance C and the matrix ``precision = k·(C/m + λI)^(-p)`` that was last computed from it.

    C is what `estimate` makes of the running statistics: about the mean or about zero, and shrunk. m is the mean
    variance of a group's features, so λ, `damping`, is relative to it. k is ``m^(-p)`` (for an approximate inverse and
    power 1 such that the whitened features have variance 1 on the mean) or, with `rescale`, the factor that keeps the
    expected component of a gradient along the plain one. For ``G = Σ δ xᵀ`` whose δ does not depend on x, E‖G‖² is
    proportional to tr C and E⟨GP, G⟩ to tr(PC), so ``k = tr C / tr(PC)``. It depends on the statistics alone, so the
    transform stays linear. The blocks of a group share m and k; a feature that fills up a block has variance 1 + λ.

    E‖GP‖² is proportional to tr(PCP), so ``√(tr C / tr(PCP))`` would keep the expected norm. It is never more than
    ``tr C / tr(PC)``, and equal where C is a multiple of I. With `between`, k is the geometric mean of the two.

    Args:
        groups, channels, taps, decay, block_size, trace, dtype: as for `FeatureCovariance`.
        method, power, damping, rescale, shrink, rank: as for `FeatureWhitening`.
        center: True for the covariance, False for the second moment about zero.
        between: with `rescale`, keep something between the component and the norm. Needs a product of M×M matrices.

    Buffers, beside the statistics: ``precision`` (groups·blocks, M, M), ``scale`` (groups·blocks,), the k inside it,
    ``mean`` (groups·blocks, M), ``directions`` (groups·blocks, M, rank) of the recursive method, and
    ``num_refreshes``, ``num_refreshes_failed``, ``num_refreshes_restarted`` and ``num_refreshes_rescued`` (). Until a
    matrix's first refresh its precision is the identity, its mean and its scale are zero.
    """

    nonnegative = (*FeatureCovariance.nonnegative, "precision", "scale")
    is_symmetric = True  # the precision: processes send a triangle of it
    precision: Tensor
    scale: Tensor
    mean: Tensor
    directions: Tensor | None
    num_refreshes: Tensor
    num_refreshes_failed: Tensor
    num_refreshes_restarted: Tensor
    num_refreshes_rescued: Tensor

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
        center: bool = True,
        shrink: bool = False,
        between: bool = False,
        block_size: int | None = None,
        rank: int = 16,
        trace: float | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(
            groups, channels, taps, decay=decay, block_size=block_size, trace=trace, device=device, dtype=dtype
        )
        covariance = self.running_covariance
        matrices, size = self.running_mean.shape
        self.method, self.power, self.damping, self.rescale = resolve(method, power), power, damping, rescale
        self.center, self.shrink, self.between = center, shrink, between
        self.rank = min(rank, size)
        self.register_buffer("precision", torch.eye(size).to(covariance).repeat(matrices, 1, 1))
        self.register_buffer("scale", covariance.new_zeros(matrices))
        self.register_buffer("mean", torch.zeros_like(self.running_mean))
        self.is_approximate = self.inversion.is_approximate
        directions = covariance.new_zeros(matrices, size, self.rank) if self.is_approximate else None
        self.register_buffer("directions", directions)
        for name in COUNTS:
            self.register_buffer(name, torch.zeros((), device=device, dtype=COUNT))

    @property
    def inversion(self) -> Method:
        """Return the method by which a refresh computes the precision from the damped covariance."""
        return METHODS[self.method]

    @torch.no_grad()
    def reset_state(self) -> None:
        """Set every buffer to what it was when made."""
        self.clear()
        self.precision.diagonal(dim1=-2, dim2=-1).fill_(1)

    def group_sum(self, values: Tensor) -> Tensor:
        """Sum over the blocks of a group, at each of them: ``(groups·blocks,) -> (groups·blocks,)``."""
        if self.blocks == 1:
            return values
        return values.view(self.groups, self.blocks).sum(1).repeat_interleave(self.blocks)

    def kept(self) -> Tensor:
        """Mask the features that do not just fill up a block: ``(groups·blocks, M)``, 1 or 0."""
        return self.split(self.running_mean.new_ones(self.groups, 1, self.features)).squeeze(1)

    def estimate(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """Estimate the covariance, or the second moment, of all rows from those that were seen, in a wider `dtype`.

        Of what n effective rows seem to tell, a part is chance: `shrinkage` tells how much of the covariance, and
        ``tr(C) / n`` is how much of the squared length of the mean (James & Stein 1961). With `shrink` that part is
        spread over all features evenly, which keeps the trace.

        Returns:
            C divided by the mean variance m of its group's features; and m, ``(groups·blocks,)``.
        """
        known = self.running_covariance, self.running_mean, self.running_effective_count
        covariance, mean, rows = known if dtype is None else [part.to(dtype) for part in known]
        kept = self.kept()
        trace, even = covariance.diagonal(dim1=-2, dim2=-1).sum(-1), torch.zeros_like(rows)
        certain = torch.ones_like(rows)
        if self.shrink:
            weight = shrinkage(covariance, (rows - 1).clamp(min=0), kept.sum(1))  # the mean takes one row
            covariance, even = (1 - weight)[:, None, None] * covariance, weight * trace
        if not self.center:
            energy = torch.linalg.vecdot(mean, mean)
            if self.shrink:
                certain = 1 - trace / ((rows - 1) * energy)
                certain = torch.where(certain > 0, certain, 0)
                even = even + (1 - certain) * energy
            column = mean.unsqueeze(-1)
            covariance = torch.addcmul(covariance, certain[:, None, None] * column, column.mT)
            trace = trace + energy
        variance = self.group_sum(trace) / self.features
        covariance = covariance / variance[:, None, None]
        covariance.diagonal(dim1=-2, dim2=-1).add_((even / variance / kept.sum(1)).unsqueeze(1) * kept)
        return covariance, variance

    def damped(self, times: float = 1, dtype: torch.dtype | None = None) -> Damped:
        """Compute ``C/m + λI``, of mean variance 1 + λ, which is also the variance of features that fill up a block.

        λ is the damping, or so many times that; the result may have a wider `dtype` than the statistics.
        """
        covariance, variance = self.estimate(dtype)
        diagonal = covariance.diagonal(dim1=-2, dim2=-1)
        undamped = diagonal.clone()
        diagonal.add_(times * self.damping)
        if self._padding:
            diagonal[self.blocks - 1 :: self.blocks, -self._padding :] += 1
        return Damped(covariance, undamped, variance)

    def warm_start(self) -> Inverse:
        """Return the inverse power of the last `damped()`, from which the next refresh may start; NaN for none."""
        scale = torch.where(self.scale > 0, self.scale, torch.nan)
        return Inverse(self.precision / scale[:, None, None], self.directions)

    def scale_inverse(self, inverse: Inverse, damped: Damped) -> RefreshResult:
        """Scale inverse powers of what is `damped` to precisions. Where one is not finite none of its group is valid.

        The damping is taken out of ``damped.matrix``, in place.
        """
        matrix, (covariance, diagonal, variance) = inverse.matrix, damped
        covariance.diagonal(dim1=-2, dim2=-1).copy_(diagonal)
        trace = self.group_sum(torch.linalg.vecdot(matrix.flatten(1), covariance.flatten(1)))  # of P C/m
        if self.rescale:
            scale = self.features / trace  # tr C/m is the number of features
            if self.between:
                energy = torch.linalg.vecdot((matrix @ covariance).flatten(1), matrix.flatten(1))  # of P C/m P
                scale = (scale * (self.features / self.group_sum(energy)).sqrt()).sqrt()
        else:
            scale = variance.pow(-self.power)
            if self.power == 1 and self.is_approximate:
                diagonal = (matrix.diagonal(dim1=-2, dim2=-1) * self.kept()).sum(-1)
                scale = scale * self.features / (trace + self.damping * self.group_sum(diagonal))
        valid = torch.isfinite(self.group_sum(scale * matrix.diagonal(dim1=-2, dim2=-1).sum(-1)))
        restarted = torch.zeros_like(valid) if inverse.restarted is None else inverse.restarted
        return RefreshResult(valid.int(), restarted, scale, matrix.mul_(scale[:, None, None]), inverse.directions)

    def commit(self, result: RefreshResult) -> None:
        """Write what is valid of a result into the buffers, in place; the other groups stay as they are."""
        valid, precision = result.valid, result.precision
        if not (valid.is_cpu and valid.all()):  # what can be known without waiting spares a pass
            precision = torch.where(valid[:, None, None], precision, self.precision)
        self.precision.copy_(precision)
        self.scale.copy_(torch.where(valid, result.scale, self.scale))
        if self.center:  # about zero otherwise, where the mean stays zero
            self.mean.copy_(torch.where(valid[:, None], self.running_mean, self.mean))
        if self.directions is not None and result.directions is not None:
            self.directions.copy_(torch.where(valid[:, None, None], result.directions, self.directions))
        self.num_refreshes.add_(valid.all())
        # A group that has seen nothing yet has nothing to fail at.
        self.num_refreshes_failed.add_((~valid & (self.running_count > 0)).any())
        self.num_refreshes_restarted.add_(result.restarted.any())
        self.num_refreshes_rescued.add_((result.attempt > 1).any())

    def before_loading(self, state_dict: dict, prefix: str) -> None:
        super().before_loading(state_dict, prefix)
        if f"{prefix}num_refreshes" in state_dict:  # a checkpoint of a version that did not try again
            state_dict.setdefault(f"{prefix}num_refreshes_rescued", torch.zeros_like(self.num_refreshes_rescued))

    def extra_repr(self) -> str:
        sizes = {"groups": self.groups, "blocks": self.blocks}
        more = [f"{name}={number}" for name, number in sizes.items() if number > 1]
        return ", ".join([str(self.features), *more, f"power={self.power}", repr(self.method)])

    def current_precision(self, scale: Tensor | None = None) -> Tensor:
        """Return the precision as of the last refresh, ``(groups·blocks, M, M)``, times a `scale` ()."""
        return snapshot_for_graph(self.precision) if scale is None else self.precision * scale

    def multiply(self, rows: Tensor, scale: Tensor | None = None) -> Tensor:
        """Compute ``rows @ P``, P block-diagonal, times a `scale` (): ``(groups, n, features) -> the same``."""
        if scale is not None and rows.numel() < self.precision.numel():
            rows, scale = rows * scale, None
        return self.product(rows, self.current_precision(scale))

    def product(self, rows: Tensor, matrices: Tensor) -> Tensor:
        """Multiply rows by block-diagonal matrices: ``(groups, n, features), (groups·blocks, M, M) -> as the rows``."""
        if self.blocks == 1:
            return torch.bmm(rows, matrices)  # `@` would first look for dimensions to expand
        size = matrices.shape[-1]
        parts, blocks = rows.split(size, -1), matrices.view(self.groups, self.blocks, size, size).unbind(1)
        pairs = zip(parts, blocks, strict=True)
        # The last block may be filled up by features of its own, which no other feature varies with.
        products = [part @ block[:, : part.shape[-1], : part.shape[-1]] for part, block in pairs]
        return torch.cat(products, -1)

    def current_mean(self) -> Tensor:
        """Return the mean as of the last refresh, ``(groups, features)``."""
        mean = snapshot_for_graph(self.mean)
        return mean if self.blocks == 1 else self.join_mean(mean)
