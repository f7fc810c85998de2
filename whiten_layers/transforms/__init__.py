"""Gradient transforms: what a layer may do to its weight's gradient in backward."""

from .base import GradientTransform
from .chain import Chain
from .eigenbasis import EigenbasisScaling
from .gain import OptimalInputGain
from .psi import PSIScaling
from .whitening import FeatureWhitening

__all__ = ["Chain", "EigenbasisScaling", "FeatureWhitening", "GradientTransform", "OptimalInputGain", "PSIScaling"]
