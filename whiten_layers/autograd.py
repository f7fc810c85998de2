"""The custom autograd Functions: the identity forward, a gradient transform backward.

A whitened layer is its plain self on parameters that have passed through `TransformGradient`. The
forward pass, the gradient of the input, autocast and every further derivative are PyTorch's own;
between the plain gradient of the parameters and the parameters stands one linear map.

The map's state is no tensor that autograd saves: later passes write to it in place, and two forward
passes may precede a backward. A compiled graph, which can hold no Python object, has the map as one
opaque operation that looks it up by an integer.
"""

from typing import Any

import torch
from torch import Tensor

from .numerics import without_autocast
from .transforms.base import GradientTransform


def _transform_gradient(gradients: list[Tensor], input: Tensor, transform: GradientTransform) -> list[Tensor]:
    """Map ``[weight gradient]`` or ``[weight gradient, bias gradient]``, then observe the batch."""
    grad_weight, grad_bias = gradients[0], gradients[1] if len(gradients) > 1 else None
    with without_autocast(grad_weight.device):
        transformed = transform.transform(grad_weight, grad_bias)
        with torch.no_grad():
            transform.observe(input, grad_weight)
    return [gradient for gradient in transformed if gradient is not None]


def _observe_output(grad_output: Tensor, transform: GradientTransform) -> Tensor:
    with torch.no_grad(), without_autocast(grad_output.device):
        transform.observe_output(grad_output)
    return grad_output


@torch.library.custom_op(
    "whiten_layers::transform_gradient",
    mutates_args=(),
    schema="(Tensor[] gradients, Tensor input, int handle) -> Tensor[]",  # torch 2.6 cannot read it off list[Tensor]
)
def _transform_gradient_op(gradients: list[Tensor], input: Tensor, handle: int) -> list[Tensor]:
    transformed = _transform_gradient(gradients, input, GradientTransform.from_handle(handle))
    # The graph counts on new tensors of the gradients' strides.
    return [torch.empty_like(old).copy_(new) for old, new in zip(gradients, transformed, strict=True)]


@_transform_gradient_op.register_fake
def _(gradients: list[Tensor], input: Tensor, handle: int) -> list[Tensor]:
    return [torch.empty_like(gradient) for gradient in gradients]


@torch.library.custom_op("whiten_layers::observe_output", mutates_args=())
def _observe_output_op(grad_output: Tensor, handle: int) -> Tensor:
    # An operation may not return its argument, and one whose result nobody uses is dropped: hence a copy.
    return _observe_output(grad_output, GradientTransform.from_handle(handle)).clone()


@_observe_output_op.register_fake
def _(grad_output: Tensor, handle: int) -> Tensor:
    return torch.empty_like(grad_output)


class TransformGradient(torch.autograd.Function):
    """``(input, handle, weight) -> (weight,)`` or ``(input, handle, weight, bias) -> (weight, bias)``.

    Saves the input, which a linear layer or a zero-padded convolution saves as well.
    """

    @staticmethod
    def forward(input: Tensor, handle: int, *parameters: Tensor) -> tuple[Tensor, ...]:
        return tuple(parameter.view_as(parameter) for parameter in parameters)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.save_for_backward(inputs[0])
        _keep(ctx, inputs[1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple:  # type: ignore[override]
        (input,) = ctx.saved_tensors
        if torch.compiler.is_compiling():
            transformed = _transform_gradient_op(list(gradients), input, ctx.handle)
        else:
            transformed = _transform_gradient(list(gradients), input, ctx.transform)
        return None, None, *transformed


class ObserveOutput(torch.autograd.Function):
    """``(output, handle) -> output``, showing the gradient of the output to a transform that observes it."""

    @staticmethod
    def forward(output: Tensor, handle: int) -> Tensor:
        return output

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        # Not a view: an activation may work in place on what a layer returns.
        ctx.mark_dirty(inputs[0])
        _keep(ctx, inputs[1])

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple:  # type: ignore[override]
        if torch.compiler.is_compiling():
            return _observe_output_op(grad_output, ctx.handle), None
        return _observe_output(grad_output, ctx.transform), None


def _keep(ctx: Any, handle: int) -> None:
    """Keep the handle for a graph, which can hold no object; else the object, lest it go with its model."""
    if torch.compiler.is_compiling():
        ctx.handle = handle
    else:
        ctx.transform = GradientTransform.from_handle(handle)
