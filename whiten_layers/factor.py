"""One side of a whitening: a covariance, and the inverse of it that is in force."""

import torch
from torch import Tensor

from .covariance import FeatureCovariance


class WhiteningFactor(FeatureCovariance):
    """A running covariance C and, from it, what is in force: ``precision = k·(C + λI)^(-p)`` and ``mean``.

    λ is `damping` times the group's mean variance. k is 1 or, with `rescale`, the factor that keeps
    the expected norm of a gradient ``G = Σ δ xᵀ`` whose δ does not depend on x: with E‖G‖² ∝ tr C
    and E‖GP‖² ∝ tr(PCP), ``k = sqrt(tr C / tr(PCP))``. It depends on the statistics alone, so
    the transform stays linear.

    Buffers, beside the statistics: ``precision`` (groups, M, M), ``scale`` (groups,) the k inside it,
    ``mean`` (groups, M), and ``num_refreshes`` and ``num_refreshes_failed`` (). Until the first refresh
    the precision is the identity and the mean zero.
    """

    precision: Tensor
    scale: Tensor
    mean: Tensor
    num_refreshes: Tensor
    num_refreshes_failed: Tensor

    def __init__(
        self,
        groups: int,
        features: int,
        *,
        method: str,
        power: float,
        damping: float,
        decay: float,
        rescale: bool,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(groups, features, decay=decay, device=device, dtype=dtype)
        self.method, self.power, self.damping, self.rescale = method, power, damping, rescale
        identity = torch.eye(features, device=device, dtype=dtype)
        self.register_buffer("precision", identity.repeat(groups, 1, 1))
        self.register_buffer("scale", torch.ones(groups, device=device, dtype=dtype))
        self.register_buffer("mean", torch.zeros(groups, features, device=device, dtype=dtype))
        self.register_buffer("num_refreshes", torch.zeros((), device=device, dtype=torch.long))
        self.register_buffer("num_refreshes_failed", torch.zeros((), device=device, dtype=torch.long))

    def damped(self) -> Tensor:
        covariance = self.running_covariance
        damping = self.damping * covariance.diagonal(dim1=-2, dim2=-1).mean(-1)
        return covariance + damping[:, None, None] * torch.eye(
            covariance.shape[-1], device=covariance.device, dtype=covariance.dtype
        )

    def install(self, inverse: Tensor) -> None:
        """Put an inverse of `damped()` in force, in place; one that is not finite leaves the last as it is."""
        inverse = (inverse + inverse.mT) / 2
        scale = torch.ones_like(self.scale)
        if self.rescale:
            product = inverse @ self.running_covariance
            trace = self.running_covariance.diagonal(dim1=-2, dim2=-1).sum(-1)
            scale = (trace / (product * inverse).sum((-2, -1))).sqrt()
        precision = scale[:, None, None] * inverse
        valid = torch.isfinite(precision.sum((-2, -1)))  # each group for itself
        self.precision.copy_(torch.where(valid[:, None, None], precision, self.precision))
        self.scale.copy_(torch.where(valid, scale, self.scale))
        self.mean.copy_(torch.where(valid[:, None], self.running_mean, self.mean))
        self.num_refreshes.add_(valid.all())
        self.num_refreshes_failed.add_(~valid.all())
