"""Messages of `whiten`: how much it whitened, which modules it left and why, and which layers will take long."""

import logging
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList

from .._torch.modules import own_parameter
from ..layers import PLAIN, TWINS, layers_of, why_not
from ..refresh.update import cost
from ..transforms import GradientTransform

logger = logging.getLogger("whiten_layers")

COSTLY = 10**12  # operations of a refresh of one layer: a minute or two on a CPU core


def share_of(model: nn.Module, layers: Iterable[Any]) -> float:
    """Compute the part of a model's parameters that train, or of all if none does, that some whitened layers have."""
    known = [parameter for parameter in model.parameters() if not is_lazy(parameter)]
    known = [parameter for parameter in known if parameter.requires_grad] or known
    numbers = {id(parameter): parameter.numel() for parameter in known}
    parts = {id(parameter) for layer in layers for parameter in layer.trained_parameters()}
    return sum(number for key, number in numbers.items() if key in parts) / (sum(numbers.values()) or 1)


def tell_share(model: nn.Module, is_all: bool) -> None:
    """Log how much of a model is whitened, and what was left and why.

    Less than half is a warning, if all of the model was asked for.
    """
    whitened, left = layers_of(model), reasons_left(model)
    share = share_of(model, whitened.values())
    has_parameters = any(not is_lazy(parameter) for parameter in model.parameters())
    level = logging.WARNING if share < 0.5 and is_all and has_parameters else logging.INFO
    numbered = len(whitened), len(whitened) + len(left)
    why = "; report(model).left says why" if level == logging.WARNING and left else ""
    logger.log(level, "whitened %d of %d layers, %.0f %% of the parameters that train%s", *numbered, 100 * share, why)
    for name, reason in left.items():
        logger.info("left %s: %s", name, reason)
    _tell_frozen(whitened)


def _tell_frozen(whitened: Mapping[str, Any]) -> None:
    """Log what whitening keeps for layers that do not train; a warning where that is more than half of all it keeps."""
    frozen = [name for name, layer in whitened.items() if not any(p.requires_grad for p in layer.trained_parameters())]
    if not frozen or len(frozen) == len(whitened):
        return
    kept = {name: sum(buffer.nbytes for buffer in layer.transform.buffers()) for name, layer in whitened.items()}
    size = sum(kept[name] for name in frozen)
    level = logging.WARNING if 2 * size > sum(kept.values()) else logging.INFO
    text = "frozen, and whitened all the same, at %.1f MiB: %s. If they stay so, call whiten(model, skip=[…]) instead"
    logger.log(level, text, size / 2**20, listed([name or "the model" for name in frozen]))


def warn_of_costly(model: nn.Module) -> None:
    """Warn of layers whose refresh takes long."""
    costly = {}
    for name, layer in layers_of(model).items():
        factors = [factor for part in layer.transform.parts() for factor in part.factors()]
        operations = sum(map(cost, factors))
        if operations > COSTLY:
            widest = max(factor.running_mean.shape[1] for factor in factors)
            costly[name or "the model"] = f"{widest} features, {operations:.0e} operations"
    if costly:
        named = listed([f"{name} ({what})" for name, what in costly.items()])
        cure = 'give FeatureWhitening a smaller block_size, features="kronecker", or method="recursive"'
        warnings.warn(f"a refresh of these layers takes long: {named}: {cure}", stacklevel=3)


def warn_of_kept(names: list[str]) -> None:
    """Warn of layers that a call leaves whitened in another way than it asks for."""
    if names:
        cure = "unwhiten(model) first to change it"
        warnings.warn(f"whitened already, and kept as they were: {listed(names)}: {cure}", stacklevel=3)


def listed(names: list[str]) -> str:
    """List the first five of some names, and say how many more there are."""
    return ", ".join([*names[:5], f"and {len(names) - 5} more"] if len(names) > 5 else names)


def reasons_left(model: nn.Module) -> dict[str, str]:
    """Return, by name, the plain modules that compute with a matrix of their own, and why they were left."""
    left = {}
    for name, module in model.named_modules():
        reason = _reason_left(module)
        if reason:
            left[name or "the model"] = f"{type(module).__name__}, {reason}"
    return left


def _reason_left(module: Any) -> str | None:
    if isinstance(module, (*PLAIN, GradientTransform, ParametrizationList)):
        return None
    if type(module) in TWINS:
        return why_not(module) or "not asked for"
    if isinstance(module, nn.Embedding):
        return "whose covariance is diagonal: what an adaptive optimizer does already"
    for plain in TWINS:
        if isinstance(module, plain):
            weight = own_parameter(module, "weight")
            lazy = weight is not None and is_lazy(weight)
            return "not initialised yet" if lazy else f"a subclass of {plain.__name__}, which may compute otherwise"
    own = [(name, part) for name, part in module.named_parameters(recurse=False) if not is_lazy(part)]
    names = [name for name, parameter in own if parameter.dim() > 1]
    return f"which has parameters of its own: {', '.join(names)}" if names else None
