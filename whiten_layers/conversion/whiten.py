"""Conversion of a model's layers to their whitened twins, and back."""

import logging
import warnings
from typing import Any, TypeVar

from torch import nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized

from .._torch.modules import own_parameter
from ..layers import PLAIN, TWINS, attach
from ..options import check_model
from ..processes import ProcessGroup
from ..refresh.schedule import Schedule
from ..refresh.update import cost
from ..transforms import Chain, GradientTransform, PSIScaling
from ..transforms.named import make_transform, settings
from .ddp import exclude_from_wrappers
from .patterns import Selection, chosen_layers, selected, selectors
from .scale_invariance import scale_invariant

logger = logging.getLogger("whiten_layers")

M = TypeVar("M", bound=nn.Module)
WHAT = "layer that can be whitened"
COSTLY = 10**12  # operations of a refresh of one layer: a minute or two on a CPU core


def whiten(
    model: M,
    transform: GradientTransform | str | None = None,
    *,
    include: Selection = None,
    skip: Selection = None,
    psi: bool | Selection = False,
    process_group: ProcessGroup | None = None,
    **options: Any,
) -> M:
    """Turn every linear and (transposed) convolutional layer of a model into its whitened twin, in place.

    Each layer stays the same object with the same parameters, so optimizers, hooks, references, device, dtype and
    training mode are as before. A shared module is converted once. Layers that are already whitened keep their
    transform and its state. From then on all whitened layers of the model stay in sync: the number of the model's
    backward pass decides what is due.

    Args:
        model: any module, or a single layer.
        transform: the transform that each layer gets a copy of, as for `WhitenedLinear`.
        include: what to convert: names, as glob patterns of `model.named_modules()` ("layer1.*"), modules with all
            within them (``model.layer1``), or types of modules; one or several. None for all.
        skip: what to leave as it is.
        psi: which of the converted layers get ``Chain(transform, PSIScaling())`` instead of `transform`: glob patterns
            and the like as for `include`, or True for all layers whose rows may be rescaled without changing what the
            model computes. A forward pass must call such a layer once, its parameters must be used nowhere else, and
            its output must go only to one norm, called once. The norm must normalise each channel separately
            (`nn.BatchNorm1d`, 2d, 3d, `nn.SyncBatchNorm`, `nn.InstanceNorm1d`, 2d, 3d,
            `StochasticWhiteningBatchNorm1d`, 2d, 3d, but no subclass), and its ``num_features`` must be the number of
            the layer's outputs. A linear layer's norm must be a `nn.BatchNorm1d`, a `nn.SyncBatchNorm` or a
            `StochasticWhiteningBatchNorm1d`, and its inputs must be rows: given sequences, these norms normalise along
            another dimension, and True is wrong if both dimensions have the same size. Other whitening norms do not
            count, since their output changes with the channels' scales. Nor does a frozen norm: one in evaluation mode,
            with running statistics, while the layer is in training mode. If both are in evaluation mode, that is
            assumed to be temporary. `torch.fx` traces the pass in the model's current mode, with optional arguments at
            their defaults; hooks are ignored.
        process_group: the processes that share statistics and the work of a refresh, if `torch.distributed` runs. None
            for those of the `DistributedDataParallel` that wraps the model, or else all.
        options: options of the transform's class, such as ``power=1``, if `transform` is a name or None.

    Returns:
        `model`. Modules that look like layers but were left are logged, with the reason, to "whiten_layers" at level
        INFO, after a line of how many were whitened, which is a warning where they have less than half of the
        parameters and no choice was asked for. Layers whose refresh takes more than 10¹² operations (with the default
        `block_size` none does) are named in one warning; `estimate` tells what each layer costs.

    Raises:
        ValueError: a pattern matches no layer that could be converted; or, with ``psi=True``, the model cannot be
            traced or has no such layer. Nothing has been converted then.
        TypeError: `model` is no module; an option is unknown; or something to select by is neither name, module nor
            type.
    """
    check_model(model)
    is_given = transform is not None or bool(options)
    transform = make_transform(transform, **options)
    modules = model.named_modules(remove_duplicate=False)
    layers = {name: module for name, module in modules if type(module) in TWINS or type(module) in PLAIN}
    chosen = chosen_layers(model, layers, include, skip, WHAT)
    scaled = _scaled(model, layers, psi)
    if is_given:
        _warn_of_kept({name: layer for name, layer in layers.items() if id(layer) in chosen}, transform)
    for module in layers.values():
        # Already whitened (perhaps just now, under a shared layer's other name), not chosen, or without any feature.
        if type(module) in PLAIN or id(module) not in chosen or module.weight.numel() == 0:
            continue
        twin = TWINS[type(module)]
        given = Chain(transform, PSIScaling()) if id(module) in scaled else transform
        attach(module, twin.geometry(module), given)
        module.__class__ = twin
    twins: dict[str, Any] = {name: module for name, module in model.named_modules() if isinstance(module, tuple(PLAIN))}
    transforms: dict[GradientTransform, str] = {
        part: name for name, layer in twins.items() for part in layer.transform.parts()
    }
    for part, name in transforms.items():
        part.name = name
    Schedule(process_group).join(transforms)
    exclude_from_wrappers(transforms)
    _warn_of_costly(twins)
    _tell_share(model, layers, include is None and skip is None)
    for name, reason in reasons_left(model).items():
        logger.info("left %s: %s", name, reason)
    return model


def _warn_of_kept(layers: dict[str, Any], transform: GradientTransform) -> None:
    """Warn of a call that changes nothing, though it asks for another transform than the layers have."""
    if not all(type(layer) in PLAIN for layer in layers.values()):
        return
    kept = [name or "the model" for name, one in layers.items() if settings(one.transform) != settings(transform)]
    if kept:
        cure = "unwhiten(model) first to change it"
        warnings.warn(f"whitened already, and kept as they were: {_listed(kept)}: {cure}", stacklevel=3)


def _tell_share(model: nn.Module, layers: dict[str, Any], is_all: bool) -> None:
    """Log how much of a model is whitened."""
    numbers = {id(parameter): parameter.numel() for parameter in model.parameters() if not is_lazy(parameter)}
    whitened = {id(layer): layer for layer in layers.values() if type(layer) in PLAIN}
    parts = {id(p) for layer in whitened.values() for p in layer.parameters()}
    share = sum(number for key, number in numbers.items() if key in parts) / (sum(numbers.values()) or 1)
    others = {id(module) for module in model.modules() if _reason_left(module)}
    level = logging.WARNING if share < 0.5 and is_all and numbers else logging.INFO
    total = len(whitened) + len(others)
    logger.log(level, "whitened %d of %d layers, %.0f %% of the parameters", len(whitened), total, 100 * share)


def _warn_of_costly(layers: dict[str, Any]) -> None:
    costly = {}
    for name, layer in layers.items():
        factors = [factor for part in layer.transform.parts() for factor in part.factors()]
        operations = sum(map(cost, factors))
        if operations > COSTLY:
            widest = max(factor.running_mean.shape[1] for factor in factors)
            costly[name or "the model"] = f"{widest} features, {operations:.0e} operations"
    if costly:
        named = _listed([f"{name} ({what})" for name, what in costly.items()])
        cure = 'give FeatureWhitening a smaller block_size, features="kronecker", or method="recursive"'
        warnings.warn(f"a refresh of these layers takes long: {named}: {cure}", stacklevel=3)


def _listed(names: list[str]) -> str:
    """List the first five of some names, and say how many more there are."""
    return ", ".join([*names[:5], f"and {len(names) - 5} more"] if len(names) > 5 else names)


def unwhiten(model: M) -> M:
    """Turn every whitened layer back into the plain one, in place, keeping objects and parameters.

    Raises:
        ValueError: a layer's class was derived from a whitened one, for instance by a parametrization.
        TypeError: `model` is no module.
    """
    check_model(model)
    made: dict[str, Any] = {name: module for name, module in model.named_modules() if isinstance(module, tuple(PLAIN))}
    for name, module in made.items():
        if type(module) not in PLAIN:
            cure = "unwhiten the layer before"
            if is_parametrized(module):
                cure = "remove its parametrizations first (torch.nn.utils.parametrize.remove_parametrizations)"
            raise ValueError(f"{name or 'the model'} is a {type(module).__name__}, made from a whitened layer: {cure}")
    for module in model.modules():
        if type(module) in PLAIN:
            del module.transform
            module.__class__ = PLAIN[type(module)]
    return model


def _scaled(model: nn.Module, layers: dict[str, Any], psi: bool | Selection) -> set[int]:
    """Return the ids of the layers that are named, or of those in front of a norm that cancels their scale."""
    if not isinstance(psi, bool):
        return selected("psi", selectors("psi", psi) or [], model, layers, WHAT)
    if not psi:
        return set()
    cure = "name the layers, as in psi=['layer1.*']"
    try:
        names = scale_invariant(model, (*TWINS, *PLAIN))
    except ValueError as error:
        raise ValueError(f"psi=True is not possible, since {error}: {cure}") from error
    if not names:
        raise ValueError(f"psi=True finds no layer whose output goes to a normalization per channel alone: {cure}")
    return {id(layers[name]) for name in names}


def is_lazy(parameter: object) -> bool:
    """Tell whether a parameter has no shape yet."""
    return isinstance(parameter, UninitializedParameter)


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
        return "not asked for" if module.weight.numel() else "without any feature"
    if isinstance(module, nn.MultiheadAttention):
        return "whose projections are used as functions, not as layers"
    if isinstance(module, nn.Embedding):
        return "whose covariance is diagonal: what an adaptive optimizer does already"
    for plain in TWINS:
        if isinstance(module, plain):
            lazy = is_lazy(own_parameter(module, "weight"))
            return "not initialised yet" if lazy else f"a subclass of nn.{plain.__name__}, which may compute otherwise"
    names = [name for name, parameter in module.named_parameters(recurse=False) if parameter.dim() > 1]
    return f"which has parameters of its own: {', '.join(names)}" if names else None
