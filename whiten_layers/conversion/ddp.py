"""What `DistributedDataParallel` does not know of whitened layers and normalizations, told to it when it takes a model.

By default it sends every buffer from rank 0 to all at every forward pass. Covariances and whitening matrices are the
same everywhere already and larger than anything else that is sent, so they are kept out; once, when the
model is taken, rank 0's state goes to all, as its parameters do. Statistics of whitened layers are then shared in
the wrapper's group of processes, unless `whiten` was given another.
"""

from collections.abc import Iterable
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.nn.parallel import DistributedDataParallel

from ..norm.base import WhiteningNorm
from ..refresh import collectives as distributed
from ..transforms.base import GradientTransform

_wrappers: WeakSet[DistributedDataParallel] = WeakSet()


def _on_registration(parent: nn.Module, name: str, module: nn.Module | None) -> None:
    if isinstance(parent, DistributedDataParallel) and name == "module" and module is not None:
        _wrappers.add(parent)
        _take(parent, module)


def take_again(transforms: Iterable[GradientTransform]) -> None:
    """Tell the wrappers that took a model before its layers were whitened."""
    whitened = set(transforms)
    for wrapper in list(_wrappers):
        if not whitened.isdisjoint(wrapper.module.modules()):
            _take(wrapper, wrapper.module)


def _take(wrapper: DistributedDataParallel, module: nn.Module) -> None:
    group = wrapper.process_group
    kept = {name: child for name, child in module.named_modules() if _keeps_itself_equal(child, group)}
    for prefix, one in kept.items():
        if isinstance(one, GradientTransform):
            one.clock.processes.wrapper = group
        elif isinstance(one, WhiteningNorm):
            one.processes.wrapper = group
        for name, child in one.named_modules(prefix=prefix):  # a window is None now, and will not always be
            wrapper.parameters_to_ignore |= {f"{name}.{buffer}" for buffer in child._buffers}
        for buffer in one.buffers():
            buffer._ddp_ignored = True  # type: ignore[attr-defined]  # nor is it cast by DDP's mixed precision
    if kept and dist.get_world_size(group) > 1:
        _broadcast(kept, group)


def _keeps_itself_equal(module: nn.Module, group: "dist.ProcessGroup") -> bool:
    """Whether a module's buffers are the same in every process of a group by its own doing."""
    if isinstance(module, WhiteningNorm):
        return module.synchronize and module.processes.are_all_of(group)
    return isinstance(module, GradientTransform)


@torch.no_grad()
def _broadcast(kept: dict[str, nn.Module], group: "dist.ProcessGroup") -> None:
    """Give every process the state that the first has."""
    transforms = [one for one in kept.values() if isinstance(one, GradientTransform)]
    for transform in transforms:
        for average in transform.averages():
            average.window = None  # what one process alone has observed
    distributed.agree("take on", [f"{name} ({_described(one)})" for name, one in kept.items()], [], group)
    state = list({id(buffer): buffer for one in kept.values() for buffer in one.buffers()}.values())
    if transforms:
        state.append(torch.stack([one.get_extra_state() for one in transforms]).to(state[0].device))
    dist._broadcast_coalesced(group, state, 250 * 2**20, 0)  # in buckets, as DDP does it
    if transforms:
        for transform, count in zip(transforms, state[-1].cpu(), strict=True):
            transform.set_extra_state(count)


def _described(one: nn.Module) -> str:
    if isinstance(one, GradientTransform):
        return ", ".join(map(str, one.averages()))
    return f"{type(one).__name__}, {', '.join(str(tuple(buffer.shape)) for buffer in one.buffers())}"


if dist.is_available():
    register_module_module_registration_hook(_on_registration)
