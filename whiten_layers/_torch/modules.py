"""Access to the inside of `nn.Module`: notice of tensors that move or are loaded, and the parts of a module."""

import sys
from collections.abc import Collection, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.modules.batchnorm import _BatchNorm as AnyBatchNorm  # BatchNorm1d, 2d, 3d and SyncBatchNorm

from ..state import safe_to_load

__all__ = [
    "AnyBatchNorm",
    "StatefulModule",
    "WideBuffers",
    "adopt",
    "become",
    "buffer_names",
    "has_forward_hooks",
    "holds_parameter",
    "name_in_keys",
    "own_parameter",
]


class StatefulModule(nn.Module):
    """A module that is told when its tensors are moved or cast, and when a checkpoint is loaded into it.

    Subclasses implement those of the hooks below that they need; here they do nothing. PyTorch's own way is to
    extend the private methods `_apply`, `_load_from_state_dict` and `_replicate_for_data_parallel`.
    """

    hidden_children: ClassVar[tuple[str, ...]] = ()
    """Names of child modules that `children` shows to PyTorch alone: other tools, which count operations or draw
    summaries, take a module without children for a layer, and look into one that has some."""

    keeps_its_tensors: ClassVar[bool] = False
    """Tells whether a load copies into the module's own tensors even with ``assign=True``. An assigned tensor would
    bring its own device, and perhaps fewer than 32 bits."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        safe_to_load(cls)

    def is_traced(self, input: Proxy) -> bool:
        """Tell whether `torch.fx`, whose proxy came, traces a model that has this module: `note_call` is to follow.

        Raises:
            RuntimeError: in training mode, it traces this module alone, or a part that has hooks.
        """
        name, is_whole = type(self).__name__, getattr(input.tracer, "root", None) is self
        trains = self.training or getattr(self, "in_evaluation", False)
        if is_whole and trains:
            raise RuntimeError(f"torch.fx cannot trace a {name} alone in training mode: trace a model that has it")
        has_hooks = has_forward_hooks(self)  # called here already, with proxies, and not once more by the layer
        if has_hooks and trains:
            raise RuntimeError(f"torch.fx cannot trace a {name} that has forward hooks in training mode: remove them")
        return not (is_whole or has_hooks)

    def note_call(self, input: Proxy, *others: Any, **options: Any) -> Any:
        """Put a call of this module into the graph that `torch.fx` traces, as the tracer does with PyTorch's modules.

        Their classes it knows by the name of the package. A graph of what is inside would be that of one mode, and of
        a plain layer in evaluation mode, which would then train without a word.
        """
        tracer: Any = input.tracer
        return tracer.create_proxy("call_module", tracer.path_of_module(self), (input, *others), options)

    def before_moving(self) -> Any:
        """Return what `after_moving` needs to know, before `to`, `half`, `to_empty` and the like."""

    def after_moving(self, before: Any) -> None:
        """React to `to`, `half`, `to_empty` and the like, given the result of `before_moving`."""

    def before_loading(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Prepare for a load from a state dict, which may be changed; the module's keys in it have this prefix."""

    def after_loading(self, assigned: bool) -> None:
        """React to a load; `assigned` tells whether it was one with ``assign=True``."""

    def before_replicating(self) -> None:
        """React to `nn.DataParallel`, which copies modules at each forward pass if there are several devices."""

    def _replicate_for_data_parallel(self):  # type: ignore[no-untyped-def]
        self.before_replicating()
        return super()._replicate_for_data_parallel()

    def children(self) -> Iterator[nn.Module]:
        caller = sys._getframe(1).f_globals.get("__name__", "")
        hidden = () if caller.partition(".")[0] == "torch" else self.hidden_children
        return (child for name, child in self.named_children() if name not in hidden)

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        before = self.before_moving()
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

    def before_moving(self) -> dict[str, Tensor | None]:
        return dict(self._buffers)

    def after_moving(self, before: dict[str, Tensor | None]) -> None:
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.is_floating_point() and torch.finfo(new.dtype).bits < 32:
                self._buffers[name] = old.to(new.device, torch.float32)


def buffer_names(module: nn.Module) -> list[str]:
    """List the names of a module's own buffers, also of those that are None now."""
    return list(module._buffers)


def name_in_keys(name: str) -> str:
    """Return a module's name as the keys of a state dict have it: without what wrappers of checkpoints and FSDP add."""
    return name.replace("_checkpoint_wrapped_module.", "").replace("_fsdp_wrapped_module.", "")


def own_parameter(module: nn.Module, name: str) -> nn.Parameter | None:
    """Return the parameter that a module holds under a name; None where there is none, or it is computed when read."""
    return module._parameters.get(name)


def holds_parameter(module: nn.Module, name: str) -> bool:
    """Tell whether a module holds a parameter, or None for one, under a name, and does not compute it when read."""
    return name in module._parameters


def has_forward_hooks(module: nn.Module) -> bool:
    """Tell whether something is called before or after a module's forward pass."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def adopt(module: nn.Module, other: nn.Module, replaced: Collection[str]) -> None:
    """Turn a module into one of another's class in place, with its buffers instead of those whose names are replaced.

    The module keeps all attributes that it has, its parameters among them, and takes the other's where it has none.
    """
    kept = {name: buffer for name, buffer in module._buffers.items() if name not in replaced}
    missing = {name: value for name, value in vars(other).items() if name not in vars(module)}
    vars(module).update(missing, _buffers={**other._buffers, **kept})
    module.__class__ = type(other)


def become(old: nn.Module, new: nn.Module) -> None:
    """Turn a module into another in place, keeping its hooks: whatever refers to the old object goes on doing so."""
    hooks = {name: value for name, value in vars(old).items() if "hook" in name}
    vars(old).clear()
    vars(old).update({**vars(new), **hooks})
    old.__class__ = type(new)
