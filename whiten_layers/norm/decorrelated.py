"""Decorrelated batch normalization: the exact root of the covariance's inverse (arXiv 1804.08450).

With ``Σ + εI = U Λ Uᵀ`` the ZCA matrix is ``V = U Λ^(-½) Uᵀ``, the whitening that moves the samples least. Its
gradient by divided differences of λ^(-½) (Daleckii & Krein 1965),

    ∂L/∂Σ = U (K ∘ (Uᵀ sym(∂L/∂V) U)) Uᵀ        K_ij = −1 / (√λ_i √λ_j (√λ_i + √λ_j))

has no difference of eigenvalues in a denominator, as the derivative of an eigenvector has: it is as good where they
are equal, where K_ii = −½ λ_i^(-3/2).
"""

import torch
from torch import Tensor

from ..inverse.eigh import decompose
from ..processes import ProcessGroup
from .base import Part, WhiteningNorm, stacked, unbiased
from .samples import BatchMoments, Whitening


def zca(covariance: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """``(covariance + eps I)^(-½)`` of n matrices ``(n, D, D)``; its eigenvalues' roots ``(n, D)`` and vectors."""
    values, vectors = decompose(covariance)
    # What is rounding of the largest is no number, and the gradient has its power of -3/2: taken for that rounding.
    rounding = torch.finfo(values.dtype).eps * values.shape[-1] * values[:, -1:]
    roots = (values.clamp(min=rounding) + eps).sqrt()
    return (vectors / roots.unsqueeze(-2)) @ vectors.mT, roots, vectors


def zca_adjoint(grad: Tensor, matrix: Tensor, roots: Tensor, vectors: Tensor) -> Tensor:
    """The gradient of the covariance, from that of `zca`'s matrix."""
    rows, columns = roots.unsqueeze(-1), roots.unsqueeze(-2)
    differences = -1 / (rows * columns * (rows + columns))
    turned = vectors.mT @ ((grad + grad.mT) / 2) @ vectors
    return vectors @ (differences * turned) @ vectors.mT


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
        return Whitening(matrix, zca_adjoint, tuple(kept), {})

    def _running(self, moments: list[BatchMoments], whitenings: list[Whitening]) -> dict[str, Tensor]:
        return {"running_covariance": stacked([unbiased(one) for one in moments])}

    def _running_matrix(self, part: Part) -> Tensor:
        assert self.running_covariance is not None
        return zca(part.of(self.running_covariance), self.eps)[0]


class DecorrelatedBatchNorm1d(_DecorrelatedBatchNorm):
    """`nn.BatchNorm1d` that also decorrelates the channels of a group, exactly: ZCA (arXiv 1804.08450).

    Evaluation decomposes the running covariance at every forward pass, so that it is whitened as a batch is: `fold`
    it for inference.

    Args:
        num_features, …, dtype, bias: as for `nn.BatchNorm1d`; `eps` is added to the covariance's diagonal.
        group_size: channels that are whitened together, the last group may have fewer; None for all.
        synchronize: take the statistics of all processes' batches together where `torch.distributed` runs.
        process_group: the processes that are meant; None for all.

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
