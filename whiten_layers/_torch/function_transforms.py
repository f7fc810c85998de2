"""Questions about active function transforms (`torch.func`, forward mode, `torch.vmap`), and a way past them.

A function that is transformed sees stand-ins for tensors, and may not write to a tensor from outside. The statistics
of a training run, and all that is computed from them, need the real ones.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

# Aliases, not functions around them: every step of every layer asks. Where one of the last two has gone from PyTorch,
# a clear error message is lost and nothing else.
are_active: Callable[[], bool] = torch._C._are_functorch_transforms_active
"""Tell whether a transform of `torch.func` is running."""
is_mapped: Callable[[Tensor], bool] = getattr(torch._C._functorch, "is_batchedtensor", lambda tensor: False)
"""Tell whether `torch.vmap` maps over a tensor."""
is_mapped_by_autograd: Callable[[Tensor], bool] = getattr(
    torch._C._functorch, "is_legacy_batchedtensor", lambda tensor: False
)
"""Tell whether the older vmap behind ``is_grads_batched=True`` and ``vectorize=True`` maps over a tensor."""


def sum_over_samples(gradient: Tensor, dims: int) -> Tensor:
    """Sum a gradient over the dimensions in front of its own `dims`.

    On plain tensors `torch.vmap` over samples leaves one gradient per sample, but the samples are one batch.
    """
    return gradient.sum_to_size(gradient.shape[-dims:])


def nodes_of(tensor: Tensor) -> list[Any]:
    """List the nodes of the graph that computed a tensor, one for each function transform that follows it."""
    nodes = [tensor.grad_fn]
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
        nodes.append(tensor.grad_fn)
    return [node for node in nodes if node is not None]


def is_forward_mode() -> bool:
    """Tell whether derivatives are being computed in forward mode (`torch.autograd.forward_ad`)."""
    return forward_ad._current_level >= 0


def call_on_plain_tensors(call: Callable[..., None], *tensors: Tensor) -> None:
    """Call a function on the plain tensors under all function transforms, without recording gradients.

    A tensor that `torch.vmap` maps over comes with the mapped dimension first.
    """
    if are_active():
        _CallOnPlainTensors.apply(call, *tensors)
    elif not torch.is_grad_enabled():  # as in most passes; to enter `no_grad` costs as much as an operation
        call(*tensors)
    else:
        with torch.no_grad():
            call(*tensors)


class _CallOnPlainTensors(torch.autograd.Function):
    """Passes through one function transform after the other: each hands a Function on, the last one to PyTorch."""

    @staticmethod
    def forward(call: Callable[..., None], *tensors: Tensor) -> Tensor:
        call_on_plain_tensors(call, *tensors)
        return torch.empty(0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, call: Callable[..., None], *tensors: Tensor) -> tuple:  # type: ignore[override]
        pairs = zip(tensors, in_dims[1:], strict=True)
        first = [tensor if dim is None else tensor.movedim(dim, 0) for tensor, dim in pairs]
        return _CallOnPlainTensors.apply(call, *first), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> None:  # type: ignore[override]
        return None
