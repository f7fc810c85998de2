"""Running statistics of averaged weights, for whitening normalizations too."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from .._torch.modules import AnyBatchNorm
from .base import WhiteningNorm


@torch.no_grad()
def update_bn(loader: Iterable[Any], model: nn.Module, device: torch.device | str | int | None = None) -> None:
    """Compute the running statistics of all batch and whitening normalizations anew, by one pass over a loader.

    It does what `torch.optim.swa_utils.update_bn` does for batch normalizations alone, with the same arguments: it is
    for the averaged weights of an `AveragedModel`. The matrix that a stochastic whitening normalization has learned
    stays, and takes a step at each batch, as in training.

    Args:
        loader: batches, each a tensor, or a tuple or list whose first element is the model's input.
        model: the model; all of it is in training mode meanwhile, and in its own mode afterwards.
        device: where batches are moved to; None to leave them.
    """
    modes = [(module, module.training) for module in model.modules()]
    norms: list[Any] = [module for module, _ in modes if isinstance(module, (AnyBatchNorm, WhiteningNorm))]
    momenta = [norm.momentum for norm in norms]
    try:
        model.train()
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # an average over all batches
        for batch in loader:
            input = batch[0] if isinstance(batch, list | tuple) else batch
            model(input if device is None else input.to(device))
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, mode in modes:
            module.training = mode
