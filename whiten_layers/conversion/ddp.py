"""Support for whitened layers and normalizations in a model that `DistributedDataParallel` wraps.

By default, the wrapper broadcasts every buffer from rank 0 at every forward pass. Covariances and whitening matrices
are already the same on all ranks, and larger than anything else that is sent, so they are excluded. Rank 0's state is
broadcast only once, when the model is wrapped, as the parameters are. From then on, whitened layers share their
statistics in the wrapper's process group, unless `whiten` was given another.
"""

from collections.abc import Iterable
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.nn.parallel import DistributedDataParallel

from .._torch.distributed import allows_uneven_inputs, broadcast_in_buckets, exclude_from_ddp
from .._torch.modules import buffer_names
from ..norm.base import WhiteningNorm
from ..processes import ProcessGroup
from ..refresh.collectives import check_ranks_agree
from ..refresh.schedule import running_statistics
from ..transforms.base import GradientTransform

_wrappers: WeakSet[DistributedDataParallel] = WeakSet()
_refusing: WeakSet[DistributedDataParallel] = WeakSet()  # those with the hook below


def _on_registration(parent: nn.Module, name: str, module: nn.Module | None) -> None:
    # The compiler traces this call for modules of its own, whose attributes cannot be read yet.
    if torch.compiler.is_compiling() or name != "module" or module is None:
        return
    if isinstance(parent, DistributedDataParallel):
        _wrappers.add(parent)
        _exclude(parent, module)


def exclude_from_wrappers(transforms: Iterable[GradientTransform]) -> None:
    """Exclude the state of transforms from wrappers that wrapped a model before its layers were whitened."""
    whitened = set(transforms)
    for wrapper in list(_wrappers):
        if not whitened.isdisjoint(wrapper.module.modules()):
            _exclude(wrapper, wrapper.module)


def _exclude(wrapper: DistributedDataParallel, module: nn.Module) -> None:
    group = wrapper.process_group
    excluded = {name: child for name, child in module.named_modules() if _keeps_itself_equal(child, group)}
    for prefix, one in excluded.items():
        if isinstance(one, GradientTransform):
            one.schedule.processes.wrapper = group
        elif isinstance(one, WhiteningNorm):
            one.processes.wrapper = group
        # Includes the buffers of a window, which may be None now but not later.
        names = [f"{name}.{own}" for name, child in one.named_modules(prefix=prefix) for own in buffer_names(child)]
        exclude_from_ddp(wrapper, names, one.buffers())
    if excluded and dist.get_world_size(group) > 1:
        _broadcast(excluded, group)
        if wrapper not in _refusing:
            wrapper.register_forward_pre_hook(_refuse_join)
            _refusing.add(wrapper)


def _refuse_join(wrapper: nn.Module, args: object) -> None:
    """Raise where whitened layers or normalizations train inside a wrapper's ``join()``, which would hang.

    Processes without batches there answer the messages of the wrapper alone, not those about statistics.
    """
    assert isinstance(wrapper, DistributedDataParallel)
    if not (wrapper.training and allows_uneven_inputs(wrapper)):
        return
    if any(_keeps_itself_equal(module, wrapper.process_group) for module in wrapper.module.modules()):
        raise RuntimeError(
            "DistributedDataParallel.join() cannot train whitened layers or normalizations: a process that has no more "
            "batches would keep the others waiting for its statistics. Give each process the same number of batches "
            "(DistributedSampler does), without join() or with join(enable=False)"
        )


def _keeps_itself_equal(module: nn.Module, group: ProcessGroup) -> bool:
    """Tell whether a module itself keeps its buffers the same in every process of a group."""
    if isinstance(module, WhiteningNorm):
        return module.synchronize and module.processes.include(group)
    return isinstance(module, GradientTransform)


@torch.no_grad()
def _broadcast(excluded: dict[str, nn.Module], group: ProcessGroup) -> None:
    """Give every process the state of the group's first process."""
    transforms = [one for one in excluded.values() if isinstance(one, GradientTransform)]
    for transform in transforms:
        for statistics in running_statistics(transform):
            statistics.window = None  # observed by this process alone
    check_ranks_agree("take on", [f"{name} ({_described(one)})" for name, one in excluded.items()], [], group)
    state = list({id(buffer): buffer for one in excluded.values() for buffer in one.buffers()}.values())
    if transforms:
        state.append(torch.stack([one.get_extra_state() for one in transforms]).to(state[0].device))
    broadcast_in_buckets(state, group)
    if transforms:
        for transform, count in zip(transforms, state[-1].cpu(), strict=True):
            transform.set_extra_state(count)


def _described(one: nn.Module) -> str:
    if isinstance(one, GradientTransform):
        return ", ".join(map(str, running_statistics(one)))
    return f"{type(one).__name__}, {', '.join(str(tuple(buffer.shape)) for buffer in one.buffers())}"


if dist.is_available():
    register_module_module_registration_hook(_on_registration)
