"""Drop-in layers: the plain PyTorch layer whose weight's gradient passes through a transform.

In evaluation, with gradients off, or with the weight frozen, a layer here *is* the plain one: the
same operations, nothing saved, nothing observed.
"""

import copy
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .autograd import ObserveOutput, TransformGradient
from .patches import Geometry
from .transforms import FeatureWhitening, GradientTransform


def _make_transform(transform: GradientTransform | str | None) -> GradientTransform:
    if transform is None:
        return FeatureWhitening()
    if isinstance(transform, str):
        return FeatureWhitening(transform)
    if isinstance(transform, GradientTransform):
        return copy.deepcopy(transform)
    raise TypeError(f"transform={transform!r} is not possible: give a GradientTransform, a method's name, or None")


def attach(layer: nn.Linear | nn.Conv2d, geometry: Geometry, transform: GradientTransform | str | None) -> None:
    """Give a layer its own copy of a transform, with state on the weight's device and of its precision."""
    if layer.weight.is_complex():
        raise ValueError(f"dtype={layer.weight.dtype} is not possible: give a real floating-point type")
    bound = _make_transform(transform).bind(geometry, device=layer.weight.device, dtype=layer.weight.dtype)
    layer.transform = bound.train(layer.training)


def _is_transformed(layer: "WhitenedLinear | WhitenedConv2d") -> bool:
    return layer.training and torch.is_grad_enabled() and layer.weight.requires_grad


def _parameters(layer: "WhitenedLinear | WhitenedConv2d", input: Tensor) -> tuple[Tensor, Tensor | None]:
    # Nothing absorbs a shift of the inputs where there is no bias, or a frozen one.
    shifted = layer.bias is not None and layer.bias.requires_grad
    parameters = (layer.weight, layer.bias) if shifted else (layer.weight,)
    # Detached, lest autograd take this for a way to the input's gradient and compute the weight's for it.
    weight, *bias = TransformGradient.apply(input.detach(), layer.transform.handle, *parameters)
    return weight, bias[0] if shifted else layer.bias


def _observed(layer: "WhitenedLinear | WhitenedConv2d", output: Tensor) -> Tensor:
    if layer.transform.observes_output:
        output = ObserveOutput.apply(output, layer.transform.handle)
    return output


class WhitenedLinear(nn.Linear):
    """`nn.Linear` whose gradient is taken as if its inputs were whitened.

    Args:
        in_features, out_features, bias, device, dtype: as for `nn.Linear`.
        transform: a `GradientTransform` (copied), the name of an inverse method, or None for
            ``FeatureWhitening()``.

    Shape: ``(..., in_features) -> (..., out_features)``.
    """

    transform: GradientTransform

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        transform: GradientTransform | str | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        attach(self, self.geometry(self), transform)

    @staticmethod
    def geometry(layer: nn.Linear) -> Geometry:
        return Geometry(layer.in_features, layer.out_features)

    def forward(self, input: Tensor) -> Tensor:
        if not _is_transformed(self):
            return super().forward(input)
        weight, bias = _parameters(self, input)
        return _observed(self, F.linear(input, weight, bias))


class WhitenedConv2d(nn.Conv2d):
    """`nn.Conv2d` whose gradient is taken as if its input patches were whitened.

    Args:
        in_channels, …, dtype: as for `nn.Conv2d`.
        transform: as for `WhitenedLinear`.

    Shape: ``(N, in_channels, H, W)`` or ``(in_channels, H, W)``, as for `nn.Conv2d`.
    """

    transform: GradientTransform

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        transform: GradientTransform | str | None = None,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype
        )
        attach(self, self.geometry(self), transform)

    @staticmethod
    def geometry(layer: nn.Conv2d) -> Geometry:
        return Geometry(
            layer.in_channels // layer.groups,
            layer.out_channels // layer.groups,
            layer.groups,
            layer.kernel_size,
            layer.stride,
            layer.dilation,
            tuple(layer._reversed_padding_repeated_twice),
            "constant" if layer.padding_mode == "zeros" else layer.padding_mode,
        )

    def forward(self, input: Tensor) -> Tensor:
        if not _is_transformed(self):
            return super().forward(input)
        weight, bias = _parameters(self, input)
        return _observed(self, self._conv_forward(input, weight, bias))
