"""What `DistributedDataParallel` does not know of whitened layers, told to it when it takes a model.

By default it sends every buffer from rank 0 to all at every forward pass. Covariances are the same
everywhere already and larger than anything else that is sent, so they are kept out; once, when the
model is taken, rank 0's state goes to all, as its parameters do. Statistics are then shared in
the wrapper's group of processes, unless `whiten` was given another.
"""

from collections.abc import Iterable
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.nn.parallel import DistributedDataParallel

from . import distributed
from .transforms.base import GradientTransform

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
    transforms = {name: child for name, child in module.named_modules() if isinstance(child, GradientTransform)}
    for prefix, transform in transforms.items():
        transform.clock.wrapper_group = wrapper.process_group
        for name, child in transform.named_modules(prefix=prefix):  # a window is None now, and will not always be
            wrapper.parameters_to_ignore |= {f"{name}.{buffer}" for buffer in child._buffers}
        for buffer in transform.buffers():
            buffer._ddp_ignored = True  # type: ignore[attr-defined]  # nor is it cast by DDP's mixed precision
    if transforms and dist.get_world_size(wrapper.process_group) > 1:
        _broadcast(transforms, wrapper.process_group)


@torch.no_grad()
def _broadcast(transforms: dict[str, GradientTransform], group: "dist.ProcessGroup") -> None:
    """Give every process the state that the first has."""
    described = [f"{name} ({', '.join(map(str, one.factors()))})" for name, one in transforms.items()]
    distributed.agree("take on", described, [], group)
    device = next(iter(transforms.values())).num_batches_skipped.device
    counts = torch.stack([transform.get_extra_state() for transform in transforms.values()]).to(device)
    for transform in transforms.values():
        for factor in transform.factors():
            factor.window = None  # what one process alone has observed
    # A transform that is part of another has its buffers in common with that one: they are sent once.
    state = list(dict.fromkeys(buffer for transform in transforms.values() for buffer in transform.buffers()))
    dist._broadcast_coalesced(group, [*state, counts], 250 * 2**20, 0)  # in buckets, as DDP does it
    for transform, count in zip(transforms.values(), counts.cpu(), strict=True):
        transform.set_extra_state(count)


if dist.is_available():
    register_module_module_registration_hook(_on_registration)
