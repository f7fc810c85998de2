"""The table of whitening normalizations: every test that holds for any of them runs over it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from whiten_layers import norm

KINDS = {
    "iter_norm": (norm.IterNorm1d, norm.IterNorm2d, norm.IterNorm3d),
    "decorrelated": (norm.DecorrelatedBatchNorm1d, norm.DecorrelatedBatchNorm2d, norm.DecorrelatedBatchNorm3d),
    "swbn": (
        norm.StochasticWhiteningBatchNorm1d,
        norm.StochasticWhiteningBatchNorm2d,
        norm.StochasticWhiteningBatchNorm3d,
    ),
}
PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
CHANNELS = 7
SHAPES = [(9, CHANNELS), (4, CHANNELS, 5), (3, CHANNELS, 4, 3), (2, CHANNELS, 2, 3, 2)]  # of their inputs


def make(kind: str, input: Tensor, **options: Any) -> Any:
    """A normalization for an input, with parameters and a whitening matrix that are not what it starts with."""
    torch.manual_seed(0)
    options = {"dtype": torch.float64} | options
    layer = KINDS[kind][max(input.dim() - 3, 0)](CHANNELS, **options)
    with torch.no_grad():
        if layer.weight is not None:
            layer.weight.uniform_(0.5, 2)
        if layer.bias is not None:
            layer.bias.normal_()
        if kind == "swbn":
            step = 0.2 * torch.randn_like(layer.whitening)
            layer.whitening += step + step.mT
    return layer


def draw(shape: tuple[int, ...], seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    """Samples whose channels are correlated, unequal and not centred."""
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    scale = torch.linspace(0.5, 2, shape[1], dtype=torch.float64).view(-1, *[1] * (len(shape) - 2))
    return (scale * (noise + 0.5 * noise.cumsum(1)) + 3).to(dtype)


def any_kind(test: Callable) -> Callable:
    return pytest.mark.parametrize("kind", KINDS)(test)


def any_shape(test: Callable) -> Callable:
    return pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{len(shape)}D")(test)


def state(layer: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in layer.named_buffers()}
