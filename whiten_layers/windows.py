"""Saving and loading what one process has observed since the last refresh, which a state dict leaves out."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .statistics.covariance import FeatureCovariance, Moments

WINDOW = tuple(f"window_{part}" for part in ("count", "mean", "covariance"))


def _statistics(model: nn.Module) -> dict[str, FeatureCovariance]:
    return {name: module for name, module in model.named_modules() if isinstance(module, FeatureCovariance)}


def window_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Copy what a model's whitened layers have observed, in this process, since their last refresh.

    A state dict holds the state of the last refresh, which all processes share. Together with the windows, one set for
    each process, training resumes bit for bit at any step, also where statistics are taken more often than inverses
    are refreshed.

    Returns:
        Tensors by the names of the buffers, such as ``"layer1.transform.inputs.window_mean"``; none of a layer that
        has observed nothing new.
    """
    state: dict[str, Tensor] = {}
    for name, one in _statistics(model).items():
        if one.window is not None:
            state |= {f"{name}.{key}": part.clone() for key, part in zip(WINDOW, one.window, strict=True)}
    return state


@torch.no_grad()
def load_window_state_dict(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give a model's whitened layers the windows of `window_state_dict`, after its state dict has been loaded.

    A layer that is not in it has observed nothing.

    Raises:
        ValueError: there is a tensor that belongs to no statistics of the model, or of another shape; or one that is
            missing beside others of a window. Nothing is changed then.
    """
    windows: dict[str, Moments | None] = {}
    left, statistics = dict(state), _statistics(model)
    for name, one in statistics.items():
        parts = [left.pop(f"{name}.{key}", None) for key in WINDOW]
        wanted = (one.running_count, one.running_mean, one.running_covariance)
        for key, part, like in zip(WINDOW, parts, wanted, strict=True):
            if part is None and any(other is not None for other in parts):
                raise ValueError(f"{name}.{key} is missing: a window has {', '.join(WINDOW)}")
            if part is not None and part.shape != like.shape:
                raise ValueError(f"{name}.{key} of shape {tuple(part.shape)} is not possible: give {tuple(like.shape)}")
        given = [part.to(like, copy=True) for part, like in zip(parts, wanted, strict=True) if part is not None]
        windows[name] = Moments(*given) if given else None
    if left:
        raise ValueError(f"{', '.join(left)}: the model has no such statistics; it has {', '.join(windows) or 'none'}")
    for name, one in statistics.items():
        one.window = windows[name]
