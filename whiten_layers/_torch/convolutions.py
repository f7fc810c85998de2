"""Base classes of PyTorch's convolutions, and the padding that they compute."""

from typing import Any

from torch import Tensor
from torch.nn.modules.conv import _ConvNd as AnyConvolution
from torch.nn.modules.conv import _ConvTransposeNd as AnyTransposedConvolution

__all__ = ["AnyConvolution", "AnyTransposedConvolution", "output_padding_of", "padding_of"]


def padding_of(layer: AnyConvolution) -> tuple[int, ...]:
    """Return a convolution's padding as `F.pad` takes it: last dimension first, both sides, "same" worked out."""
    return tuple(layer._reversed_padding_repeated_twice)


def output_padding_of(layer: Any, input: Tensor, output_size: list[int] | None) -> list[int]:
    """Return the output padding with which a transposed convolution reaches an output size (None: its own)."""
    dims = len(layer.kernel_size)
    return layer._output_padding(
        input, output_size, layer.stride, layer.padding, layer.kernel_size, dims, layer.dilation
    )
