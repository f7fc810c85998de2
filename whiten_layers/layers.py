"""Drop-in layers: the twins of PyTorch's own linear layer and convolutions."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy

from ._torch.convolutions import AnyConvolution, AnyTransposedConvolution, output_padding_of, padding_of
from .statistics.patches import Geometry
from .transforms import GradientTransform
from .whitened import Whitened, attach, register


def for_each_axis(value: int | Sequence[int], axes: int) -> tuple[int, ...]:
    """Spell out an attribute of a convolution that a script has set to a single number, which its operation takes."""
    return (value,) * axes if isinstance(value, int) else tuple(value)


def weights_shape(layer: Any, declared: Sequence[int]) -> Sequence[int]:
    """Return the shape of a layer's weight; the declared one where a wrapper shows the weight flat."""
    shape: Sequence[int] = layer.weight.shape
    return shape if len(shape) == len(declared) else declared


def zero_padding(layer: Any, kernel_size: Sequence[int]) -> tuple[int, ...]:
    """Work out a convolution's padding by zeros as `F.pad` takes it: last dimension first, both sides."""
    axes = len(kernel_size)
    if layer.padding == "same":
        whole = [step * (size - 1) for step, size in zip(for_each_axis(layer.dilation, axes), kernel_size, strict=True)]
        sides = [(width // 2, width - width // 2) for width in whole]
    else:
        sides = [(width, width) for width in for_each_axis(0 if layer.padding == "valid" else layer.padding, axes)]
    return tuple(width for pair in reversed(sides) for width in pair)


class _WhitenedLayer(Whitened):
    """Base of the twins of PyTorch's own layers, which can be initialised anew."""

    def reset_parameters(self) -> None:
        """Initialise the parameters as the plain layer does, and reset the transform's state."""
        super().reset_parameters()  # type: ignore[misc]
        if hasattr(self, "transform"):  # not yet, when the plain layer's __init__ calls this
            self.transform.reset_state()


class WhitenedLinear(_WhitenedLayer, nn.Linear):
    """`nn.Linear` whose gradient is taken as if its inputs were whitened.

    Args:
        in_features, out_features, bias, device, dtype: as for `nn.Linear`.
        transform: a `GradientTransform` (copied), the name of an inverse method, "eigenbasis" for
            ``EigenbasisScaling()``, "optimal_gain" for ``OptimalInputGain()``, or None for ``FeatureWhitening()``.

    Shape: ``(..., in_features) -> (..., out_features)``.
    """

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
        attach(self, transform)

    @staticmethod
    def geometry(layer: Any) -> Geometry:
        outputs, inputs = weights_shape(layer, (layer.out_features, layer.in_features))
        return Geometry(inputs, outputs, has_bias=layer.bias is not None)

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, Proxy) and self.is_traced(input):
            return self.note_call(input)
        return super().forward(input) if self.is_plain() else self.transformed(F.linear, input)


class _WhitenedConv(_WhitenedLayer, AnyConvolution):
    """Base of the whitened convolutions: the plain class's signature, plus `transform`."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: str | int | tuple[int, ...] = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        transform: GradientTransform | str | None = None,
    ) -> None:
        options: tuple[Any, ...] = (stride, padding, dilation, groups, bias, padding_mode, device, dtype)
        super().__init__(in_channels, out_channels, kernel_size, *options)  # type: ignore[arg-type]
        attach(self, transform)

    @staticmethod
    def geometry(layer: Any) -> Geometry:
        declared = (layer.out_channels, layer.in_channels // layer.groups, *layer.kernel_size)
        outputs, inputs, *kernel_size = weights_shape(layer, declared)
        return Geometry(
            inputs,
            outputs // layer.groups,
            layer.groups,
            tuple(kernel_size),
            for_each_axis(layer.stride, len(kernel_size)),
            for_each_axis(layer.dilation, len(kernel_size)),
            zero_padding(layer, kernel_size) if layer.padding_mode == "zeros" else (),
            has_bias=layer.bias is not None,
        )

    @staticmethod
    def follows_from(layer: Any, weight: Tensor, bias: Tensor | None) -> tuple[Any, ...]:
        reads = (layer.stride, layer.padding, layer.dilation, layer.groups, layer.padding_mode)
        return weight.shape, bias is None, *reads

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, Proxy) and self.is_traced(input):
            return self.note_call(input)
        if self.is_plain():
            return super().forward(input)
        plain: Any = self  # to the type checker, its attributes have the types of all convolutions at once
        operation, padding = (F.conv1d, F.conv2d, F.conv3d)[len(plain.kernel_size) - 1], plain.padding
        if plain.padding_mode != "zeros":
            # The padded tensor counts as the layer's input, and is what the operation saves.
            input, padding = F.pad(input, padding_of(plain), mode=plain.padding_mode), 0
        return self.transformed(operation, input, plain.stride, padding, plain.dilation, plain.groups)


class WhitenedConv1d(_WhitenedConv, nn.Conv1d):
    """`nn.Conv1d` whose gradient is taken as if its input patches were whitened.

    Args:
        in_channels, …, dtype: as for `nn.Conv1d`.
        transform: as for `WhitenedLinear`.

    Shape: ``(N, in_channels, L)`` or ``(in_channels, L)``, as for `nn.Conv1d`.
    """


class WhitenedConv2d(_WhitenedConv, nn.Conv2d):
    """`nn.Conv2d` whose gradient is taken as if its input patches were whitened.

    Args:
        in_channels, …, dtype: as for `nn.Conv2d`.
        transform: as for `WhitenedLinear`.

    Shape: ``(N, in_channels, H, W)`` or ``(in_channels, H, W)``, as for `nn.Conv2d`.
    """


class WhitenedConv3d(_WhitenedConv, nn.Conv3d):
    """`nn.Conv3d` whose gradient is taken as if its input patches were whitened.

    Args:
        in_channels, …, dtype: as for `nn.Conv3d`.
        transform: as for `WhitenedLinear`.

    Shape: ``(N, in_channels, D, H, W)`` or ``(in_channels, D, H, W)``, as for `nn.Conv3d`.
    """


class _WhitenedConvTranspose(_WhitenedLayer, AnyTransposedConvolution):
    """Base of the whitened transposed convolutions.

    A transposed convolution is a convolution with a flipped kernel, whose input has ``stride − 1`` zeros inserted
    between its positions. The patches that are whitened contain those zeros. Positions that `output_size` adds to the
    output do not enter the statistics.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] = 0,
        output_padding: int | tuple[int, ...] = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: int | tuple[int, ...] = 1,
        padding_mode: Literal["zeros"] = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        transform: GradientTransform | str | None = None,
    ) -> None:
        options: tuple[Any, ...] = (
            stride,
            padding,
            output_padding,
            groups,
            bias,
            dilation,
            padding_mode,
            device,
            dtype,
        )
        super().__init__(in_channels, out_channels, kernel_size, *options)  # type: ignore[arg-type]
        attach(self, transform)

    @staticmethod
    def geometry(layer: Any) -> Geometry:
        declared = (layer.in_channels, layer.out_channels // layer.groups, *layer.kernel_size)
        inputs, outputs, *kernel_size = weights_shape(layer, declared)
        axes, padding = len(kernel_size), list[int]()
        dilation, added = for_each_axis(layer.dilation, axes), for_each_axis(layer.output_padding, axes)
        for axis, cropped in enumerate(for_each_axis(layer.padding, axes)):
            side = dilation[axis] * (kernel_size[axis] - 1) - cropped
            padding = [side, side + added[axis], *padding]
        return Geometry(
            inputs // layer.groups,
            outputs,
            layer.groups,
            tuple(kernel_size),
            (1,) * axes,
            dilation,
            tuple(padding),
            has_bias=layer.bias is not None,
            upsampling=for_each_axis(layer.stride, axes),
            inputs_first=True,
        )

    @staticmethod
    def follows_from(layer: Any, weight: Tensor, bias: Tensor | None) -> tuple[Any, ...]:
        reads = (layer.stride, layer.padding, layer.output_padding, layer.dilation, layer.groups)
        return weight.shape, bias is None, *reads

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        if isinstance(input, Proxy) and self.is_traced(input):
            return self.note_call(input, output_size)
        if self.is_plain():
            return super().forward(input, output_size)
        plain: Any = self  # to the type checker, its attributes have the types of all convolutions at once
        sizes = output_padding_of(plain, input, output_size)
        operation = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[len(plain.kernel_size) - 1]
        return self.transformed(operation, input, plain.stride, plain.padding, sizes, plain.groups, plain.dilation)


class WhitenedConvTranspose1d(_WhitenedConvTranspose, nn.ConvTranspose1d):
    """`nn.ConvTranspose1d` whose gradient is taken as if its input patches were whitened.

    Args:
        in_channels, …, dtype: as for `nn.ConvTranspose1d`.
        transform: as for `WhitenedLinear`.

    Shape: ``(N, in_channels, L)`` or ``(in_channels, L)``, as for `nn.ConvTranspose1d`.
    """


class WhitenedConvTranspose2d(_WhitenedConvTranspose, nn.ConvTranspose2d):
    """`nn.ConvTranspose2d` whose gradient is taken as if its input patches were whitened.

    Args:
        in_channels, …, dtype: as for `nn.ConvTranspose2d`.
        transform: as for `WhitenedLinear`.

    Shape: ``(N, in_channels, H, W)`` or ``(in_channels, H, W)``, as for `nn.ConvTranspose2d`.
    """


class WhitenedConvTranspose3d(_WhitenedConvTranspose, nn.ConvTranspose3d):
    """`nn.ConvTranspose3d` whose gradient is taken as if its input patches were whitened.

    Args:
        in_channels, …, dtype: as for `nn.ConvTranspose3d`.
        transform: as for `WhitenedLinear`.

    Shape: ``(N, in_channels, D, H, W)`` or ``(in_channels, D, H, W)``, as for `nn.ConvTranspose3d`.
    """


register(nn.Linear, WhitenedLinear)
register(nn.Conv1d, WhitenedConv1d)
register(nn.Conv2d, WhitenedConv2d)
register(nn.Conv3d, WhitenedConv3d)
register(nn.ConvTranspose1d, WhitenedConvTranspose1d)
register(nn.ConvTranspose2d, WhitenedConvTranspose2d)
register(nn.ConvTranspose3d, WhitenedConvTranspose3d)
