"""Chain of transforms, applied to one gradient one after the other."""

import copy
from collections.abc import Iterator
from typing import Self

import torch
from torch import Tensor

from ..statistics.patches import Geometry
from .base import GradientTransform, Samples


class Chain(GradientTransform):
    """Several transforms applied in order: ``Chain(FeatureWhitening(), PSIScaling())`` whitens, then scales.

    Each maps the result of the one before it. Each observes the same as it would alone: the layer's input, the plain
    gradient, and the gradient of the layer's output. They share one count of batches.

    Args:
        transforms: at least one `GradientTransform`. The chain copies them.

    Raises:
        ValueError: no transform is given.
        TypeError: an argument is not a `GradientTransform`; the message names it.

    State: its members' state, under their index ("0.inputs.running_covariance"). The chain itself skips no batch.
    """

    def __init__(self, *transforms: GradientTransform) -> None:
        super().__init__()
        if not transforms:
            raise ValueError("transforms=() is not possible: give at least one GradientTransform")
        for place, transform in enumerate(transforms):
            if not isinstance(transform, GradientTransform):
                raise TypeError(f"transforms[{place}]={transform!r} is not possible: give a GradientTransform")
            self.add_module(str(place), copy.deepcopy(transform))
        self.schedule.join(self.parts())

    @property
    def is_watching(self) -> bool:  # type: ignore[override]
        return any(member.is_watching for member in self.members())

    def members(self) -> Iterator[GradientTransform]:
        """Iterate over the transforms, in order."""
        return (child for child in self.children() if isinstance(child, GradientTransform))

    def bind(self, geometry: Geometry, *, device: torch.device, dtype: torch.dtype) -> Self:
        self.bind_counters(device)
        for member in self.members():
            member.bind(geometry, device=device, dtype=dtype)
        self.observes_output = any(member.observes_output for member in self.members())
        self.samples_up_to = next(self.members()).samples_up_to  # the others are given another gradient
        self.reads_weight = any(member.reads_weight for member in self.members())
        self.maps_bias = any(member.maps_bias for member in self.members())
        self.scales_at_step = any(member.scales_at_step for member in self.members())
        return self

    def reset_state(self) -> None:
        self.reset_counters()
        for member in self.members():
            member.reset_state()

    def transform(
        self, grad_weight: Tensor, grad_bias: Tensor | None, weight: Tensor | None, samples: Samples | None = None
    ) -> tuple[Tensor, Tensor | None]:
        given = {} if samples is None else {"samples": samples}
        for member in self.members():
            read = weight if member.reads_weight else None
            grad_weight, grad_bias = member.transform(grad_weight, grad_bias, read, **given)
            given = {}
        return grad_weight, grad_bias

    def scale_at_step(self, grad_weight: Tensor) -> Tensor:
        for member in self.members():
            grad_weight = member.scale_at_step(grad_weight)
        return grad_weight

    def observe_output(self, grad_output: Tensor) -> None:
        self.schedule.begin_batch(self, announced=True)
        for member in self.members():
            if member.observes_output:
                member.observe_output(grad_output)

    def observe(self, input: Tensor, grad_weight: Tensor) -> None:
        self.schedule.begin_batch(self)
        for member in self.members():
            member.observe(input, grad_weight)
