"""Iterative normalization: the covariance's inverse square root by a few Newton steps (arXiv 1904.03441).

With ``Σ_N = Σ / tr Σ``, whose eigenvalues are at most 1, ``P ← (3P − P³ Σ_N) / 2`` from ``P = I`` converges to
``Σ_N^(-½)``. The whitening matrix is ``V = P / √tr Σ``. After few steps, directions of small variance are only partly
whitened. The steps are taken in their coupled form (`inverse.newton_steps`): the paper's amplify rounding errors, so
that after some ten steps they are larger than what is gained.
"""

from functools import partial

import torch
from torch import Tensor

from ..inverse.base import identity_like
from ..inverse.newton_steps import newton_root, newton_root_adjoint
from ..options import check, is_count
from ..processes import ProcessGroup
from .base import Part, WhiteningNorm, stacked
from .samples import BatchMoments, Whitening


def inverse_root(covariance: Tensor, *_: Tensor, eps: float, iterations: int) -> Tensor:
    """Compute the whitening matrix so that autograd can differentiate it any number of times."""
    return newton_root(covariance + eps * identity_like(covariance), iterations, power=-0.5)


class _IterNorm(WhiteningNorm):
    running_whitening: Tensor | None

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
        group_size: int | None = 64,
        iterations: int = 5,
        synchronize: bool = True,
        process_group: ProcessGroup | None = None,
    ) -> None:
        check("iterations", iterations, is_count(iterations), "an integer of at least 1")
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
        self._register_wide("running_whitening", shape, device, dtype, has=track_running_stats)
        self.iterations = iterations
        self.reset_parameters()

    def _reset_running(self) -> None:
        assert self.running_whitening is not None
        self._fill_diagonal(self.running_whitening, 1)

    def _reset_learned(self) -> None:
        pass

    def _take_variance(self, variance: Tensor) -> None:
        assert self.running_whitening is not None
        self._fill_diagonal(self.running_whitening, (variance + self.eps).rsqrt())

    def _whitening(self, covariance: Tensor, part: Part, learns: bool) -> Whitening:
        damped = covariance + self.eps * identity_like(covariance)
        root = newton_root(damped, self.iterations, power=-0.5)
        adjoint = partial(newton_root_adjoint, iterations=self.iterations, power=-0.5)
        function = partial(inverse_root, eps=self.eps, iterations=self.iterations)
        return Whitening(root, adjoint, (damped,), function, {})

    def _running(self, moments: list[BatchMoments], whitenings: list[Whitening]) -> dict[str, Tensor]:
        return {"running_whitening": stacked([whitening.matrix for whitening in whitenings])}

    def _running_matrix(self, part: Part) -> Tensor:
        assert self.running_whitening is not None
        return part.of(self.running_whitening)


class IterNorm1d(_IterNorm):
    """`nn.BatchNorm1d` that also decorrelates the channels of a group by a few Newton steps (arXiv 1904.03441).

    Args:
        num_features, …, dtype, bias: as for `nn.BatchNorm1d`; `eps` is added to the covariance's diagonal.
        group_size: channels that are whitened together (the last group may have fewer); None for all.
        iterations: Newton steps, at least 1.
        synchronize: under `torch.distributed`, compute training statistics over all processes' batches.
        process_group: the processes to synchronize; None for those of DDP's wrapper, or else all.

    Shape: ``(N, C)`` or ``(N, C, L)``.
    """

    dims = (2, 3)


class IterNorm2d(_IterNorm):
    """`nn.BatchNorm2d` that also decorrelates the channels; arguments as for `IterNorm1d`.

    Shape: ``(N, C, H, W)``.
    """

    dims = (4,)


class IterNorm3d(_IterNorm):
    """`nn.BatchNorm3d` that also decorrelates the channels; arguments as for `IterNorm1d`.

    Shape: ``(N, C, D, H, W)``.
    """

    dims = (5,)
