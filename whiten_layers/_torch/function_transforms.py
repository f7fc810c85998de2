"""Plain tensors inside the function transforms of `torch.func`.

A function that is transformed sees stand-ins for tensors, and may not write to a tensor from outside. What
follows a training run, statistics and what is computed from them, is to see the real ones.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def beneath(call: Callable[..., None], *tensors: Tensor) -> None:
    """Call with plain tensors, beneath all function transforms; where `torch.vmap` maps, with its dimension first."""
    if torch._C._are_functorch_transforms_active():
        _Beneath.apply(call, *tensors)
    else:
        with torch.no_grad():
            call(*tensors)


class _Beneath(torch.autograd.Function):
    """Function transforms hand a Function on to the next one beneath, and the last to PyTorch."""

    @staticmethod
    def forward(call: Callable[..., None], *tensors: Tensor) -> Tensor:
        beneath(call, *tensors)
        return torch.empty(0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, call: Callable[..., None], *tensors: Tensor) -> tuple:  # type: ignore[override]
        pairs = zip(tensors, in_dims[1:], strict=True)
        first = [tensor if dim is None else tensor.movedim(dim, 0) for tensor, dim in pairs]
        return _Beneath.apply(call, *first), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> None:  # type: ignore[override]
        return None
