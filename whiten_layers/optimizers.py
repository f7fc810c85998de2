"""Warning of an optimizer that transformed gradients mislead.

LBFGS estimates the curvature of the loss from how its gradient changes along a step. A transformed gradient is no
function's gradient, and from one refresh to the next it changes while the loss does not.
"""

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from .autograd import whitened_layers

_hooks: list[Any] = []


def watch_optimizers() -> None:
    """Have every `torch.optim.LBFGS` warn, before a step, if it trains a whitened layer."""
    if not _hooks:
        _hooks.append(register_optimizer_step_pre_hook(_before_step))


def _before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    if isinstance(optimizer, torch.optim.LBFGS) and _trains_any(optimizer, whitened_layers()):
        warnings.warn(
            "LBFGS trains whitened layers, and may diverge: it estimates the curvature of the loss from changes of the "
            "gradient, which whitening transforms. Call whiten_layers.unwhiten(model) first.",
            stacklevel=2,
        )


def _trains_any(optimizer: torch.optim.Optimizer, layers: Iterable[nn.Module]) -> bool:
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return any(id(parameter) in trained for layer in layers for parameter in layer.parameters())
