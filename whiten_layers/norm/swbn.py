"""Stochastic whitening batch normalization: a whitening matrix learned by one step per batch (arXiv 2106.04413).

Channels are standardised, ``x_s = (x − m) / s`` with ``s² = diag Σ + ε``, and multiplied by a matrix W. Before W is
used, it takes a step down the gradient (for "kl" the relative gradient, times WᵀW) of a criterion of the correlation
R = s⁻¹ (Σ + εI) s⁻¹:

    "kl"         ½ (tr W R Wᵀ − ln det W R Wᵀ)        W ← W − α (W R Wᵀ − I) W
    "frobenius"  ½ ‖I − W R Wᵀ‖                       W ← W − α (W R Wᵀ − I) W R / ‖I − W R Wᵀ‖

Then W is made symmetric, W ← ½ (W + Wᵀ). Backpropagation treats W as constant. So the normalization is
``V (x − m)`` with V = W s⁻¹, and only the diagonal of ∂L/∂Σ is not zero: ``∂L/∂Σ_jj = −½ s_j⁻² Σ_k V_kj ∂L/∂V_kj``.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..options import check, is_real
from ..processes import ProcessGroup
from .base import Part, WhiteningNorm, unbiased
from .samples import BatchMoments, Whitening

CRITERIA = ("kl", "frobenius")


def whitening_step(matrix: Tensor, correlation: Tensor, step_size: Tensor, criterion: str) -> Tensor:
    """Take one step of n whitening matrices ``(n, D, D)`` towards ``W R Wᵀ = I``."""
    image = matrix @ correlation
    residual = image @ matrix.mT
    residual.diagonal(dim1=-2, dim2=-1).sub_(1)
    if criterion == "kl":
        direction = residual @ matrix
    else:
        norm = torch.linalg.matrix_norm(residual, keepdim=True)
        direction = residual @ image / torch.where(norm > 0, norm, 1)  # avoids 0 / 0 where already white
    moved = matrix - step_size * direction
    return (moved + moved.mT) / 2


def standardised_again(covariance: Tensor, matrix: Tensor, variance: Tensor, eps: float) -> Tensor:
    """Compute V from n covariances ``(n, D, D)``, with the W of a V and of the variance that it was computed from."""
    scale = (covariance.diagonal(dim1=-2, dim2=-1) + eps).rsqrt()
    return matrix * variance.sqrt().unsqueeze(-2) * scale.unsqueeze(-2)


def standardised_adjoint(grad: Tensor, matrix: Tensor, variance: Tensor) -> Tensor:
    """Compute the diagonal of the covariance's gradient from the gradient of V."""
    return (grad * matrix).sum(-2) / variance / -2


class _StochasticWhiteningBatchNorm(WhiteningNorm):
    running_var: Tensor | None
    whitening: Tensor
    step_size: Tensor

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
        criterion: str = "kl",
        step_size: float = 1e-5,
        group_size: int | None = None,
        synchronize: bool = True,
        process_group: ProcessGroup | None = None,
    ) -> None:
        check("criterion", criterion, criterion in CRITERIA, f"one of {', '.join(CRITERIA)}")
        check("step_size", step_size, is_real(step_size) and step_size >= 0, "a number of at least 0")
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
        self.criterion, self.initial_step_size = criterion, step_size
        self._register_wide("running_var", (num_features,), device, dtype, has=track_running_stats)
        self._register_wide("whitening", (self.groups, self.width, self.width), device, dtype)
        self._register_wide("step_size", (), device, dtype)
        self.reset_parameters()

    def _reset_running(self) -> None:
        assert self.running_var is not None
        self.running_var.fill_(1)

    def _reset_learned(self) -> None:
        self._fill_diagonal(self.whitening, 1)
        self.step_size.fill_(self.initial_step_size)

    def _take_variance(self, variance: Tensor) -> None:
        assert self.running_var is not None
        self.running_var.copy_(variance)

    def _whitening(self, covariance: Tensor, part: Part, learns: bool) -> Whitening:
        matrix, learned = part.of(self.whitening), {}
        variance = covariance.diagonal(dim1=-2, dim2=-1) + self.eps
        scale = variance.rsqrt()
        if learns:
            correlation = scale.unsqueeze(-1) * covariance * scale.unsqueeze(-2)
            # 1, as for Σ + εI: with Σ's own diagonal, W's row of a dead channel (variance 0) would grow for ever.
            correlation.diagonal(dim1=-2, dim2=-1).fill_(1)
            matrix = whitening_step(matrix, correlation.to(matrix.dtype), self.step_size, self.criterion)
            learned = {"whitening": matrix}
        whole = matrix.to(scale.dtype) * scale.unsqueeze(-2)
        function = partial(standardised_again, eps=self.eps)
        return Whitening(whole, standardised_adjoint, (variance,), function, learned)

    def _running(self, moments: list[BatchMoments], whitenings: list[Whitening]) -> dict[str, Tensor]:
        diagonals = [unbiased(one).diagonal(dim1=-2, dim2=-1).flatten() for one in moments]
        return {"running_var": torch.cat(diagonals)}

    def _running_matrix(self, part: Part) -> Tensor:
        assert self.running_var is not None
        scale = (self.running_var[part.channels].view(part.groups, 1, part.width) + self.eps).rsqrt()
        return part.of(self.whitening) * scale

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, criterion={self.criterion!r}, step_size={self.initial_step_size:g}"


class StochasticWhiteningBatchNorm1d(_StochasticWhiteningBatchNorm):
    """`nn.BatchNorm1d` that also decorrelates the channels, by a matrix learned step by step (arXiv 2106.04413).

    The matrix starts from the identity and takes one step of size `step_size` at every training batch. At the default,
    the paper's, whitening takes about 10⁵ batches. The matrix is a buffer, not a parameter, so the optimizer does not
    update it. `follow_learning_rate` makes the step size decay with a learning rate.

    Args:
        num_features, …, dtype, bias: as for `nn.BatchNorm1d`. (The paper's momentum is 0.05.)
        criterion: criterion that the steps minimise, "kl" or "frobenius".
        step_size: initial α, at least 0. The buffer ``step_size`` holds the current α and may be overwritten.
        group_size: channels that are whitened together (the last group may have fewer); None for all, as in the paper.
        synchronize: under `torch.distributed`, compute training statistics over all processes' batches.
        process_group: the processes to synchronize; None for those of DDP's wrapper, or else all.

    Shape: ``(N, C)`` or ``(N, C, L)``.
    """

    dims = (2, 3)


class StochasticWhiteningBatchNorm2d(_StochasticWhiteningBatchNorm):
    """`nn.BatchNorm2d` that also decorrelates the channels; arguments as for `StochasticWhiteningBatchNorm1d`.

    Shape: ``(N, C, H, W)``.
    """

    dims = (4,)


class StochasticWhiteningBatchNorm3d(_StochasticWhiteningBatchNorm):
    """`nn.BatchNorm3d` that also decorrelates the channels; arguments as for `StochasticWhiteningBatchNorm1d`.

    Shape: ``(N, C, D, H, W)``.
    """

    dims = (5,)


def follow_learning_rate(model: nn.Module, optimizer: Optimizer) -> Any:
    """Make the step sizes of a model's stochastic whitening layers decay with an optimizer's learning rate.

    Now and after every optimizer step, each layer's step size is set to its initial one times the learning rate over
    the highest one. The highest is the parameter group's ``max_lr`` or ``initial_lr``, which schedulers set, or else
    the learning rate at this call. The group is the one that holds the layer's weight, or else the first.

    Returns:
        A handle whose ``remove()`` stops this.
    """
    layers = [module for module in model.modules() if isinstance(module, _StochasticWhiteningBatchNorm)]
    places = {id(p): index for index, group in enumerate(optimizer.param_groups) for p in group["params"]}
    groups = [places.get(id(layer.weight), 0) for layer in layers]
    present = [float(group["lr"]) for group in optimizer.param_groups]

    def follow(*_: Any) -> None:
        for layer, index in zip(layers, groups, strict=True):
            group = optimizer.param_groups[index]
            highest = float(group.get("max_lr", group.get("initial_lr", present[index])))
            layer.step_size.fill_(layer.initial_step_size * float(group["lr"]) / highest if highest > 0 else 0.0)

    follow()
    return optimizer.register_step_post_hook(follow)
