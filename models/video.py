"""Multi-fibre networks for video clips, plain and whitened.

`mfnet3d` is MF-Net-3D (Chen et al., arXiv 1807.11195). Its units are slices, the fibres, that run side by side as the
groups of their convolutions; a multiplexer of two 1×1×1 convolutions lets the fibres exchange what they have found.
`mfcd_net` is a slim variant of it for the residual frames of compressed video.

The layers are arguments, so that any drop-in for `nn.Conv3d`, `nn.Linear` and `nn.BatchNorm3d` can replace them:
``norm_layer=IterNorm3d``, or ``functools.partial(IterNorm3d, group_size=32)``.
"""

from typing import Unpack

import torch.nn.functional as F
from torch import Tensor, nn

from whiten_layers import whiten

from .resnet_cifar import Layer, Layers, Transform

DEPTHS = (3, 4, 6, 3)  # units of the stages conv2 … conv5
FIBRES = 16
STEM = 16  # channels
Size = tuple[int, int, int]  # of a kernel, or a stride: frames, rows, columns


class PreActivation(nn.Module):
    """Normalization, ReLU and a convolution without a bias, in this order."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        conv_layer: Layer,
        norm_layer: Layer,
        *,
        stride: Size = (1, 1, 1),
        groups: int = 1,
    ) -> None:
        super().__init__()
        self.bn = norm_layer(in_channels)
        padding = tuple(size // 2 for size in kernel_size)
        self.conv = conv_layer(
            in_channels, out_channels, kernel_size, stride=stride, padding=padding, groups=groups, bias=False
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.relu(self.bn(x)))


class MultiFibreUnit(nn.Module):
    """Residual unit of a multiplexer and two convolutions of 16 groups (section 3 and figure 4 of the paper).

    The multiplexer, with a quarter of the channels inside, has a shortcut of its own. The first unit of a stage changes
    resolution and channels: its shortcut is a projection, and its second convolution is 1×1×1 over all channels.

    Shape: ``(N, in_channels, T, H, W) -> (N, channels, T', H', W')``.
    """

    def __init__(
        self, in_channels: int, channels: int, stride: Size | None, conv_layer: Layer, norm_layer: Layer
    ) -> None:
        super().__init__()
        layers = (conv_layer, norm_layer)
        self.squeeze = PreActivation(in_channels, channels // 4, (1, 1, 1), *layers)
        self.expand = PreActivation(channels // 4, in_channels, (1, 1, 1), *layers)
        self.downsample = None
        if stride is None:
            self.conv1 = PreActivation(in_channels, channels, (3, 3, 3), *layers, groups=FIBRES)
            self.conv2 = PreActivation(channels, channels, (1, 3, 3), *layers, groups=FIBRES)
        else:
            self.conv1 = PreActivation(in_channels, channels, (3, 3, 3), *layers, stride=stride, groups=FIBRES)
            self.conv2 = PreActivation(channels, channels, (1, 1, 1), *layers)
            self.downsample = PreActivation(in_channels, channels, (1, 1, 1), *layers, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        out = x + self.expand(self.squeeze(x))
        out = self.conv2(self.conv1(out))
        return out + (x if self.downsample is None else self.downsample(x))


class MultiFibreNet(nn.Module):
    """Multi-fibre network of a stem and four stages, for clips of any length and size.

    Args:
        width: channels of the first stage, a multiple of 16; each later stage has twice as many. The first stage halves
            the number of frames, the others rows and columns.
        num_classes: number of outputs.
        conv_layer, linear_layer, norm_layer: replacements for `nn.Conv3d`, `nn.Linear` and `nn.BatchNorm3d`.

    Shape: ``(N, 3, T, H, W) -> (N, num_classes)``.
    """

    def __init__(
        self,
        width: int,
        num_classes: int,
        *,
        conv_layer: Layer = nn.Conv3d,
        linear_layer: Layer = nn.Linear,
        norm_layer: Layer = nn.BatchNorm3d,
    ) -> None:
        super().__init__()
        self.conv1 = conv_layer(3, STEM, (3, 5, 5), stride=(1, 2, 2), padding=(1, 2, 2), bias=False)
        self.bn1 = norm_layer(STEM)
        self.maxpool = nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1))
        channels = STEM
        for stage, depth in enumerate(DEPTHS):
            stride = (2, 1, 1) if stage == 0 else (1, 2, 2)
            first = MultiFibreUnit(channels, width, stride, conv_layer, norm_layer)
            others = [MultiFibreUnit(width, width, None, conv_layer, norm_layer) for _ in range(depth - 1)]
            setattr(self, f"conv{stage + 2}", nn.Sequential(first, *others))
            channels, width = width, 2 * width
        self.bn5 = norm_layer(channels)
        self.avgpool = nn.AdaptiveAvgPool3d(1)
        self.fc = linear_layer(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                # By what comes in: PyTorch does not divide what goes out by the groups.
                nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))
        for stage in range(len(DEPTHS)):
            x = getattr(self, f"conv{stage + 2}")(x)
        return self.fc(self.avgpool(F.relu(self.bn5(x))).flatten(1))


def mfnet3d(num_classes: int = 400, **layers: Unpack[Layers]) -> MultiFibreNet:
    """Build MF-Net-3D, 8.0 M parameters and, for 16 frames of 224×224, 11.1 G multiply-adds."""
    return MultiFibreNet(96, num_classes, **layers)


def mfcd_net(num_classes: int = 400, **layers: Unpack[Layers]) -> MultiFibreNet:
    """Build a slim multi-fibre network for residual clips, 3.6 M parameters.

    MFCD-Net (arXiv 1911.08206) sets a multi-fibre network on the residual frames of compressed video, as one clip, and
    has a teacher on raw frames. Only its abstract was at hand: "11 times fewer parameters and 3 times fewer FLOPs" than
    earlier networks for compressed video. The design here is this library's own: `mfnet3d` with two thirds of the
    channels. `python -m benchmarks.video` prints what it comes to.
    """
    return MultiFibreNet(64, num_classes, **layers)


def whitened_mfnet3d(num_classes: int = 400, *, transform: Transform = None, **layers: Unpack[Layers]) -> MultiFibreNet:
    """Build `mfnet3d` with whitened layers."""
    return whiten(mfnet3d(num_classes, **layers), transform)


def whitened_mfcd_net(
    num_classes: int = 400, *, transform: Transform = None, **layers: Unpack[Layers]
) -> MultiFibreNet:
    """Build `mfcd_net` with whitened layers."""
    return whiten(mfcd_net(num_classes, **layers), transform)
