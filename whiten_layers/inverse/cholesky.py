"""The inverse by a Cholesky factor: the cheapest exact one, M³ and no iteration."""

import torch
from torch import Tensor

from .base import Inverse


def cholesky(covariance: Tensor) -> Inverse:
    """Compute ``covariance⁻¹`` for n symmetric positive definite matrices ``(n, M, M)``, already damped.

    It gives no other power: ``L⁻¹`` is a root of the inverse, but not the symmetric one, and only a symmetric
    positive P keeps a step a descent direction.

    Returns:
        ``matrix`` (n, M, M); NaN for one that is not positive definite.
    """
    factor, info = torch.linalg.cholesky_ex(covariance)
    succeeded = (info == 0)[:, None, None]
    # cholesky_inverse raises where a factor is singular, so it gets the identity there.
    identity = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    return Inverse(torch.where(succeeded, torch.cholesky_inverse(torch.where(succeeded, factor, identity)), torch.nan))
