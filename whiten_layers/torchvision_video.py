"""The twins of the convolutions that torchvision's `r3d_18` and `mc3_18` are made of.

They are subclasses of `nn.Conv3d` with a signature of their own, and compute what it computes. `whiten` imports this
file if a script has imported those networks.
"""

from torchvision.models.video.resnet import Conv3DNoTemporal, Conv3DSimple

from .layers import PLAIN, WhitenedConv3d, attach, register
from .transforms import GradientTransform


class _WhitenedPlanes(WhitenedConv3d):
    """Base of the twins: the signature of torchvision's classes, plus `transform`."""

    def __init__(
        self,
        in_planes: int,
        out_planes: int,
        midplanes: int | None = None,
        stride: int = 1,
        padding: int = 1,
        *,
        transform: GradientTransform | str | None = None,
    ) -> None:
        PLAIN[type(self)].__init__(self, in_planes, out_planes, midplanes, stride, padding)
        attach(self, transform)


class WhitenedConv3DSimple(_WhitenedPlanes, Conv3DSimple):
    """torchvision's 3×3×3 convolution whose gradient is taken as if its inputs were whitened.

    Args:
        in_planes, out_planes, midplanes, stride, padding: as for torchvision's class.
        transform: as for `WhitenedLinear`.

    Shape: ``(N, in_planes, T, H, W) -> (N, out_planes, T', H', W')``.
    """


class WhitenedConv3DNoTemporal(_WhitenedPlanes, Conv3DNoTemporal):
    """torchvision's 1×3×3 convolution; arguments and shape as for `WhitenedConv3DSimple`."""


register(Conv3DSimple, WhitenedConv3DSimple)
register(Conv3DNoTemporal, WhitenedConv3DNoTemporal)
