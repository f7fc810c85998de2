"""Inverse by Cholesky factorization: the cheapest exact method, with M³ operations and no iteration."""

import torch
from torch import Tensor

from .base import Inverse


def cholesky(covariance: Tensor) -> Inverse:
    """Compute ``covariance⁻¹`` for n symmetric positive definite matrices ``(n, M, M)``, already damped.

    No other power is possible: ``L⁻¹`` is a root of the inverse, but not the symmetric one. Only a symmetric positive P
    keeps a step a descent direction.

    Returns:
        ``matrix`` (n, M, M); NaN for a matrix that is not positive definite.
    """
    factor, info = torch.linalg.cholesky_ex(covariance)
    succeeded = (info == 0)[:, None, None]
    # cholesky_inverse raises for a singular factor, so it gets the identity instead.
    identity = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    return Inverse(torch.where(succeeded, torch.cholesky_inverse(torch.where(succeeded, factor, identity)), torch.nan))
