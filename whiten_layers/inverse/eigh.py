"""The inverse power by an eigendecomposition, as in the paper: any power, about 9 M³."""

import torch
from torch import Tensor

from .base import Inverse


def decompose(symmetric: Tensor) -> tuple[Tensor, Tensor]:
    """Compute eigenvalues ``(n, M)``, ascending, and eigenvectors ``(n, M, M)``; NaN where that does not converge."""
    try:
        return torch.linalg.eigh(symmetric)
    except torch.linalg.LinAlgError:
        if len(symmetric) == 1:
            return torch.full_like(symmetric[..., 0], torch.nan), torch.full_like(symmetric, torch.nan)
        # One matrix of a batch fails the whole call: find it, keep the others.
        values, vectors = zip(*map(decompose, symmetric.split(1)), strict=True)
        return torch.cat(values), torch.cat(vectors)


def inverse_power(values: Tensor, power: float) -> Tensor:
    """Compute ``values^(-power)``, ascending eigenvalues ``(n, M)``; NaN for those that are 0 to rounding, or less."""
    rounding = torch.finfo(values.dtype).eps * values.shape[-1] * values[..., -1:]
    return torch.where(values > rounding, values, torch.nan).pow(-power)


def eigh(covariance: Tensor, power: float) -> Inverse:
    """Compute ``covariance^(-power)``, any power, for n symmetric positive definite matrices ``(n, M, M)``.

    Returns:
        ``matrix`` (n, M, M); NaN for one that is singular to rounding, or whose decomposition does not converge.
    """
    values, vectors = decompose(covariance)
    return Inverse((vectors * inverse_power(values, power).unsqueeze(-2)) @ vectors.mT)
