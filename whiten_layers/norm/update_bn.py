"""Running statistics of averaged or frozen weights, for whitening normalizations too."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import swa_utils

from .base import WhiteningNorm


class _WithBatchNorm(nn.Module):
    """A model beside a batch normalization, without one of which PyTorch's function does nothing."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.norm = model, nn.BatchNorm1d(1)

    def forward(self, *inputs: Any) -> Any:
        return self.model(*inputs)


def update_bn(loader: Iterable[Any], model: nn.Module, device: torch.device | str | int | None = None) -> None:
    """Compute the running statistics of every batch and whitening normalization anew, by one pass over a loader.

    What `torch.optim.swa_utils.update_bn` does for batch normalizations alone, with the same arguments; used for the
    averaged weights of an `AveragedModel`. The matrix that a stochastic whitening normalization has learned stays, and
    takes a step at each batch, as in training.

    Args:
        loader: batches, each a tensor, or a tuple or list whose first element is the model's input.
        model: in either mode; it is left in that mode.
        device: where batches are moved to; None to leave them.
    """
    norms = [module for module in model.modules() if isinstance(module, WhiteningNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # an average over all batches
    was_training = model.training
    try:
        swa_utils.update_bn(loader, _WithBatchNorm(model), device)  # type: ignore[arg-type]
    finally:
        model.train(was_training)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
