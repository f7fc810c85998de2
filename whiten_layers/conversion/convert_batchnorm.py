"""Conversion of a model's batch normalizations to normalizations that whiten."""

import logging
from typing import Any, TypeVar

import torch
from torch import nn

from .._torch.modules import AnyBatchNorm, adopt
from ..norm import (
    DecorrelatedBatchNorm1d,
    DecorrelatedBatchNorm2d,
    DecorrelatedBatchNorm3d,
    IterNorm1d,
    IterNorm2d,
    IterNorm3d,
    StochasticWhiteningBatchNorm1d,
    StochasticWhiteningBatchNorm2d,
    StochasticWhiteningBatchNorm3d,
)
from ..options import check, check_model
from .patterns import Selection, chosen_layers

logger = logging.getLogger("whiten_layers")

M = TypeVar("M", bound=nn.Module)

BATCHNORM_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
NORMS: dict[str, dict[type[nn.Module], Any]] = {
    "iter_norm": {nn.BatchNorm1d: IterNorm1d, nn.BatchNorm2d: IterNorm2d, nn.BatchNorm3d: IterNorm3d},
    "decorrelated": {
        nn.BatchNorm1d: DecorrelatedBatchNorm1d,
        nn.BatchNorm2d: DecorrelatedBatchNorm2d,
        nn.BatchNorm3d: DecorrelatedBatchNorm3d,
    },
    "swbn": {
        nn.BatchNorm1d: StochasticWhiteningBatchNorm1d,
        nn.BatchNorm2d: StochasticWhiteningBatchNorm2d,
        nn.BatchNorm3d: StochasticWhiteningBatchNorm3d,
    },
}


def convert_batchnorm(
    model: M,
    kind: str,
    *,
    include: Selection = None,
    skip: Selection = None,
    **options: Any,
) -> M:
    """Convert every `nn.BatchNorm1d`, 2d and 3d of a model to a normalization that whitens, in place.

    Each layer stays the same object with the same parameters, and keeps its momentum, eps, mode, device and dtype. It
    also keeps its running statistics, so a trained model evaluates as before: the covariance of the channels is taken
    to be diagonal until a training batch updates it.

    Args:
        model: any module, or a single layer.
        kind: "iter_norm", "decorrelated" or "swbn".
        include: what to convert: names, as glob patterns of `model.named_modules()`, modules with all within them, or
            types of modules; one or several. None for all.
        skip: what to leave as it is.
        options: options of the normalization's class, such as ``group_size=32`` or ``criterion="frobenius"``.

    Returns:
        `model`. Subclasses are left as they are, and so is `nn.SyncBatchNorm`, which does not know its number of
        dimensions. Layers that were left are logged to "whiten_layers" at level INFO; that none can be converted is a
        warning. Load a plain network's checkpoint before converting.

    Raises:
        ValueError: `kind` is unknown, or a pattern matches no batch normalization.
        TypeError: `model` is no module, or something to select by is neither name, module nor type.
    """
    check_model(model)
    check("kind", kind, kind in NORMS, f"one of {', '.join(NORMS)}")
    modules = model.named_modules(remove_duplicate=False)
    layers = {name: module for name, module in modules if type(module) in NORMS[kind]}
    chosen = chosen_layers(model, layers, include, skip, "batch normalization")
    shared = {id(layer): layer for layer in layers.values() if id(layer) in chosen}  # each layer once
    with torch.inference_mode(False):  # the statistics are written to in training, whatever is on here
        made = [(layer, NORMS[kind][type(layer)].like(layer, **options)) for layer in shared.values()]
    for layer, ours in made:
        adopt(layer, ours, BATCHNORM_BUFFERS)
    left = {name: module for name, module in model.named_modules() if isinstance(module, AnyBatchNorm)}
    if left and not layers:
        kinds = ", ".join(sorted({type(module).__name__ for module in left.values()}))
        cure = "convert before nn.SyncBatchNorm.convert_sync_batchnorm, which whitening normalizations do not need"
        logger.warning("none of %d batch normalizations can be converted, of %s: %s", len(left), kinds, cure)
    for name, module in left.items():
        asked = type(module) in NORMS[kind]
        reason = "not asked for" if asked else "a subclass, or one that does not know its number of dimensions"
        logger.info("left %s: %s, %s", name or "the model", type(module).__name__, reason)
    return model
