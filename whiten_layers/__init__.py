"""Drop-in whitening layers for PyTorch: swap them in, change nothing else, converge in fewer steps."""

from .convert import unwhiten, whiten
from .layers import (
    WhitenedConv1d,
    WhitenedConv2d,
    WhitenedConv3d,
    WhitenedConvTranspose1d,
    WhitenedConvTranspose2d,
    WhitenedConvTranspose3d,
    WhitenedLinear,
)
from .report import Report, report
from .transforms import Chain, FeatureWhitening, GradientTransform, PSIScaling

__all__ = [
    "Chain",
    "FeatureWhitening",
    "GradientTransform",
    "PSIScaling",
    "Report",
    "WhitenedConv1d",
    "WhitenedConv2d",
    "WhitenedConv3d",
    "WhitenedConvTranspose1d",
    "WhitenedConvTranspose2d",
    "WhitenedConvTranspose3d",
    "WhitenedLinear",
    "report",
    "unwhiten",
    "whiten",
]
