"""The custom autograd Functions: the identity forward, a gradient transform backward.

A whitened layer is its plain self on parameters that have passed through `TransformGradient`. The
forward pass, the gradient of the input, autocast and every further derivative are PyTorch's own;
between the plain gradient of the parameters and the parameters stands one linear map.

In backward the map is looked up by an integer. That keeps Python objects, and buffers that later
passes write to, out of what autograd saves: two forward passes may precede a backward, and a
compiled graph holds the call as one opaque operation.
"""

from typing import Any

import torch
from torch import Tensor

from .transforms.base import GradientTransform


def _transform_gradient(gradients: list[Tensor], input: Tensor, handle: int) -> list[Tensor]:
    """Map ``[weight gradient]`` or ``[weight gradient, bias gradient]``, then observe the batch."""
    transform = GradientTransform.from_handle(handle)
    grad_weight, grad_bias = gradients[0], gradients[1] if len(gradients) > 1 else None
    transformed = transform.transform(grad_weight, grad_bias)
    with torch.no_grad():
        transform.observe(input, grad_weight)
    return [gradient for gradient in transformed if gradient is not None]


def _observe_output(grad_output: Tensor, handle: int) -> Tensor:
    with torch.no_grad():
        GradientTransform.from_handle(handle).observe_output(grad_output)
    return grad_output


@torch.library.custom_op("whiten_layers::transform_gradient", mutates_args=())
def _transform_gradient_op(gradients: list[Tensor], input: Tensor, handle: int) -> list[Tensor]:
    transformed = _transform_gradient(gradients, input, handle)
    # The graph counts on new tensors of the gradients' strides.
    return [torch.empty_like(old).copy_(new) for old, new in zip(gradients, transformed, strict=True)]


@_transform_gradient_op.register_fake
def _(gradients: list[Tensor], input: Tensor, handle: int) -> list[Tensor]:
    return [torch.empty_like(gradient) for gradient in gradients]


@torch.library.custom_op("whiten_layers::observe_output", mutates_args=())
def _observe_output_op(grad_output: Tensor, handle: int) -> Tensor:
    # An operation may not return its argument, and one whose result nobody uses is dropped: hence a copy.
    return _observe_output(grad_output, handle).clone()


@_observe_output_op.register_fake
def _(grad_output: Tensor, handle: int) -> Tensor:
    return torch.empty_like(grad_output)


class TransformGradient(torch.autograd.Function):
    """``(weight, bias, input, handle) -> (weight, bias)``; saves the input, as the layer's operation does anyway."""

    @staticmethod
    def forward(weight: Tensor, bias: Tensor | None, input: Tensor, handle: int) -> tuple[Tensor, Tensor | None]:
        return weight.view_as(weight), None if bias is None else bias.view_as(bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        _, _, input, ctx.handle = inputs
        ctx.save_for_backward(input)

    @staticmethod
    def backward(ctx: Any, grad_weight: Tensor, grad_bias: Tensor) -> tuple:  # type: ignore[override]
        (input,) = ctx.saved_tensors
        # Nothing absorbs a shift where there is no bias, or a frozen one. A bias whose gradient is
        # zero takes part: autograd passes zeros for it.
        gradients = [grad_weight, grad_bias] if ctx.needs_input_grad[1] else [grad_weight]
        # Only a graph needs the operation; called directly, the function spares the dispatcher's time.
        call = _transform_gradient_op if torch.compiler.is_compiling() else _transform_gradient
        grad_weight, *rest = call(gradients, input, ctx.handle)
        return grad_weight, rest[0] if rest else None, None, None


class ObserveOutput(torch.autograd.Function):
    """``(output, handle) -> output``, showing the gradient of the output to a transform that observes it."""

    @staticmethod
    def forward(output: Tensor, handle: int) -> Tensor:
        return output

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        # Not a view: an activation may work in place on what a layer returns.
        ctx.mark_dirty(inputs[0])
        ctx.handle = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple:  # type: ignore[override]
        call = _observe_output_op if torch.compiler.is_compiling() else _observe_output
        return call(grad_output, ctx.handle), None
