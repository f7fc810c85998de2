"""The inverse by a Cholesky factor: the cheapest exact one, M³ and no iteration."""

import torch
from torch import Tensor

from .base import Inverse


def cholesky(covariance: Tensor, power: float = 1.0, last: Inverse | None = None, rank: int = 16) -> Inverse:
    """Return ``covariance⁻¹`` for n symmetric positive definite matrices.

    Args:
        covariance: ``(n, M, M)``, already damped.
        power: 1, the only power a Cholesky factor gives: ``L⁻¹`` is a root of the inverse, but
            not the symmetric one, and only a symmetric positive P keeps a step a descent direction.
        last: not looked at.
        rank: not looked at.

    Returns:
        ``matrix`` (n, M, M); one that is not positive definite comes back as NaN.
    """
    factor, info = torch.linalg.cholesky_ex(covariance)
    succeeded = (info == 0)[:, None, None]
    # cholesky_inverse raises where a factor is singular: it must not see one.
    identity = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    return Inverse(torch.where(succeeded, torch.cholesky_inverse(torch.where(succeeded, factor, identity)), torch.nan))
