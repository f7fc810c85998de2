"""Hooks of an optimizer's step, which scale gradients as a whole for a transform that asks for it, and warn of LBFGS.

LBFGS estimates the curvature of the loss from how its gradient changes along a step. A transformed gradient is no
function's gradient, and from one refresh to the next it changes while the loss does not.
"""

import warnings
from collections.abc import Iterable
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from ._torch.modules import own_parameter
from ._torch.precision import full_precision, without_autocast
from .autograd import whitened_layers
from .processes import on_whole
from .transforms import GradientTransform


class _Scaled(NamedTuple):
    """A weight whose gradient is scaled while its optimizer steps."""

    weight: nn.Parameter
    plain: Tensor
    scaled: Tensor


_scaled: WeakKeyDictionary[torch.optim.Optimizer, dict[int, _Scaled]] = WeakKeyDictionary()  # by the weight's id


def _before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> Any:
    # Little code, since a compiled step traces it, and others compile theirs whole.
    if GradientTransform.any_scales or isinstance(optimizer, torch.optim.LBFGS):
        return _prepare(optimizer, args, kwargs)
    return None


@torch.compiler.disable
def _prepare(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> Any:
    """Warn of LBFGS; scale gradients now, or in the closure that computes them: what a hook before a step returns."""
    layers = whitened_layers()
    scaling = [layer for layer in layers if layer.transform.scales_at_step]
    is_lbfgs = isinstance(optimizer, torch.optim.LBFGS)
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if is_lbfgs and any(id(parameter) in trained for layer in layers for parameter in layer.parameters()):
        warnings.warn(
            "LBFGS trains whitened layers, and may diverge: it estimates the curvature of the loss from changes of the "
            "gradient, which whitening transforms. Call whiten_layers.unwhiten(model) first.",
            stacklevel=2,
        )
    weights: dict[int, tuple[nn.Parameter, list[GradientTransform]]] = {}
    for layer in scaling:
        weight = own_parameter(layer, layer.parameter_names[0])
        if weight is not None and id(weight) in trained:
            weights.setdefault(id(weight), (weight, []))[1].append(layer.transform)
    if not weights:
        return None
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    if not callable(closure):
        _scale(optimizer, weights.values())
        return None

    def scaled_closure() -> Any:
        _restore(optimizer)
        loss = closure()
        _scale(optimizer, weights.values())
        return loss

    if "closure" in kwargs:
        return args, {**kwargs, "closure": scaled_closure}
    return (args[0], scaled_closure, *args[2:]), kwargs


@torch.no_grad()
def _scale(optimizer: torch.optim.Optimizer, weights: Iterable[tuple[nn.Parameter, list[GradientTransform]]]) -> None:
    """Put scaled gradients in the place of the plain ones, which are kept.

    Of layers that share a weight each scales the whole gradient, by which it counts its steps; the last one's is taken.
    """
    _restore(optimizer)
    kept = _scaled[optimizer] = {}
    factor = getattr(optimizer, "grad_scale", None)  # of the loss, where the optimizer divides by it while it steps
    with full_precision():
        for weight, transforms in weights:
            plain = weight.grad
            # An optimizer around this one, which steps too, has done it.
            done = any(plain is known[id(weight)].scaled for known in _scaled.values() if id(weight) in known)
            if plain is None or done:
                continue
            with without_autocast(plain.device):
                for transform in transforms:
                    scaled = on_whole(transform.scale_at_step, plain if factor is None else plain / factor)
            weight.grad = scaled if factor is None else scaled * factor
            kept[id(weight)] = _Scaled(weight, plain, weight.grad)


@torch.compiler.disable
def _restore(optimizer: torch.optim.Optimizer) -> None:
    for weight, plain, scaled in _scaled.pop(optimizer, {}).values():
        if weight.grad is scaled:
            weight.grad = plain


def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    if GradientTransform.any_scales:
        _restore(optimizer)


register_optimizer_step_pre_hook(_before_step)
register_optimizer_step_post_hook(_after_step)
