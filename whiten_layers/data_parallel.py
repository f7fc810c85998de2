"""What `DistributedDataParallel` does not know of whitened layers, told to it when it takes a model.

By default it sends every buffer from rank 0 to all at every forward pass. Covariances are the same
everywhere already and larger than anything else that is sent, so they are kept out; once, when the
model is taken, rank 0's state goes to all, as its parameters do. Statistics are then shared in
the wrapper's group of processes, unless `whiten` was given another.
"""

from collections import defaultdict

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.nn.parallel import DistributedDataParallel

from .transforms.base import GradientTransform


def _on_registration(parent: nn.Module, name: str, module: nn.Module | None) -> None:
    if isinstance(parent, DistributedDataParallel) and name == "module" and module is not None:
        transforms = {key: child for key, child in module.named_modules() if isinstance(child, GradientTransform)}
        for prefix, transform in transforms.items():
            for key, child in transform.named_modules(prefix=prefix):  # windows are None now, not always
                parent.parameters_to_ignore |= {f"{key}.{buffer}" for buffer in child._buffers}
            transform.clock.process_group = transform.clock.process_group or parent.process_group
        if transforms and dist.get_world_size(parent.process_group) > 1:
            _broadcast(list(transforms.values()), parent.process_group)


@torch.no_grad()
def _broadcast(transforms: list[GradientTransform], group: "dist.ProcessGroup") -> None:
    """Give every process the state that the first has."""
    device = transforms[0].num_batches_skipped.device
    counts = torch.stack([transform.get_extra_state() for transform in transforms]).to(device)
    buckets: dict[tuple, list[Tensor]] = defaultdict(list)
    for transform in transforms:
        for factor in transform.factors():
            factor.window = None  # what one process alone has observed
        for buffer in transform.buffers():
            buckets[buffer.dtype, buffer.device].append(buffer)
    buckets[counts.dtype, counts.device].append(counts)
    for bucket in buckets.values():
        flat = torch.cat([tensor.flatten() for tensor in bucket])
        dist.broadcast(flat, dist.get_global_rank(group, 0), group=group)
        for tensor, part in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
            tensor.copy_(part.view_as(tensor))
    for transform, state in zip(transforms, counts.cpu(), strict=True):
        transform.set_extra_state(state)


if dist.is_available():
    register_module_module_registration_hook(_on_registration)
