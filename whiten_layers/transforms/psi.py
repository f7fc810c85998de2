"""Optimisation on the manifold of positively scale-invariant weights (arXiv 2101.02916).

In front of a per-channel normalization, a row w of the weight and αw, α > 0, define the same function: the network
depends only on the row's direction. Yet plain SGD depends on its scale. Differentiating ``L(αw) = L(w)`` by w yields
``∇L(αw) = ∇L(w) / α``. On the manifold of the classes {αw} with the metric ``⟨U, V⟩ / ‖w‖²`` the gradient of a row is

    ĝ(w) = ‖w‖² ∇L(w)            so that ĝ(αw) = α² ‖w‖² ∇L(w) / α = α ĝ(w)

A step from αw, ``αw − η ĝ(αw) = α (w − η ĝ(w))``, ends in the same class as the step from w: the learned function
does not depend on the rows' scale. This still holds if a linear map on the input side, such as whitening, is applied
to the gradient first: ``ĝ(w) = ‖w‖² ∇L(w) P``. It does not hold for whitening of the output's gradients, whose
statistics scale with ``1/α`` themselves.
"""

from typing import Self

import torch
from torch import Tensor

from ..statistics.patches import Geometry
from .base import GradientTransform, Samples


class PSIScaling(GradientTransform):
    """Transform that multiplies each output row's weight gradient by the row's squared norm. No options or statistics.

    For layers whose output goes only to a per-channel normalization, such as `nn.BatchNorm2d`: elsewhere a row's scale
    is part of the function. In such layers the bias has no effect, and its gradient stays as it is. A row that is zero
    stays zero.

    The independence of the rows' scale is exact for plain SGD and a normalization whose eps goes to 0. With the usual
    eps it is approximate. Momentum and weight decay are not in the paper. They too are linear in a row and its scaled
    gradients, so a row α times as long takes α times each step. But weight decay, which shrinks the rows, no longer
    increases the effective step, and so has almost no effect on these layers. An optimizer that divides by the
    gradient's own size, as Adam does, undoes the scaling.

    The norm is that of the weight in the forward pass. Autograd saves the weight for backward, so running a graph
    backward again after an optimizer step is an error.
    """

    geometry: Geometry
    reads_weight = True
    maps_bias = False

    def bind(self, geometry: Geometry, *, device: torch.device, dtype: torch.dtype) -> Self:
        self.geometry = geometry
        self.bind_counters(device)
        return self

    def reset_state(self) -> None:
        self.reset_counters()

    def transform(
        self, grad_weight: Tensor, grad_bias: Tensor | None, weight: Tensor | None, samples: Samples | None = None
    ) -> tuple[Tensor, Tensor | None]:
        assert weight is not None  # since `reads_weight` is set
        dtype = torch.promote_types(grad_weight.dtype, torch.float32)
        squares = self.geometry.matrix(weight).to(dtype).square().sum((-2, -1), keepdim=True)
        matrix = self.geometry.matrix(grad_weight).to(dtype) * squares
        return self.geometry.weight(matrix, grad_weight).to(grad_weight.dtype), grad_bias

    def observe(self, input: Tensor, grad_weight: Tensor) -> None:
        self.schedule.begin_batch(self)
