"""The twin of the linear layer that GPT-2 in Hugging Face's `transformers` is made of.

`whiten` imports this file if a script has imported that layer: `transformers` is no dependency.
"""

from typing import Any

import torch
from torch import Tensor
from torch.fx import Proxy
from transformers.pytorch_utils import Conv1D

from .layers import Whitened, attach, register
from .statistics.patches import Geometry
from .transforms import GradientTransform


def _linear(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    rows = torch.addmm(bias, input.view(-1, input.size(-1)), weight)
    return rows.view(*input.shape[:-1], weight.shape[1])


class WhitenedConv1D(Whitened, Conv1D):
    """`transformers.pytorch_utils.Conv1D`, a linear layer, whose gradient is taken as if its inputs were whitened.

    Args:
        nf: number of outputs.
        nx: number of inputs.
        transform: as for `WhitenedLinear`.

    Shape: ``(..., nx) -> (..., nf)``.
    """

    def __init__(self, nf: int, nx: int, *, transform: GradientTransform | str | None = None) -> None:
        super().__init__(nf, nx)
        attach(self, transform)

    @staticmethod
    def geometry(layer: Any) -> Geometry:
        inputs, outputs = layer.weight.shape
        return Geometry(inputs, outputs, has_bias=layer.bias is not None, inputs_first=True)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, Proxy) and self.is_traced(x):
            return self.note_call(x)
        return super().forward(x) if self.is_plain() else self.transformed(_linear, x)


register(Conv1D, WhitenedConv1D)
