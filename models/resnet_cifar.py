"""ResNets for 32×32 images (He et al., arXiv 1512.03385), plain and whitened.

Two families share one class. ResNet-20 … 110 are the paper's own networks for CIFAR (section 4.2):
6n + 2 layers in three stages of 16, 32 and 64 channels, with parameter-free shortcuts (option A).
ResNet-18, 34 and 50 are its ImageNet networks with a stem for small images: a 3×3 convolution of
stride 1 and no pooling; their module names are torchvision's.

The layers are arguments, so that any drop-in for `nn.Conv2d` and `nn.Linear` can stand in their place.
"""

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from whiten_layers import GradientTransform, whiten

Layer = Callable[..., nn.Module]


class PadShortcut(nn.Module):
    """Option A: every `stride`-th position, and zeros for the channels that are new. No parameters."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.new_channels, self.stride = out_channels - in_channels, stride

    def forward(self, x: Tensor) -> Tensor:
        before = self.new_channels // 2
        x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, before, self.new_channels - before))


def projection_shortcut(in_channels: int, out_channels: int, stride: int, conv_layer: Layer) -> nn.Module:
    """Option B: a 1×1 convolution."""
    return nn.Sequential(
        conv_layer(in_channels, out_channels, 1, stride=stride, bias=False), nn.BatchNorm2d(out_channels)
    )


class BasicBlock(nn.Module):
    """Two 3×3 convolutions."""

    expansion = 1

    def __init__(
        self, in_channels: int, width: int, stride: int, shortcut: nn.Module | None, conv_layer: Layer
    ) -> None:
        super().__init__()
        self.conv1 = conv_layer(in_channels, width, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv_layer(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = shortcut

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + (x if self.downsample is None else self.downsample(x)))


class Bottleneck(nn.Module):
    """1×1, 3×3 and 1×1 convolutions; the stride is the 3×3 one's, as in torchvision."""

    expansion = 4

    def __init__(
        self, in_channels: int, width: int, stride: int, shortcut: nn.Module | None, conv_layer: Layer
    ) -> None:
        super().__init__()
        self.conv1 = conv_layer(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv_layer(width, width, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = conv_layer(width, width * self.expansion, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(width * self.expansion)
        self.downsample = shortcut

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return F.relu(out + (x if self.downsample is None else self.downsample(x)))


class CifarResNet(nn.Module):
    """A residual network with a 3×3 stem, for images of about 32×32.

    Args:
        block: `BasicBlock` or `Bottleneck`.
        depths: blocks a stage.
        width: channels of the first stage; each later stage has twice as many and half the resolution.
        num_classes: outputs.
        projection: shortcuts by a 1×1 convolution (option B) instead of by padding (option A).
        conv_layer, linear_layer: what takes the place of `nn.Conv2d` and `nn.Linear`.

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
        conv_layer: Layer,
        linear_layer: Layer,
    ) -> None:
        super().__init__()
        self.conv1 = conv_layer(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        channels = width
        self.num_stages = len(depths)
        for stage, depth in enumerate(depths):
            blocks = []
            for index in range(depth):
                stride = 2 if stage > 0 and index == 0 else 1
                out_channels = width * block.expansion
                shortcut = None
                if stride != 1 or channels != out_channels:
                    make = partial(projection_shortcut, conv_layer=conv_layer) if projection else PadShortcut
                    shortcut = make(channels, out_channels, stride)
                blocks.append(block(channels, width, stride, shortcut, conv_layer))
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


def _cifar(blocks: int, num_classes: int, conv_layer: Layer, linear_layer: Layer) -> CifarResNet:
    layers = {"conv_layer": conv_layer, "linear_layer": linear_layer}
    return CifarResNet(BasicBlock, (blocks,) * 3, 16, num_classes, projection=False, **layers)


def resnet20(num_classes: int = 10, *, conv_layer: Layer = nn.Conv2d, linear_layer: Layer = nn.Linear) -> CifarResNet:
    """ResNet-20 for CIFAR, 0.27 M parameters."""
    return _cifar(3, num_classes, conv_layer, linear_layer)


def resnet32(num_classes: int = 10, *, conv_layer: Layer = nn.Conv2d, linear_layer: Layer = nn.Linear) -> CifarResNet:
    """ResNet-32 for CIFAR, 0.46 M parameters."""
    return _cifar(5, num_classes, conv_layer, linear_layer)


def resnet44(num_classes: int = 10, *, conv_layer: Layer = nn.Conv2d, linear_layer: Layer = nn.Linear) -> CifarResNet:
    """ResNet-44 for CIFAR, 0.66 M parameters."""
    return _cifar(7, num_classes, conv_layer, linear_layer)


def resnet56(num_classes: int = 10, *, conv_layer: Layer = nn.Conv2d, linear_layer: Layer = nn.Linear) -> CifarResNet:
    """ResNet-56 for CIFAR, 0.85 M parameters."""
    return _cifar(9, num_classes, conv_layer, linear_layer)


def resnet110(num_classes: int = 10, *, conv_layer: Layer = nn.Conv2d, linear_layer: Layer = nn.Linear) -> CifarResNet:
    """ResNet-110 for CIFAR, 1.7 M parameters."""
    return _cifar(18, num_classes, conv_layer, linear_layer)


def resnet18(num_classes: int = 10, *, conv_layer: Layer = nn.Conv2d, linear_layer: Layer = nn.Linear) -> CifarResNet:
    """ResNet-18 with a stem for small images, 11.2 M parameters."""
    layers = {"conv_layer": conv_layer, "linear_layer": linear_layer}
    return CifarResNet(BasicBlock, (2, 2, 2, 2), 64, num_classes, projection=True, **layers)


def resnet34(num_classes: int = 10, *, conv_layer: Layer = nn.Conv2d, linear_layer: Layer = nn.Linear) -> CifarResNet:
    """ResNet-34 with a stem for small images, 21.3 M parameters."""
    layers = {"conv_layer": conv_layer, "linear_layer": linear_layer}
    return CifarResNet(BasicBlock, (3, 4, 6, 3), 64, num_classes, projection=True, **layers)


def resnet50(num_classes: int = 10, *, conv_layer: Layer = nn.Conv2d, linear_layer: Layer = nn.Linear) -> CifarResNet:
    """ResNet-50 with a stem for small images, 23.5 M parameters."""
    layers = {"conv_layer": conv_layer, "linear_layer": linear_layer}
    return CifarResNet(Bottleneck, (3, 4, 6, 3), 64, num_classes, projection=True, **layers)


def _whitened(
    builder: Callable[..., CifarResNet], num_classes: int, transform: GradientTransform | str | None
) -> CifarResNet:
    return whiten(builder(num_classes), transform)


def whitened_resnet20(num_classes: int = 10, *, transform: GradientTransform | str | None = None) -> CifarResNet:
    """`resnet20` of whitened layers."""
    return _whitened(resnet20, num_classes, transform)


def whitened_resnet32(num_classes: int = 10, *, transform: GradientTransform | str | None = None) -> CifarResNet:
    """`resnet32` of whitened layers."""
    return _whitened(resnet32, num_classes, transform)


def whitened_resnet44(num_classes: int = 10, *, transform: GradientTransform | str | None = None) -> CifarResNet:
    """`resnet44` of whitened layers."""
    return _whitened(resnet44, num_classes, transform)


def whitened_resnet56(num_classes: int = 10, *, transform: GradientTransform | str | None = None) -> CifarResNet:
    """`resnet56` of whitened layers."""
    return _whitened(resnet56, num_classes, transform)


def whitened_resnet110(num_classes: int = 10, *, transform: GradientTransform | str | None = None) -> CifarResNet:
    """`resnet110` of whitened layers."""
    return _whitened(resnet110, num_classes, transform)


def whitened_resnet18(num_classes: int = 10, *, transform: GradientTransform | str | None = None) -> CifarResNet:
    """`resnet18` of whitened layers."""
    return _whitened(resnet18, num_classes, transform)


def whitened_resnet34(num_classes: int = 10, *, transform: GradientTransform | str | None = None) -> CifarResNet:
    """`resnet34` of whitened layers."""
    return _whitened(resnet34, num_classes, transform)


def whitened_resnet50(num_classes: int = 10, *, transform: GradientTransform | str | None = None) -> CifarResNet:
    """`resnet50` of whitened layers."""
    return _whitened(resnet50, num_classes, transform)
