"""PyTorch's attention with the two projections in it replaced, and the class of the second one."""

import types
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear as OutProjection

__all__ = ["OutProjection", "attend", "project_apart"]


def _project_in(query: Tensor, key: Tensor, value: Tensor, project: Callable[..., Any], bias: None) -> Any:
    return project(query, key, value)


def _project_out(input: Tensor, project: Callable[[Tensor], Tensor], bias: None) -> Tensor:
    return project(input)


# F.multi_head_attention_forward under other meanings of two names that it uses: it takes a function where its callers
# give a projection's weight, and None for the bias. What it does between the projections is PyTorch's own.
attend: Any = types.FunctionType(
    F.multi_head_attention_forward.__code__,
    {**vars(F), "_in_projection_packed": _project_in, "linear": _project_out},
    "attend",
    F.multi_head_attention_forward.__defaults__,
)
attend.__kwdefaults__ = F.multi_head_attention_forward.__kwdefaults__

# The projections (query, key, value, weight, bias) -> three tensors: products of their own where the inputs differ.
project_apart: Callable[..., tuple[Tensor, Tensor, Tensor]] = vars(F)["_in_projection_packed"]
