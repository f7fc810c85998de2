"""Drop-in whitening layers for PyTorch: swap them in, change nothing else, converge in fewer steps."""

from .convert import unwhiten, whiten
from .layers import WhitenedConv2d, WhitenedLinear
from .report import Report, report
from .transforms import FeatureWhitening, GradientTransform

__all__ = [
    "FeatureWhitening",
    "GradientTransform",
    "Report",
    "WhitenedConv2d",
    "WhitenedLinear",
    "report",
    "unwhiten",
    "whiten",
]
