"""Scaling of a gradient by its own deviation, in the eigenbases of a layer's inputs and of its outputs' gradients.

Adam divides each entry of a gradient by its deviation, as if entries were not correlated. They are least so in the
eigenbasis of their covariance, which the layer's statistics give nearly: with ``G = Σ δ xᵀ``, for δ and x that do not
depend on each other, the covariance of G is that of x times that of δ (K-FAC, arXiv 1503.05671), and its eigenvectors
are products of theirs. So, with eigenvectors ``U`` of E[x xᵀ] and ``Q`` of E[δ δᵀ],

    Ĝ = Q (R / √V) Uᵀ        R = Qᵀ G U        V = the running mean of R², entry by entry

EKFAC (arXiv 1806.03884) takes these bases, and a V of single rows' gradients; SOAP (arXiv 2409.11321) takes a V as
here, and bases that it computes from G.

This is no map that stays between two refreshes: V moves at each batch. Micro-batches, and processes, would each divide
by a V of their own. So it is applied when an optimizer steps, to the whole gradient, and not in backward.
"""

import math
import warnings
from typing import Any, Literal, Self

import torch
from torch import Tensor

from ..options import check, is_count, is_real
from ..refresh.schedule import LONG, Interval, interval_at, is_due
from ..state import COUNT
from ..statistics.eigenbasis import Eigenbasis
from ..statistics.patches import Geometry
from .base import Samples
from .covariances import CovarianceTransform, Side

STEPS = 5  # from one that is observed to the next, at first, with the interval "auto"
LONGEST = 3.0  # length of a gradient, relative to its usual one, beyond which it is shortened to this
PATIENCE = 100  # batches without a step of an optimizer, before a warning


class EigenbasisScaling(CovarianceTransform):
    """Transform that divides a weight's gradient by its running deviation, in the eigenbases of the layer's statistics.

    It is applied when a `torch.optim` optimizer steps, just before: ``weight.grad`` is the plain gradient until then,
    and again afterwards. The bias keeps its plain gradient.

    The entries of the result are of size 1, whatever the gradient's are, as those of Adam's steps. So it is for AdamW
    at AdamW's learning rates. Plain SGD would need a rate of that kind, at which biases and norms hardly move.

    A gradient of more than three times its usual length (the root mean square, with V's weights) is shortened to that,
    so that a bad batch does not hold V up for long.

    Between two steps that are observed the layer is the plain one, in forward and backward.

    Args:
        damping: least V, as a multiple of V's mean; at least 0.
        variance_decay: factor on the weight of past steps in V, in [0, 1).
        decay: factor on the weight of past rows at each batch that is observed, in [0, 1).
        interval: steps of the optimizer between two that are observed, after which the bases are renewed; at first
            after 1, 2, 4, 8, … steps. "auto" is 5, then 10 from step 500 on, and 20 from step 1,000 on.
        features, max_rows, block_size: as for `FeatureWhitening`.

    Raises:
        ValueError: an option has a value that is not allowed; the message names it, its value and the choices.

    State, after `bind`: `Eigenbasis` called ``inputs``, or two called ``channels`` and ``taps``, and one called
    ``outputs``; buffers ``variance`` (groups, S, C·taps), V in the rotated coordinates, and ``num_steps`` ().

    A layer whose weight is no parameter of its own when the optimizer steps (parametrized, or flattened by FSDP1), or
    that no `torch.optim` optimizer trains, keeps its plain gradient, and warns after 100 batches.
    """

    scales_at_step = True
    maps_bias = False
    newer_state = ("variance", "num_steps")
    inputs: Eigenbasis
    channels: Eigenbasis
    taps: Eigenbasis
    outputs: Eigenbasis
    variance: Tensor
    num_steps: Tensor

    def __init__(
        self,
        *,
        damping: float = 1e-4,
        variance_decay: float = 0.9,
        decay: float = 0.8,
        interval: Interval = "auto",
        features: str = "auto",
        max_rows: int | None = 512,
        block_size: int | Literal["auto"] | None = "auto",
    ) -> None:
        super().__init__(
            observes_input=True,
            observes_output=True,
            features=features,
            decay=decay,
            center=False,
            update_interval=1,
            statistics_interval=1,
            max_rows=max_rows,
            block_size=block_size,
        )
        check("damping", damping, is_real(damping) and 0 <= damping < math.inf, "a number of at least 0")
        is_decay = is_real(variance_decay) and 0 <= variance_decay < 1
        check("variance_decay", variance_decay, is_decay, "a number in [0, 1)")
        check("interval", interval, interval == "auto" or is_count(interval), "an integer of at least 1, or 'auto'")
        self.damping, self.variance_decay, self.interval = damping, variance_decay, interval
        self._steps = 0  # what `num_steps` is, without asking a device

    def make_factor(self, side: Side, channels: int, taps: int, **options: Any) -> Eigenbasis:
        del options["center"]
        return Eigenbasis(self.geometry.groups, channels, taps, decay=self.decay, **options)

    def bind(self, geometry: Geometry, *, device: torch.device, dtype: torch.dtype) -> Self:
        super().bind(geometry, device=device, dtype=dtype)
        shape = (geometry.groups, geometry.out_channels, geometry.in_channels * geometry.taps)
        wide = torch.promote_types(dtype, torch.float32)
        self.register_buffer("variance", torch.zeros(shape, device=device, dtype=wide))
        self.register_buffer("num_steps", torch.zeros((), device=device, dtype=COUNT))
        self._count_from(0)
        return self

    def kept_beside(self) -> list[Tensor]:
        return [self.variance]

    def reset_state(self) -> None:
        super().reset_state()
        self.variance.zero_()
        self.num_steps.zero_()
        self._count_from(0)

    def _count_from(self, steps: int) -> None:
        self._steps = steps
        self.is_watching = is_due(steps + 1, interval_at(steps + 1, self.interval, STEPS))

    def before_loading(self, state_dict: dict[str, Any], prefix: str) -> None:
        super().before_loading(state_dict, prefix)
        steps = state_dict[f"{prefix}num_steps"]
        if not steps.is_meta:
            self._count_from(round(steps.item()) if steps.isfinite() else 0)

    def transform(
        self, grad_weight: Tensor, grad_bias: Tensor | None, weight: Tensor | None, samples: Samples | None = None
    ) -> tuple[Tensor, Tensor | None]:
        return grad_weight, grad_bias

    def observe_output(self, grad_output: Tensor) -> None:
        if self.is_watching:
            super().observe_output(grad_output)

    def observe(self, input: Tensor, grad_weight: Tensor) -> None:
        if not self.is_watching:  # in a compiled graph, which is always the same
            return
        super().observe(input, grad_weight)
        if self.num_batches_tracked == PATIENCE and self._steps == 0:
            warnings.warn(
                f"{self.name or 'a whitened layer'} keeps its plain gradients: no torch.optim optimizer steps its "
                "weight, or the weight is flattened or parametrized",
                stacklevel=2,
            )

    @property
    def batches_between_refreshes(self) -> int:
        return interval_at(LONG, self.interval, STEPS)

    @torch.no_grad()
    def scale_at_step(self, grad_weight: Tensor) -> Tensor:
        steps, variance = self._steps + 1, self.variance
        matrix = self.geometry.matrix(grad_weight).to(variance.dtype)
        rotated = self._rotated(matrix)
        weight, limits = max(1 / steps, 1 - self.variance_decay), torch.finfo(variance.dtype)
        valid: Tensor | None = None
        least: float | Tensor
        # One batch out of line would otherwise hold V up, and all steps down, for a hundred steps: it is shortened. Its
        # length is measured again: what overflowed is zero then, and an Inf is NaN.
        if variance.is_cpu:  # there a number can be read without waiting, and computing with it is quicker
            usual, length = variance.mean().sqrt().item(), _length(rotated).item()
            if usual > 0 and length > LONGEST * usual:
                length = _length(rotated.mul_(LONGEST * usual / length)).item()
            if not rotated.numel() * length * length < limits.max:  # a NaN is not less either
                return grad_weight
            variance.mul_(1 - weight).addcmul_(rotated, rotated, value=weight)
            level = (1 - weight) * usual * usual + weight * length * length  # V's mean, without computing it again
            least = max(self.damping * level, limits.tiny)
        else:
            limit = LONGEST * variance.mean().sqrt()
            rotated.mul_(torch.where(limit > 0, limit / _length(rotated), 1.0).clamp_(max=1.0))
            squares = rotated.square()
            valid = torch.isfinite(squares.mean())
            variance.lerp_(torch.where(valid, squares, variance), weight)
            least = (self.damping * variance.mean()).clamp_(min=limits.tiny)
        self.num_steps.fill_(steps)
        self._count_from(steps)
        scaled = self._rotated_back(rotated.mul_(torch.add(variance, least).rsqrt_())).view(matrix.shape)
        if valid is not None:
            scaled = torch.where(valid, scaled, matrix)
        return self.geometry.weight(scaled, grad_weight).to(grad_weight.dtype)

    def _rotated(self, matrix: Tensor) -> Tensor:
        """Rotate a gradient ``(groups, S, C, taps)`` into the bases of both sides, as ``(groups, S, C·taps)``."""
        if self.separable:
            rows = self.taps.rotate(matrix.flatten(1, 2)).view(matrix.shape).transpose(2, 3)
            rows = self.channels.rotate(rows.flatten(1, 2)).view(rows.shape).flatten(2)
        else:
            rows = self.inputs.rotate(matrix.flatten(2))
        return self.outputs.rotate(rows.mT).mT

    def _rotated_back(self, rotated: Tensor) -> Tensor:
        """Undo `_rotated`: ``(groups, S, C, taps)``, or with the last two as one."""
        rows = self.outputs.rotate_back(rotated.mT).mT
        if not self.separable:
            return self.inputs.rotate_back(rows)
        rows = rows.unflatten(2, (self.geometry.taps, -1))
        rows = self.channels.rotate_back(rows.flatten(1, 2)).view(rows.shape).transpose(2, 3)
        return self.taps.rotate_back(rows.flatten(1, 2)).view(rows.shape)

    def extra_repr(self) -> str:
        return f"eigenbases, features={self.features!r}"


def _length(entries: Tensor) -> Tensor:
    """Compute the root mean square."""
    return torch.linalg.vector_norm(entries) / math.sqrt(entries.numel())
