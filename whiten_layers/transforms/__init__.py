"""Gradient transforms: what a layer may do to its weight's gradient in backward."""

from .base import GradientTransform
from .whitening import FeatureWhitening

__all__ = ["FeatureWhitening", "GradientTransform"]
