"""Access to the inside of `nn.Module`: notice of tensors that move or are loaded, and the parts of a module."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as AnyBatchNorm  # BatchNorm1d, 2d, 3d and SyncBatchNorm

__all__ = [
    "AnyBatchNorm",
    "StatefulModule",
    "WideBuffers",
    "become",
    "buffer_names",
    "has_forward_hooks",
    "holds_parameter",
    "own_parameter",
]


class StatefulModule(nn.Module):
    """A module that is told when its tensors are moved or cast, and when a checkpoint is loaded into it.

    Subclasses extend `after_moving`, `before_loading` and `after_loading`, which do nothing here, where PyTorch's own
    way is to extend the private methods `_apply` and `_load_from_state_dict`.
    """

    keeps_its_tensors: ClassVar[bool] = False
    """Tells whether a load copies into the module's own tensors even with ``assign=True``. An assigned tensor would
    bring its own device, and perhaps fewer than 32 bits."""

    def after_moving(self, before: dict[str, Tensor]) -> None:
        """Called after `to`, `half`, `to_empty` and their kin, with the buffers from before, the children's too."""

    def before_loading(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Called before a load, with a state dict that may be changed and the prefix of the module's keys in it."""

    def after_loading(self, assigned: bool) -> None:
        """Called after a load; `assigned` tells whether it was one with ``assign=True``."""

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        before = dict(self.named_buffers())
        super()._apply(fn, recurse)
        self.after_moving(before)
        return self

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):  # type: ignore[no-untyped-def]
        self.before_loading(state_dict, prefix)
        if self.keeps_its_tensors:
            local_metadata = {**local_metadata, "assign_to_params_buffers": False}
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
        self.after_loading(bool(local_metadata.get("assign_to_params_buffers")))


class WideBuffers(StatefulModule):
    """A module whose own floating-point buffers keep 32 bits or more when it is cast to a narrower type."""

    def after_moving(self, before: dict[str, Tensor]) -> None:
        for name in buffer_names(self):
            new = getattr(self, name)
            if name in before and new.is_floating_point() and torch.finfo(new.dtype).bits < 32:
                setattr(self, name, before[name].to(new.device, torch.float32))


def buffer_names(module: nn.Module) -> list[str]:
    """List the names of a module's own buffers, also of those that are None now."""
    return list(module._buffers)


def own_parameter(module: nn.Module, name: str) -> nn.Parameter | None:
    """Return the parameter that a module holds under a name; None where there is none, or it is computed when read."""
    return module._parameters.get(name)


def holds_parameter(module: nn.Module, name: str) -> bool:
    """Tell whether a module holds a parameter, or None for one, under a name, and does not compute it when read."""
    return name in module._parameters


def has_forward_hooks(module: nn.Module) -> bool:
    """Tell whether something is called before or after a module's forward pass."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def become(old: nn.Module, new: nn.Module) -> None:
    """Turn a module into another in place, keeping its hooks: whatever refers to the old object goes on doing so."""
    hooks = {name: value for name, value in vars(old).items() if "hook" in name}
    vars(old).clear()
    vars(old).update({**vars(new), **hooks})
    old.__class__ = type(new)
