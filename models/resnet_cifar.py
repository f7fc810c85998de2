"""ResNets for 32×32 images (He et al., arXiv 1512.03385), plain and whitened.

Two families share one class. ResNet-20 … 110 are the paper's own networks for CIFAR (section 4.2):
6n + 2 layers in three stages of 16, 32 and 64 channels, with parameter-free shortcuts (option A).
`cifar_resnet18`, 34 and 50 are its ImageNet networks with a stem for small images: a 3×3 convolution of
stride 1 and no pooling. Their module names are torchvision's.

The layers are arguments, so that any drop-in for `nn.Conv2d`, `nn.Linear` and `nn.BatchNorm2d` can replace them:
``norm_layer=IterNorm2d``, or ``functools.partial(IterNorm2d, group_size=32)``.
"""

from collections.abc import Callable
from functools import partial
from typing import TypedDict, Unpack

import torch.nn.functional as F
from torch import Tensor, nn

from whiten_layers import GradientTransform, whiten

Layer = Callable[..., nn.Module]
Transform = GradientTransform | str | None


class Layers(TypedDict, total=False):
    """Replacements for the convolutions, the linear layer and the batch normalizations of a network."""

    conv_layer: Layer
    linear_layer: Layer
    norm_layer: Layer


class PadShortcut(nn.Module):
    """Shortcut without parameters (option A): every `stride`-th position, and zeros for the new channels."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.new_channels, self.stride = out_channels - in_channels, stride

    def forward(self, x: Tensor) -> Tensor:
        before = self.new_channels // 2
        x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, before, self.new_channels - before))


def projection_shortcut(
    in_channels: int, out_channels: int, stride: int, conv_layer: Layer, norm_layer: Layer
) -> nn.Module:
    """Build an option B shortcut: a 1×1 convolution and a normalization."""
    return nn.Sequential(conv_layer(in_channels, out_channels, 1, stride=stride, bias=False), norm_layer(out_channels))


class BasicBlock(nn.Module):
    """Residual block of two 3×3 convolutions."""

    expansion = 1

    def __init__(
        self,
        in_channels: int,
        width: int,
        stride: int,
        shortcut: nn.Module | None,
        conv_layer: Layer,
        norm_layer: Layer,
    ) -> None:
        super().__init__()
        self.conv1 = conv_layer(in_channels, width, 3, stride=stride, padding=1, bias=False)
        self.bn1 = norm_layer(width)
        self.conv2 = conv_layer(width, width, 3, padding=1, bias=False)
        self.bn2 = norm_layer(width)
        self.downsample = shortcut

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + (x if self.downsample is None else self.downsample(x)))


class Bottleneck(nn.Module):
    """Residual block of 1×1, 3×3 and 1×1 convolutions. The 3×3 one has the stride, as in torchvision."""

    expansion = 4

    def __init__(
        self,
        in_channels: int,
        width: int,
        stride: int,
        shortcut: nn.Module | None,
        conv_layer: Layer,
        norm_layer: Layer,
    ) -> None:
        super().__init__()
        self.conv1 = conv_layer(in_channels, width, 1, bias=False)
        self.bn1 = norm_layer(width)
        self.conv2 = conv_layer(width, width, 3, stride=stride, padding=1, bias=False)
        self.bn2 = norm_layer(width)
        self.conv3 = conv_layer(width, width * self.expansion, 1, bias=False)
        self.bn3 = norm_layer(width * self.expansion)
        self.downsample = shortcut

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return F.relu(out + (x if self.downsample is None else self.downsample(x)))


class CifarResNet(nn.Module):
    """Residual network with a 3×3 stem, for images of about 32×32.

    Args:
        block: `BasicBlock` or `Bottleneck`.
        depths: number of blocks in each stage.
        width: channels of the first stage. Each later stage has twice as many, and half the resolution.
        num_classes: number of outputs.
        projection: use 1×1 convolutions (option B) as shortcuts instead of padding (option A).
        conv_layer, linear_layer, norm_layer: replacements for `nn.Conv2d`, `nn.Linear` and `nn.BatchNorm2d`.

    Shape: ``(N, 3, H, W) -> (N, num_classes)``.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: tuple[int, ...],
        width: int,
        num_classes: int,
        *,
        projection: bool,
        conv_layer: Layer = nn.Conv2d,
        linear_layer: Layer = nn.Linear,
        norm_layer: Layer = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        self.conv1 = conv_layer(3, width, 3, padding=1, bias=False)
        self.bn1 = norm_layer(width)
        projected = partial(projection_shortcut, conv_layer=conv_layer, norm_layer=norm_layer)
        channels = width
        self.num_stages = len(depths)
        for stage, depth in enumerate(depths):
            blocks = []
            for index in range(depth):
                stride = 2 if stage > 0 and index == 0 else 1
                out_channels = width * block.expansion
                shortcut = None
                if stride != 1 or channels != out_channels:
                    make = projected if projection else PadShortcut
                    shortcut = make(channels, out_channels, stride)
                blocks.append(block(channels, width, stride, shortcut, conv_layer, norm_layer))
                channels = out_channels
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
            width *= 2
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = linear_layer(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        for stage in range(self.num_stages):
            x = getattr(self, f"layer{stage + 1}")(x)
        return self.fc(self.avgpool(x).flatten(1))


def _cifar(blocks: int, num_classes: int, layers: Layers) -> CifarResNet:
    return CifarResNet(BasicBlock, (blocks,) * 3, 16, num_classes, projection=False, **layers)


def resnet20(num_classes: int = 10, **layers: Unpack[Layers]) -> CifarResNet:
    """Build ResNet-20 for CIFAR, 0.27 M parameters."""
    return _cifar(3, num_classes, layers)


def resnet32(num_classes: int = 10, **layers: Unpack[Layers]) -> CifarResNet:
    """Build ResNet-32 for CIFAR, 0.46 M parameters."""
    return _cifar(5, num_classes, layers)


def resnet44(num_classes: int = 10, **layers: Unpack[Layers]) -> CifarResNet:
    """Build ResNet-44 for CIFAR, 0.66 M parameters."""
    return _cifar(7, num_classes, layers)


def resnet56(num_classes: int = 10, **layers: Unpack[Layers]) -> CifarResNet:
    """Build ResNet-56 for CIFAR, 0.85 M parameters."""
    return _cifar(9, num_classes, layers)


def resnet110(num_classes: int = 10, **layers: Unpack[Layers]) -> CifarResNet:
    """Build ResNet-110 for CIFAR, 1.7 M parameters."""
    return _cifar(18, num_classes, layers)


def cifar_resnet18(num_classes: int = 10, **layers: Unpack[Layers]) -> CifarResNet:
    """Build ResNet-18 with a stem for small images, 11.2 M parameters."""
    return CifarResNet(BasicBlock, (2, 2, 2, 2), 64, num_classes, projection=True, **layers)


def cifar_resnet34(num_classes: int = 10, **layers: Unpack[Layers]) -> CifarResNet:
    """Build ResNet-34 with a stem for small images, 21.3 M parameters."""
    return CifarResNet(BasicBlock, (3, 4, 6, 3), 64, num_classes, projection=True, **layers)


def cifar_resnet50(num_classes: int = 10, **layers: Unpack[Layers]) -> CifarResNet:
    """Build ResNet-50 with a stem for small images, 23.5 M parameters."""
    return CifarResNet(Bottleneck, (3, 4, 6, 3), 64, num_classes, projection=True, **layers)


def whitened_resnet20(num_classes: int = 10, *, transform: Transform = None, **layers: Unpack[Layers]) -> CifarResNet:
    """Build `resnet20` with whitened layers."""
    return whiten(resnet20(num_classes, **layers), transform)


def whitened_resnet32(num_classes: int = 10, *, transform: Transform = None, **layers: Unpack[Layers]) -> CifarResNet:
    """Build `resnet32` with whitened layers."""
    return whiten(resnet32(num_classes, **layers), transform)


def whitened_resnet44(num_classes: int = 10, *, transform: Transform = None, **layers: Unpack[Layers]) -> CifarResNet:
    """Build `resnet44` with whitened layers."""
    return whiten(resnet44(num_classes, **layers), transform)


def whitened_resnet56(num_classes: int = 10, *, transform: Transform = None, **layers: Unpack[Layers]) -> CifarResNet:
    """Build `resnet56` with whitened layers."""
    return whiten(resnet56(num_classes, **layers), transform)


def whitened_resnet110(num_classes: int = 10, *, transform: Transform = None, **layers: Unpack[Layers]) -> CifarResNet:
    """Build `resnet110` with whitened layers."""
    return whiten(resnet110(num_classes, **layers), transform)


def whitened_cifar_resnet18(
    num_classes: int = 10, *, transform: Transform = None, **layers: Unpack[Layers]
) -> CifarResNet:
    """Build `cifar_resnet18` with whitened layers."""
    return whiten(cifar_resnet18(num_classes, **layers), transform)


def whitened_cifar_resnet34(
    num_classes: int = 10, *, transform: Transform = None, **layers: Unpack[Layers]
) -> CifarResNet:
    """Build `cifar_resnet34` with whitened layers."""
    return whiten(cifar_resnet34(num_classes, **layers), transform)


def whitened_cifar_resnet50(
    num_classes: int = 10, *, transform: Transform = None, **layers: Unpack[Layers]
) -> CifarResNet:
    """Build `cifar_resnet50` with whitened layers."""
    return whiten(cifar_resnet50(num_classes, **layers), transform)
