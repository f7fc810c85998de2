"""Conversion of a model's layers to their whitened twins, and back."""

import sys
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from ..layers import PLAIN, TWINS, attach, layers_of, twin_of, why_not
from ..options import check, check_model
from ..processes import ProcessGroup
from ..refresh.schedule import Schedule
from ..transforms import Chain, GradientTransform, PSIScaling
from ..transforms.named import are_alike, make_transform
from .ddp import exclude_from_wrappers
from .messages import tell_share, warn_of_costly, warn_of_kept
from .patterns import Selection, chosen_layers, selected, selectors
from .scale_invariance import scale_invariant

M = TypeVar("M", bound=nn.Module)
WHAT = "layer that can be whitened"


def whiten(
    model: M,
    transform: GradientTransform | str | None = None,
    *,
    include: Selection = None,
    skip: Selection = None,
    psi: bool | Selection = False,
    in_evaluation: bool | None = None,
    process_group: ProcessGroup | None = None,
    **options: Any,
) -> M:
    """Turn every linear and (transposed) convolutional layer, and every attention, into its whitened twin, in place.

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
            assumed to be temporary, unless `in_evaluation` is True. `torch.fx` traces the pass in the model's current
            mode, with optional arguments at their defaults; hooks are ignored.
        in_evaluation: whiten the chosen layers in evaluation mode too, as far as their weights train: for networks that
            are trained in that mode, to freeze their normalizations. By default a layer in evaluation mode is the plain
            one; None leaves it as it is in a layer that is whitened already.
        process_group: the processes that share statistics and the work of a refresh, if `torch.distributed` runs. None
            for those of the `DistributedDataParallel` that wraps the model, or else all.
        options: options of the transform's class, such as ``power=1``, if `transform` is a name or None.

    Returns:
        `model`. Modules that look like layers but were left are logged, with the reason, to "whiten_layers" at level
        INFO, after a line of how many were whitened, which is a warning where they have less than half of the
        parameters that train and no choice was asked for. Layers whose refresh takes more than 10¹² operations (by
        default none does, but for whole patches of many channels) are named in one warning; `estimate` tells what each
        layer costs.

    Raises:
        ValueError: a pattern matches no layer that could be converted; or, with ``psi=True``, the model cannot be
            traced or has no such layer. Nothing has been converted then.
        TypeError: `model` is no module; an option is unknown; or something to select by is neither name, module nor
            type.
    """
    is_switch = in_evaluation is None or isinstance(in_evaluation, bool)
    check("in_evaluation", in_evaluation, is_switch, "True, False or None")
    with torch.inference_mode(False), torch.no_grad():  # the state is written to in training, whatever is on here
        kept = convert(model, transform, include, skip, psi, process_group, options, in_evaluation)
    if transform is not None or options or psi:
        warn_of_kept(kept)
    warn_of_costly(model)
    tell_share(model, include is None and skip is None)
    return model


def convert(
    model: nn.Module,
    transform: GradientTransform | str | None,
    include: Selection,
    skip: Selection,
    psi: bool | Selection,
    process_group: ProcessGroup | None,
    options: dict[str, Any],
    in_evaluation: bool | None = None,
) -> list[str]:
    """Do what `whiten` does, without a word.

    Returns:
        If all that was chosen was whitened before, the names of those that are whitened in another way than is asked
        for now.
    """
    check_model(model)
    transform = make_transform(transform, ("include", "skip", "psi", "in_evaluation", "process_group"), **options)
    if "transformers.pytorch_utils" in sys.modules:
        from .. import hugging_face  # noqa: F401 - registers its twin
    if "torchvision.models.video.resnet" in sys.modules:
        from .. import torchvision_video  # noqa: F401 - registers its twins
    modules = model.named_modules(remove_duplicate=False)
    layers: dict[str, Any] = {
        name: module for name, module in modules if type(module) in TWINS or type(module) in PLAIN
    }
    chosen = chosen_layers(model, layers, include, skip, WHAT)
    outer = [module for module in layers.values() if id(module) in chosen and not why_not(module)]
    called = {id(inner) for module in outer for inner in twin_of(module).inner_layers(module)}
    chosen -= {id(module) for module in layers.values() if twin_of(module).is_inner} - called
    scaled = _scaled(model, layers, psi, bool(in_evaluation))
    has_converted, kept = False, []
    for name, module in layers.items():
        if id(module) not in chosen or why_not(module):
            continue
        if in_evaluation is not None:
            module.in_evaluation = in_evaluation
        given = Chain(transform, PSIScaling()) if id(module) in scaled else transform
        if type(module) in PLAIN:  # perhaps just now, under a shared layer's other name
            kept += [] if are_alike(module.transform, given) else [name or "the model"]
            continue
        attach(module, given)
        module.__class__ = TWINS[type(module)]
        has_converted = True
    transforms: dict[GradientTransform, str] = {
        part: name for name, layer in layers_of(model).items() for part in layer.transform.parts()
    }
    for part, name in transforms.items():
        part.name = name
    Schedule(process_group).join(transforms)
    exclude_from_wrappers(transforms)
    return [] if has_converted else kept


def unwhiten(model: M) -> M:
    """Turn every whitened layer back into the plain one, in place, keeping objects and parameters.

    Raises:
        ValueError: a layer's class was derived from a whitened one, for instance by a parametrization.
        TypeError: `model` is no module.
    """
    check_model(model)
    for name, module in layers_of(model).items():
        if type(module) not in PLAIN:
            cure = "unwhiten the layer before"
            if is_parametrized(module):
                cure = "remove its parametrizations first (torch.nn.utils.parametrize.remove_parametrizations)"
            raise ValueError(f"{name or 'the model'} is a {type(module).__name__}, made from a whitened layer: {cure}")
    for module in model.modules():
        if type(module) in PLAIN:
            del module.transform, module.bound_to
            vars(module).pop("in_evaluation", None)
            module.__class__ = PLAIN[type(module)]
    return model


def _scaled(model: nn.Module, layers: dict[str, Any], psi: bool | Selection, in_evaluation: bool) -> set[int]:
    """Return the ids of the layers that are named, or of those in front of a norm that cancels their scale."""
    if not isinstance(psi, bool):
        return selected("psi", selectors("psi", psi) or [], model, layers, WHAT)
    if not psi:
        return set()
    cure = "name the layers, as in psi=['layer1.*']"
    try:
        names = scale_invariant(model, (*TWINS, *PLAIN), in_evaluation)
    except ValueError as error:
        raise ValueError(f"psi=True is not possible, since {error}: {cure}") from error
    if not names:
        raise ValueError(f"psi=True finds no layer whose output goes to a normalization per channel alone: {cure}")
    return {id(layers[name]) for name in names}
