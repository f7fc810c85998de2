"""PyTorch's attention with the two projections in it replaced, and the class of the second one."""

import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear as OutProjection

__all__ = ["OutProjection", "attend", "project_apart"]


def _project_in(query: Tensor, key: Tensor, value: Tensor, project: Callable[..., Any], bias: None) -> Any:
    return project(query, key, value)


def _project_out(input: Tensor, project: Callable[[Tensor], Tensor], bias: None) -> Tensor:
    return project(input)


def _has_torch_function(tensors: Any) -> bool:
    """Tell a mode (a default device) or a subclass of tensors nothing of the whole: it sees the operations within."""
    return False


def _check_padding(mask: Tensor, length: int, batch_size: int) -> None:
    """Check a padding mask as PyTorch does, but so that it can be compiled."""
    for axis, expected in enumerate((batch_size, length)):
        if mask.shape[axis] != expected:
            raise AssertionError(f"Expected key_padded_mask.shape[{axis}] to be {expected}, but got {mask.shape[axis]}")


def _made() -> Any:
    """Make F.multi_head_attention_forward under other meanings of some names that it uses.

    The new one takes a function where a projection's weight is given, and None for the bias. What it does between the
    projections is PyTorch's own, or what a script has put in its place by now.
    """
    original = F.multi_head_attention_forward
    names = {"_in_projection_packed": _project_in, "linear": _project_out}
    names |= {"has_torch_function": _has_torch_function, "_check_key_padding_mask": _check_padding}
    made: Any = types.FunctionType(original.__code__, {**vars(F), **names}, "attend", original.__defaults__)
    made.__kwdefaults__ = original.__kwdefaults__
    return made


_attend = _made()


def attend(*arguments: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
    """Run `F.multi_head_attention_forward` with functions as ``in_proj_weight`` and ``out_proj_weight``."""
    function = _attend if torch.compiler.is_compiling() else _made()  # a graph needs a function that stays
    result: tuple[Tensor, Tensor | None] = function(*arguments, **options)
    return result


# The projections (query, key, value, weight, bias) -> three tensors: products of their own where the inputs differ.
project_apart: Callable[..., tuple[Tensor, Tensor, Tensor]] = vars(F)["_in_projection_packed"]
