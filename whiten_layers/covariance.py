"""The running mean and covariance of a set of features."""

import torch
from torch import Tensor, nn

from .numerics import full_precision


def moments(rows: Tensor, center: bool = True) -> tuple[Tensor, Tensor]:
    """Mean and covariance of rows: ``(groups, n, M) -> (groups, M), (groups, M, M)``.

    The covariance divides by n. With ``center=False`` the mean is zero and the second is the
    second moment about zero. Rows of fewer than 32 bits are taken as float32.
    """
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    if center:
        mean = rows.mean(dim=1)
        rows = rows - mean.unsqueeze(1)
    else:
        mean = rows.new_zeros(rows.shape[0], rows.shape[2])
    with full_precision():
        return mean, rows.mT @ rows / rows.shape[1]


class FeatureCovariance(nn.Module):
    """A count-weighted running mean and covariance, one for each group, updated in place.

    A batch of n rows weighs n, and every batch that follows multiplies that by `decay`: the first batch
    counts in full, nothing is biased towards the initial zero, and batches of different sizes weigh
    as many rows as they have. Two means are merged with the covariance between them
    (Chan, Golub & LeVeque 1983), so the covariance is about the mean of all rows.

    Args:
        groups, features: the shape of the statistics.
        decay: what a batch's weight is multiplied by at each later one; in [0, 1).
        dtype: float32 or float64. Casting the module to a narrower type leaves its buffers in float32.

    Buffers: ``running_count`` (groups,), ``running_mean`` (groups, M), ``running_covariance`` (groups, M, M).
    """

    running_count: Tensor
    running_mean: Tensor
    running_covariance: Tensor

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

    @torch.no_grad()
    def update(
        self, mean: Tensor, covariance: Tensor, count: int, valid: Tensor | bool = True, *, elapsed: int = 1
    ) -> Tensor:
        """Merge a batch of `count` rows into the groups that are `valid`, one flag for all or one each.

        `elapsed` counts the batches since the one looked at last, this one included.

        Returns:
            Whether every group was merged, as a bool tensor on the buffers' device: nothing here waits
            for the device. Where one valid group would not be finite the batch is a bad one, and
            none is. A finite trace is proof enough, since |cᵢⱼ|² ≤ cᵢᵢ cⱼⱼ, and a mean that is
            not finite makes the variances so.
        """
        total = self.decay**elapsed * self.running_count + count
        weight = (count / total).unsqueeze(-1)
        shift = mean.to(total.dtype) - self.running_mean
        merged = torch.lerp(self.running_covariance, covariance.to(total.dtype), weight.unsqueeze(-1))
        merged += (weight * (1 - weight) * shift).unsqueeze(-1) * shift.unsqueeze(-2)
        valid = torch.as_tensor(valid, device=total.device).expand_as(total)
        finite = torch.isfinite(merged.diagonal(dim1=-2, dim2=-1).sum(-1))
        valid = valid & (finite | ~valid).all()
        self.running_covariance.copy_(torch.where(valid[:, None, None], merged, self.running_covariance))
        self.running_mean.copy_(torch.where(valid[:, None], self.running_mean + weight * shift, self.running_mean))
        self.running_count.copy_(torch.where(valid, total, self.running_count))
        return valid.all()

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.is_floating_point() and torch.finfo(new.dtype).bits < 32:
                self._buffers[name] = old.to(new.device, torch.float32)
        return self

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):  # type: ignore[no-untyped-def]
        super()._load_from_state_dict(state_dict, prefix, copied(local_metadata), *args)


def copied(local_metadata: dict) -> dict:
    """Metadata of a load that copies: an assigned tensor would bring its own device, and fewer digits than 32 bits."""
    return {**local_metadata, "assign_to_params_buffers": False}
