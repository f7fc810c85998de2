"""Whitened versions of torchvision's ResNets for ImageNet: ResNet, ResNeXt and Wide ResNet.

The networks are torchvision's own (arXiv 1512.03385, 1611.05431 and 1605.07146), and so are the pretrained weights:
``weights=`` accepts what torchvision's builder of the same name does, its enum or a string such as "DEFAULT".
"""

from collections.abc import Callable
from typing import TypedDict, Unpack

from torch import nn
from torchvision.models import (
    ResNet,
    ResNet18_Weights,
    ResNet34_Weights,
    ResNet50_Weights,
    ResNet101_Weights,
    ResNet152_Weights,
    ResNeXt50_32X4D_Weights,
    ResNeXt101_32X8D_Weights,
    ResNeXt101_64X4D_Weights,
    Wide_ResNet50_2_Weights,
    Wide_ResNet101_2_Weights,
    resnet18,
    resnet34,
    resnet50,
    resnet101,
    resnet152,
    resnext50_32x4d,
    resnext101_32x8d,
    resnext101_64x4d,
    wide_resnet50_2,
    wide_resnet101_2,
)

from whiten_layers import whiten

from .resnet_cifar import Transform


class Options(TypedDict, total=False):
    """Options of torchvision's builders besides `weights`."""

    progress: bool
    num_classes: int
    zero_init_residual: bool
    groups: int
    width_per_group: int
    replace_stride_with_dilation: list[bool] | None
    norm_layer: Callable[..., nn.Module] | None


def whitened_resnet18(
    *, weights: ResNet18_Weights | str | None = None, transform: Transform = None, **options: Unpack[Options]
) -> ResNet:
    """Build ResNet-18 with whitened layers, 11.7 M parameters."""
    return whiten(resnet18(weights=weights, **options), transform)


def whitened_resnet34(
    *, weights: ResNet34_Weights | str | None = None, transform: Transform = None, **options: Unpack[Options]
) -> ResNet:
    """Build ResNet-34 with whitened layers, 21.8 M parameters."""
    return whiten(resnet34(weights=weights, **options), transform)


def whitened_resnet50(
    *, weights: ResNet50_Weights | str | None = None, transform: Transform = None, **options: Unpack[Options]
) -> ResNet:
    """Build ResNet-50 with whitened layers, 25.6 M parameters."""
    return whiten(resnet50(weights=weights, **options), transform)


def whitened_resnet101(
    *, weights: ResNet101_Weights | str | None = None, transform: Transform = None, **options: Unpack[Options]
) -> ResNet:
    """Build ResNet-101 with whitened layers, 44.5 M parameters."""
    return whiten(resnet101(weights=weights, **options), transform)


def whitened_resnet152(
    *, weights: ResNet152_Weights | str | None = None, transform: Transform = None, **options: Unpack[Options]
) -> ResNet:
    """Build ResNet-152 with whitened layers, 60.2 M parameters."""
    return whiten(resnet152(weights=weights, **options), transform)


def whitened_resnext50_32x4d(
    *, weights: ResNeXt50_32X4D_Weights | str | None = None, transform: Transform = None, **options: Unpack[Options]
) -> ResNet:
    """Build ResNeXt-50 32x4d with whitened layers, 25.0 M parameters."""
    return whiten(resnext50_32x4d(weights=weights, **options), transform)


def whitened_resnext101_32x8d(
    *, weights: ResNeXt101_32X8D_Weights | str | None = None, transform: Transform = None, **options: Unpack[Options]
) -> ResNet:
    """Build ResNeXt-101 32x8d with whitened layers, 88.8 M parameters."""
    return whiten(resnext101_32x8d(weights=weights, **options), transform)


def whitened_resnext101_64x4d(
    *, weights: ResNeXt101_64X4D_Weights | str | None = None, transform: Transform = None, **options: Unpack[Options]
) -> ResNet:
    """Build ResNeXt-101 64x4d with whitened layers, 83.5 M parameters."""
    return whiten(resnext101_64x4d(weights=weights, **options), transform)


def whitened_wide_resnet50_2(
    *, weights: Wide_ResNet50_2_Weights | str | None = None, transform: Transform = None, **options: Unpack[Options]
) -> ResNet:
    """Build Wide ResNet-50-2 with whitened layers, 68.9 M parameters."""
    return whiten(wide_resnet50_2(weights=weights, **options), transform)


def whitened_wide_resnet101_2(
    *, weights: Wide_ResNet101_2_Weights | str | None = None, transform: Transform = None, **options: Unpack[Options]
) -> ResNet:
    """Build Wide ResNet-101-2 with whitened layers, 126.9 M parameters."""
    return whiten(wide_resnet101_2(weights=weights, **options), transform)
