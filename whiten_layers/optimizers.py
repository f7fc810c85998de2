"""Warning of an optimizer that transformed gradients mislead.

LBFGS estimates the curvature of the loss from how its gradient changes along a step. A transformed gradient is no
function's gradient, and from one refresh to the next it changes while the loss does not.
"""

import warnings
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from .autograd import whitened_layers


def _before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    if not isinstance(optimizer, torch.optim.LBFGS):
        return
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if any(id(parameter) in trained for layer in whitened_layers() for parameter in layer.parameters()):
        warnings.warn(
            "LBFGS trains whitened layers, and may diverge: it estimates the curvature of the loss from changes of the "
            "gradient, which whitening transforms. Call whiten_layers.unwhiten(model) first.",
            stacklevel=2,
        )


register_optimizer_step_pre_hook(_before_step)
