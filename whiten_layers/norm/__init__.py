"""Drop-ins for batch normalization that also decorrelate the channels."""

from .decorrelated import DecorrelatedBatchNorm1d, DecorrelatedBatchNorm2d, DecorrelatedBatchNorm3d
from .iter_norm import IterNorm1d, IterNorm2d, IterNorm3d
from .swbn import (
    StochasticWhiteningBatchNorm1d,
    StochasticWhiteningBatchNorm2d,
    StochasticWhiteningBatchNorm3d,
    follow_learning_rate,
)
from .update_bn import update_bn

__all__ = [
    "DecorrelatedBatchNorm1d",
    "DecorrelatedBatchNorm2d",
    "DecorrelatedBatchNorm3d",
    "IterNorm1d",
    "IterNorm2d",
    "IterNorm3d",
    "StochasticWhiteningBatchNorm1d",
    "StochasticWhiteningBatchNorm2d",
    "StochasticWhiteningBatchNorm3d",
    "follow_learning_rate",
    "update_bn",
]
