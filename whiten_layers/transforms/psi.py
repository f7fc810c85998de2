"""Optimisation on the manifold of positively scale-invariant weights (arXiv 2101.02916).

In front of a normalization per channel, a row w of the weight and αw, α > 0, are one function: the
network depends on the row's direction alone, yet plain SGD depends on its scale. Differentiating
``L(αw) = L(w)`` by w gives ``∇L(αw) = ∇L(w) / α``. On the manifold of the classes {αw} with the metric
``⟨U, V⟩ / ‖w‖²`` the gradient of a row is

    ĝ(w) = ‖w‖² ∇L(w)            so that ĝ(αw) = α² ‖w‖² ∇L(w) / α = α ĝ(w)

and a step from αw, ``αw − η ĝ(αw) = α (w − η ĝ(w))``, ends in the class in which the step from w does: the
function learned does not depend on the rows' scale, nor does it if the gradient passes a linear map of the
input side before, such as whitening: ``ĝ(w) = ‖w‖² ∇L(w) P``. Of whitening the output's gradients that is not so:
their statistics scale with ``1/α`` themselves.
"""

from typing import Self

import torch
from torch import Tensor

from ..statistics.patches import Geometry
from .base import GradientTransform


class PSIScaling(GradientTransform):
    """Multiply each output row's weight gradient by that row's squared norm. There are no options, and no statistics.

    For layers whose output goes to nothing but a normalization per channel, such as `nn.BatchNorm2d`: elsewhere
    a row's scale is part of the function. There the bias has no effect, and its gradient is left alone.
    A row that is zero stays zero.

    The independence of the rows' scale is exact for plain SGD and a normalization whose eps goes to 0; with
    the usual eps it holds up to that. Momentum and weight decay are not the paper's. They too are linear in a row and
    its scaled gradients, so a row α times as long takes α times each step; but decay, which shrinks the rows, no
    longer makes the effective step grow, and so does next to nothing to these layers. An optimizer that divides by the
    gradient's own size, as Adam does, undoes the scaling.

    The norm is that of the weight in the forward pass. Autograd saves it for backward, so that running one graph
    backward again after an optimizer's step is an error.
    """

    geometry: Geometry
    reads_weight = True

    def bind(self, geometry: Geometry, *, device: torch.device, dtype: torch.dtype) -> Self:
        self.geometry = geometry
        self.bind_counters(device)
        return self

    def reset_state(self) -> None:
        self.reset_counters()

    def transform(
        self, grad_weight: Tensor, grad_bias: Tensor | None, weight: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        assert weight is not None  # it reads the weight
        dtype = torch.promote_types(grad_weight.dtype, torch.float32)
        squares = self.geometry.matrix(weight).to(dtype).square().sum((-2, -1), keepdim=True)
        matrix = self.geometry.matrix(grad_weight).to(dtype) * squares
        return self.geometry.weight(matrix, grad_weight).to(grad_weight.dtype), grad_bias

    def observe(self, input: Tensor, grad_weight: Tensor) -> None:
        self.schedule.begin_batch(self)
