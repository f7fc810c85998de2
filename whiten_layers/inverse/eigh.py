"""The inverse power by an eigendecomposition, as in the paper: any power, about 9 M³."""

import torch
from torch import Tensor


def eigh(covariance: Tensor, power: float) -> Tensor:
    """Return ``covariance^(-power)`` for a batch of symmetric positive definite matrices.

    Args:
        covariance: ``(..., M, M)``, already damped.
        power: any.

    Returns:
        ``(..., M, M)``; a matrix that is singular to rounding, or whose decomposition does not
        converge, comes back as NaN.
    """
    try:
        values, vectors = torch.linalg.eigh(covariance)
    except torch.linalg.LinAlgError:
        if covariance.dim() == 2:
            return torch.full_like(covariance, torch.nan)
        # One matrix of a batch fails the whole call: find it, keep the others.
        return torch.stack([eigh(matrix, power) for matrix in covariance.unbind()])
    rounding = torch.finfo(values.dtype).eps * values.shape[-1] * values[..., -1:]
    values = torch.where(values > rounding, values, torch.nan)
    return (vectors * values.pow(-power).unsqueeze(-2)) @ vectors.mT
