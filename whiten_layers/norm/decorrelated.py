"""Decorrelated batch normalization: the exact inverse square root of the covariance (arXiv 1804.08450).

With ``Σ + εI = U Λ Uᵀ`` the ZCA matrix is ``V = U Λ^(-½) Uᵀ``, the whitening that moves the samples least. Its gradient
is by the divided differences of λ^(-½) (`inverse.eigh`), written without a difference of eigenvalues:

    K_ij = −1 / (√λ_i √λ_j (√λ_i + √λ_j))        K_ii = −½ λ_i^(-3/2)
"""

from functools import partial

import torch
from torch import Tensor

from ..inverse.base import identity_like
from ..inverse.eigh import decompose, rounding, spectral_adjoint
from ..processes import ProcessGroup
from .base import Part, WhiteningNorm, stacked, unbiased
from .samples import BatchMoments, Whitening
from .square_root import square_root


def zca(covariance: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Compute ``A^(-½)`` of n matrices A = covariance + eps I ``(n, D, D)``.

    Returns:
        ``A^(-½)``; the square roots ``(n, D)`` of A's eigenvalues; A's eigenvectors.
    """
    values, vectors = decompose(covariance)
    # Clamp eigenvalues below the rounding error of the largest: they are noise, and the gradient has their power -3/2.
    roots = (values.clamp(min=rounding(values)) + eps).sqrt()
    return (vectors / roots.unsqueeze(-2)) @ vectors.mT, roots, vectors


def zca_adjoint(grad: Tensor, matrix: Tensor, roots: Tensor, vectors: Tensor) -> Tensor:
    """Compute the gradient of the covariance from that of `zca`'s matrix."""
    rows, columns = roots.unsqueeze(-1), roots.unsqueeze(-2)
    return spectral_adjoint(grad, vectors, -1 / (rows * columns * (rows + columns)))


def inverse_root(covariance: Tensor, *_: Tensor, eps: float) -> Tensor:
    """Compute `zca`'s matrix so that autograd can differentiate it any number of times."""
    return torch.linalg.inv(square_root(covariance + eps * identity_like(covariance)))


class _DecorrelatedBatchNorm(WhiteningNorm):
    running_covariance: Tensor | None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        group_size: int | None = 16,
        synchronize: bool = True,
        process_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__(
            num_features,
            eps,
            momentum,
            affine,
            track_running_stats,
            device,
            dtype,
            bias=bias,
            group_size=group_size,
            synchronize=synchronize,
            process_group=process_group,
        )
        shape = self.groups, self.width, self.width
        self._register_wide("running_covariance", shape, device, dtype, has=track_running_stats)
        self.reset_parameters()

    def _reset_running(self) -> None:
        assert self.running_covariance is not None
        self._fill_diagonal(self.running_covariance, 1)

    def _reset_learned(self) -> None:
        pass

    def _take_variance(self, variance: Tensor) -> None:
        assert self.running_covariance is not None
        self._fill_diagonal(self.running_covariance, variance)

    def _whitening(self, covariance: Tensor, part: Part, learns: bool) -> Whitening:
        matrix, *kept = zca(covariance, self.eps)
        return Whitening(matrix, zca_adjoint, tuple(kept), partial(inverse_root, eps=self.eps), {})

    def _running(self, moments: list[BatchMoments], whitenings: list[Whitening]) -> dict[str, Tensor]:
        return {"running_covariance": stacked([unbiased(one) for one in moments])}

    def _running_matrix(self, part: Part) -> Tensor:
        assert self.running_covariance is not None
        return zca(part.of(self.running_covariance), self.eps)[0]


class DecorrelatedBatchNorm1d(_DecorrelatedBatchNorm):
    """`nn.BatchNorm1d` that also decorrelates the channels of a group exactly, by ZCA (arXiv 1804.08450).

    Evaluation decomposes the running covariance at every forward pass, to whiten as exactly as training does. `fold`
    the layer for inference.

    Args:
        num_features, …, dtype, bias: as for `nn.BatchNorm1d`; `eps` is added to the covariance's diagonal.
        group_size: channels that are whitened together (the last group may have fewer); None for all.
        synchronize: under `torch.distributed`, compute training statistics over all processes' batches.
        process_group: the processes to synchronize; None for those of DDP's wrapper, or else all.

    Shape: ``(N, C)`` or ``(N, C, L)``.
    """

    dims = (2, 3)


class DecorrelatedBatchNorm2d(_DecorrelatedBatchNorm):
    """`nn.BatchNorm2d` that also decorrelates the channels; arguments as for `DecorrelatedBatchNorm1d`.

    Shape: ``(N, C, H, W)``.
    """

    dims = (4,)


class DecorrelatedBatchNorm3d(_DecorrelatedBatchNorm):
    """`nn.BatchNorm3d` that also decorrelates the channels; arguments as for `DecorrelatedBatchNorm1d`.

    Shape: ``(N, C, D, H, W)``.
    """

    dims = (5,)
