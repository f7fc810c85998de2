"""State dicts of another content than `nn.Module`'s: plain weights, and what was observed since the last refresh."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ._torch.modules import name_in_keys
from .statistics.covariance import FeatureCovariance
from .transforms.base import GradientTransform


def plain_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return a model's state dict without what its whitened layers keep: that of the plain model, which loads anywhere.

    The model stays whitened. As in `state_dict`, the tensors are the model's own, and not copies. For whatever saves
    weights for others to read: ``model.save_pretrained(path, state_dict=plain_state_dict(model))``.
    """
    state: dict[str, Tensor] = model.state_dict()
    modules = model.named_modules(remove_duplicate=False)
    own = tuple(f"{name_in_keys(name)}." for name, module in modules if isinstance(module, GradientTransform))
    for key in [key for key in state if key.startswith(own)]:
        del state[key]
    return state


def _statistics(model: nn.Module) -> dict[str, FeatureCovariance]:
    return {name: module for name, module in model.named_modules() if isinstance(module, FeatureCovariance)}


def window_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Copy what a model's whitened layers have observed, in this process, since their last refresh.

    A state dict holds the state of the last refresh, which all processes share. Together with the windows, one set for
    each process, training resumes bit for bit at any step, also where statistics are taken more often than inverses
    are refreshed.

    Returns:
        Tensors by name, such as ``"layer1.transform.inputs.window_mean"``; none of a layer that has observed nothing
        new. Rows whose moments have not been computed yet are among them as they are.
    """
    statistics = _statistics(model).items()
    return {f"{name}.{key}": part.clone() for name, one in statistics for key, part in one.open_window().items()}


@torch.no_grad()
def load_window_state_dict(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give a model's whitened layers the windows of `window_state_dict`, after its state dict has been loaded.

    A layer that is not in it has observed nothing.

    Raises:
        ValueError: there is a tensor that belongs to no statistics of the model, or of another shape; or one that is
            missing beside others of a window. Nothing is changed then.
    """
    statistics = _statistics(model)
    before = {name: one.open_window() for name, one in statistics.items()}
    given: dict[str, dict[str, Tensor]] = {name: {} for name in statistics}
    for key, part in state.items():
        name, _, own = key.rpartition(".")
        if name not in given:
            known = ", ".join(statistics) or "none"
            raise ValueError(f"{key}: the model has no such statistics; it has {known}")
        given[name][own] = part
    try:
        for name, one in statistics.items():
            one.restore_window(given[name])
    except ValueError as error:
        for other, window in before.items():
            statistics[other].restore_window(window)
        raise ValueError(f"{name}.{error}") from error
