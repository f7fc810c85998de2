"""The inside of PyTorch's convolutions, as far as the library relies on what it does not document."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from whiten_layers._torch.convolutions import (
    AnyConvolution,
    AnyTransposedConvolution,
    output_padding_of,
    padding_of,
)


def test_every_convolution_has_its_base_class():
    plain = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    transposed = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    hint = "torch.nn.modules.conv._ConvNd and _ConvTransposeNd are to be the base classes of the convolutions"
    assert all(issubclass(kind, AnyConvolution) for kind in plain + transposed), hint
    assert all(issubclass(kind, AnyTransposedConvolution) for kind in transposed), hint
    assert not any(issubclass(kind, AnyTransposedConvolution) for kind in plain), hint


@pytest.mark.parametrize("padding", [(1, 2), "same", "valid"])
def test_padding_is_as_pad_takes_it(padding):
    layer = nn.Conv2d(2, 3, (3, 5), padding=padding, dilation=(2, 1)).double()
    x = torch.randn(1, 2, 7, 8, dtype=torch.float64)
    padded = F.conv2d(F.pad(x, padding_of(layer)), layer.weight, layer.bias, dilation=layer.dilation)
    hint = "_ConvNd._reversed_padding_repeated_twice is to be the padding as F.pad takes it"
    torch.testing.assert_close(padded, layer(x), rtol=1e-12, atol=1e-12, msg=hint)


def test_output_padding_comes_to_the_output_size():
    layer = nn.ConvTranspose2d(2, 3, 3, stride=2)
    x = torch.randn(1, 2, 4, 5)
    hint = "_ConvTransposeNd._output_padding(input, output_size, …) is to give what F.conv_transpose takes"
    assert list(output_padding_of(layer, x, None)) == [0, 0], hint
    padding = output_padding_of(layer, x, [10, 11])
    output = F.conv_transpose2d(x, layer.weight, layer.bias, layer.stride, output_padding=padding)
    assert output.shape[-2:] == (10, 11), hint
