"""Drop-in whitening layers for PyTorch: swap them in, change nothing else, converge in fewer steps."""

from .advise import Advice, advise
from .attention import WhitenedMultiheadAttention
from .checkpoints import load_window_state_dict, plain_state_dict, window_state_dict
from .conversion.convert_batchnorm import convert_batchnorm
from .conversion.fold import fold
from .conversion.whiten import unwhiten, whiten
from .estimate import Estimate, estimate
from .layers import (
    WhitenedConv1d,
    WhitenedConv2d,
    WhitenedConv3d,
    WhitenedConvTranspose1d,
    WhitenedConvTranspose2d,
    WhitenedConvTranspose3d,
    WhitenedLinear,
)
from .norm import (
    DecorrelatedBatchNorm1d,
    DecorrelatedBatchNorm2d,
    DecorrelatedBatchNorm3d,
    IterNorm1d,
    IterNorm2d,
    IterNorm3d,
    StochasticWhiteningBatchNorm1d,
    StochasticWhiteningBatchNorm2d,
    StochasticWhiteningBatchNorm3d,
    follow_learning_rate,
    update_bn,
)
from .pooling import CovariancePooling1d, CovariancePooling2d
from .report import Report, report
from .transforms import Chain, EigenbasisScaling, FeatureWhitening, GradientTransform, OptimalInputGain, PSIScaling
from .two_stage import TwoStageNetwork

__version__ = "0.2.0.dev0"

__all__ = [
    "Advice",
    "Chain",
    "CovariancePooling1d",
    "CovariancePooling2d",
    "DecorrelatedBatchNorm1d",
    "DecorrelatedBatchNorm2d",
    "DecorrelatedBatchNorm3d",
    "EigenbasisScaling",
    "Estimate",
    "FeatureWhitening",
    "GradientTransform",
    "IterNorm1d",
    "IterNorm2d",
    "IterNorm3d",
    "OptimalInputGain",
    "PSIScaling",
    "Report",
    "StochasticWhiteningBatchNorm1d",
    "StochasticWhiteningBatchNorm2d",
    "StochasticWhiteningBatchNorm3d",
    "TwoStageNetwork",
    "WhitenedConv1d",
    "WhitenedConv2d",
    "WhitenedConv3d",
    "WhitenedConvTranspose1d",
    "WhitenedConvTranspose2d",
    "WhitenedConvTranspose3d",
    "WhitenedLinear",
    "WhitenedMultiheadAttention",
    "advise",
    "convert_batchnorm",
    "estimate",
    "fold",
    "follow_learning_rate",
    "load_window_state_dict",
    "plain_state_dict",
    "report",
    "unwhiten",
    "update_bn",
    "whiten",
    "window_state_dict",
]
