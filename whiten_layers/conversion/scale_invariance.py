"""Search for layers whose rows may be rescaled without changing what the model computes."""

from typing import Any

from torch import nn

from ..norm import StochasticWhiteningBatchNorm1d, StochasticWhiteningBatchNorm2d, StochasticWhiteningBatchNorm3d
from .tracing import sole_consumers

# Norms that normalise each channel separately. nn.LayerNorm and nn.GroupNorm do not: they take several together.
# Nor do decorrelating norms, since ZCA depends on the channels' scales.
SCALE_INVARIANT: tuple[type[nn.Module], ...] = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
    StochasticWhiteningBatchNorm1d,  # standardises each channel before mixing them
    StochasticWhiteningBatchNorm2d,
    StochasticWhiteningBatchNorm3d,
)
# Those of SCALE_INVARIANT whose channels are the features of a linear layer's rows ``(N, features)``.
OF_ROWS: tuple[type[nn.Module], ...] = (nn.BatchNorm1d, nn.SyncBatchNorm, StochasticWhiteningBatchNorm1d)


def scale_invariant(model: nn.Module, layers: tuple[type[nn.Module], ...], in_evaluation: bool = False) -> set[str]:
    """Return the names of layers of these types whose output goes to a per-channel normalization and nowhere else.

    A norm in evaluation mode after a layer in training mode counts as frozen: it divides by its running variance,
    whatever the batch's variance is, so the scale of the rows matters. If the layer is in evaluation mode too, that is
    assumed to be temporary, unless the model is to train `in_evaluation` mode.

    Raises:
        ValueError: the model cannot be traced.
    """
    modules: dict[str, Any] = dict(model.named_modules())
    pairs = sole_consumers(model, layers, SCALE_INVARIANT)
    return {name for name, norm in pairs.items() if _forgets_scale(modules[norm], modules[name], in_evaluation)}


def _forgets_scale(norm: Any, layer: Any, in_evaluation: bool) -> bool:
    is_linear = isinstance(layer, nn.Linear)
    if norm.num_features != (layer.out_features if is_linear else layer.out_channels):
        return False  # it normalises another dimension
    if is_linear and type(norm) not in OF_ROWS:
        return False
    is_frozen = (layer.training or in_evaluation) and not norm.training and norm.running_mean is not None
    return not is_frozen
