"""Whitening of a batch of samples by a function of their covariance, and its gradient.

A group of D channels has n samples, the columns of X. Its normalization is

    m = X 1 / n      Σ = (X − m)(X − m)ᵀ / n      V = f(Σ)      Y = γ V (X − m) + β

The kinds of normalization differ in f. With δ = ∂L/∂Y the chain rule yields

    ∂L/∂β = δ 1      ∂L/∂γ = diag(δ (X − m)ᵀ Vᵀ)      ∂L/∂V = γ δ (X − m)ᵀ      S = f'(Σ)* [∂L/∂V]
    ∂L/∂X = Vᵀ γ δ  −  Vᵀ γ δ 1 / n  +  (S + Sᵀ) (X − m) / n

The second term of ∂L/∂X is due to the mean. The third needs no such term, since the columns of X − m sum to zero.
Neither X − m nor any intermediate result is kept: backward starts from the input, m and V, as in batch normalization.

With several processes, m and Σ are those of all samples, and n, ``δ 1`` and ``δ (X − m)ᵀ`` are sums over all. The
gradients of γ and β stay each process's own, as in `nn.SyncBatchNorm`: the model's wrapper, such as DDP, averages them.

For a second derivative (a gradient penalty, a Hessian's product) backward does not use these formulas: it computes the
normalization again from the input by operations that autograd follows, and lets autograd derive the gradient. With
several processes, and in a compiled graph, there is no second derivative.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from .._torch.precision import full_precision_outside_graphs, without_autocast
from ..processes import ProcessGroup


class BatchMoments(NamedTuple):
    """Moments of G groups of D channels: number of samples, mean ``(G, D)`` and covariance ``(G, D, D)``."""

    rows: Tensor
    mean: Tensor
    covariance: Tensor


class Whitening(NamedTuple):
    """Whitening matrix ``(G, D, D)`` computed from a covariance, and what its gradient needs.

    ``adjoint(∂L/∂V, V, *kept)`` returns ∂L/∂Σ ``(G, D, D)``, or only its diagonal ``(G, D)`` where the rest is 0.
    ``function(Σ, V, *kept)`` is V again, by operations that autograd can differentiate any number of times. `learned`
    holds the new values of buffers, by name. They are written if the batch is valid.
    """

    matrix: Tensor
    adjoint: Callable[..., Tensor]
    kept: tuple[Tensor, ...]
    function: Callable[..., Tensor]
    learned: dict[str, Tensor]


def columns(input: Tensor, groups: int, mean: Tensor | None = None) -> Tensor:
    """Copy samples ``(N, G D, …)`` to ``(G, D, n)``, in float32 or wider, minus their mean ``(G, D)`` if given.

    Differentiable in the samples.
    """
    channels_first = input.transpose(0, 1)
    copy = channels_first.new_empty(channels_first.shape, dtype=torch.promote_types(input.dtype, torch.float32))
    copy = copy.copy_(channels_first).flatten(1)
    copy = copy.view(groups, len(copy) // groups, copy.shape[1])
    return copy if mean is None else copy.sub_(mean.unsqueeze(-1))


def samples(columns: Tensor, like: Tensor) -> Tensor:
    """Invert `columns`, differentiably, with the shape, dtype and memory format of `like`."""
    channels_first = columns.view(like.shape[1], like.shape[0], *like.shape[2:])
    return torch.empty_like(like).copy_(channels_first.transpose(0, 1))


def batch_moments(input: Tensor, groups: int, process_group: ProcessGroup | None = None) -> tuple[BatchMoments, Tensor]:
    """Compute moments of samples ``(N, G D, …)``, over all processes of the group, and the samples' centred columns."""
    dtype = torch.promote_types(input.dtype, torch.float32)
    by_sample = input.unsqueeze(-1).flatten(2)
    mean = by_sample.mean(2, dtype=dtype).mean(0).view(groups, -1)
    rows = mean.new_full((), by_sample.shape[0] * by_sample.shape[2])
    if process_group is not None:
        sums = torch.cat([rows.view(1), torch.where(rows > 0, rows * mean, 0).flatten()])
        dist.all_reduce(sums, group=process_group)
        rows, mean = sums[0], (sums[1:] / sums[0]).view_as(mean)
    centred = columns(input, groups, mean)
    covariance = centred @ centred.mT
    if process_group is not None:
        dist.all_reduce(covariance, group=process_group)
    return BatchMoments(rows, mean, covariance / rows), centred


def scaled(matrix: Tensor, weight: Tensor | None) -> Tensor:
    """Compute ``γ V``: the rows of matrices ``(G, D, D)`` times a weight ``(G D,)``."""
    return matrix if weight is None else matrix * weight.to(matrix.dtype).view(*matrix.shape[:2], 1)


def normalized(centred: Tensor, matrix: Tensor, weight: Tensor | None, bias: Tensor | None, like: Tensor) -> Tensor:
    """Compute ``γ V (x − m) + β`` of centred columns ``(G, D, n)``, as samples like `like`; V counts as constant."""
    matrix = scaled(matrix, weight)
    if bias is None:
        return samples(matrix @ centred, like)
    return samples(torch.baddbmm(bias.to(matrix.dtype).view(*matrix.shape[:2], 1), matrix, centred), like)


class NormalizeByBatch(torch.autograd.Function):
    """Autograd function of `normalized` for a mean and a matrix computed from the samples themselves."""

    @staticmethod
    def forward(
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        centred: Tensor,
        rows: Tensor,
        mean: Tensor,
        matrix: Tensor,
        adjoint: Callable[..., Tensor],
        function: Callable[..., Tensor],
        process_group: ProcessGroup | None,
        *kept: Tensor,
    ) -> Tensor:
        return normalized(centred, matrix, weight, bias, input)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        input, weight, bias, _, rows, mean, matrix, adjoint, function, process_group, *kept = inputs
        ctx.save_for_backward(input, weight, rows, mean, matrix, *kept)
        ctx.adjoint, ctx.function, ctx.process_group = adjoint, function, process_group
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple:  # type: ignore[override]
        again = torch.is_grad_enabled() and not torch.compiler.is_compiling() and ctx.process_group is None
        gradients = (_differentiable_gradients if again else _gradients)(ctx, grad_output)
        return *gradients, *[None] * (len(ctx.needs_input_grad) - 3)


@once_differentiable
def _gradients(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    """Compute the gradients of input, weight and bias by the formulas."""
    input, weight, rows, mean, matrix, *kept = ctx.saved_tensors
    of_input, of_weight, of_bias, *_ = ctx.needs_input_grad
    grad_input = grad_weight = grad_bias = None
    with without_autocast(input.device), full_precision_outside_graphs():
        grads = columns(grad_output, len(matrix))
        total = grads.sum(-1, keepdim=True)
        if of_bias:
            grad_bias = total.flatten().to(ctx.bias_dtype)
        if of_input or of_weight:
            centred = columns(input, len(matrix), mean)
            product = grads @ centred.mT
        if of_weight:
            grad_weight = (product * matrix).sum(-1).flatten().to(weight.dtype)
        if of_input:
            if ctx.process_group is not None:
                sums = torch.cat([total, product], -1)
                dist.all_reduce(sums, group=ctx.process_group)
                total, product = sums[..., :1], sums[..., 1:]
            back = scaled(matrix, weight).mT
            of_covariance = ctx.adjoint(scaled(product, weight), matrix, *kept)
            columns_grad = torch.baddbmm(back @ total / -rows, back, grads)
            if of_covariance.dim() == 2:
                columns_grad.addcmul_(2 / rows * of_covariance.unsqueeze(-1), centred)
            else:
                columns_grad.baddbmm_((of_covariance + of_covariance.mT) / rows, centred)
            grad_input = samples(columns_grad, input)
    return grad_input, grad_weight, grad_bias


def _differentiable_gradients(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    """Compute the same by operations that autograd follows."""
    input, weight, _, mean, matrix, *kept = ctx.saved_tensors
    of_input, of_weight, of_bias, *_ = ctx.needs_input_grad
    with without_autocast(input.device), full_precision_outside_graphs():
        grad_bias = columns(grad_output, len(mean)).sum(-1).flatten().to(ctx.bias_dtype) if of_bias else None
        moments, centred = batch_moments(input, len(mean))
        output = normalized(centred, ctx.function(moments.covariance, matrix, *kept), weight, None, input)
        wanted = [one for one, asks in ((input, of_input), (weight, of_weight)) if asks]
        found = iter(torch.autograd.grad(output, wanted, grad_output, create_graph=True) if wanted else ())
    return next(found) if of_input else None, next(found) if of_weight else None, grad_bias


def normalize_by_batch(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    centred: Tensor,
    moments: BatchMoments,
    whitening: Whitening,
    process_group: ProcessGroup | None = None,
) -> Tensor:
    """Normalize samples, also given as centred columns, by their own moments and whitening."""
    rows, mean, _ = moments
    matrix, adjoint, kept, function, _ = whitening
    constants = (rows, mean, matrix, adjoint, function, process_group, *kept)
    return NormalizeByBatch.apply(input, weight, bias, centred, *constants)
