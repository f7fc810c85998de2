"""Inverse power by eigendecomposition, as in the paper: any power, about 9 M³ operations."""

import torch
from torch import Tensor

from .base import Inverse


def decompose(symmetric: Tensor) -> tuple[Tensor, Tensor]:
    """Compute eigenvalues ``(n, M)``, ascending, and eigenvectors ``(n, M, M)``; NaN where this does not converge."""
    try:
        return torch.linalg.eigh(symmetric)
    except torch.linalg.LinAlgError:
        if len(symmetric) == 1:
            return torch.full_like(symmetric[..., 0], torch.nan), torch.full_like(symmetric, torch.nan)
        # One bad matrix fails the whole batch: find it, and keep the others.
        values, vectors = zip(*map(decompose, symmetric.split(1)), strict=True)
        return torch.cat(values), torch.cat(vectors)


def inverse_power(values: Tensor, power: float) -> Tensor:
    """Compute ``values^(-power)`` of ascending eigenvalues ``(n, M)``; NaN for those that are ≤ 0 to rounding."""
    rounding = torch.finfo(values.dtype).eps * values.shape[-1] * values[..., -1:]
    return torch.where(values > rounding, values, torch.nan).pow(-power)


def eigh(covariance: Tensor, power: float) -> Inverse:
    """Compute ``covariance^(-power)``, any power, for n symmetric positive definite matrices ``(n, M, M)``.

    Returns:
        ``matrix`` (n, M, M); NaN for a matrix that is singular to rounding, or whose decomposition does not converge.
    """
    values, vectors = decompose(covariance)
    return Inverse((vectors * inverse_power(values, power).unsqueeze(-2)) @ vectors.mT)
