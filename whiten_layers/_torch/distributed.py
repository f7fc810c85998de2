"""Access to the inside of process groups and of `DistributedDataParallel`."""

from collections.abc import Iterable
from datetime import timedelta

import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel


def timeout_of(group: "dist.ProcessGroup") -> timedelta:
    """Return how long a group's collectives wait for a process that does not come."""
    return group._get_backend(group._device_types[0]).options._timeout


def allows_uneven_inputs(wrapper: DistributedDataParallel) -> bool:
    """Tell whether a wrapper is inside its ``join()``, where processes may have different numbers of batches.

    It is so too after `join`, until ``join(enable=False)``: PyTorch goes on to ask the others in each forward pass.
    """
    return wrapper._join_config.enable


def exclude_from_ddp(wrapper: DistributedDataParallel, names: Iterable[str], buffers: Iterable[Tensor]) -> None:
    """Keep buffers out of a wrapper that takes a model: it then neither sends them nor casts them.

    Args:
        wrapper: the wrapper, before it has looked at the model's buffers.
        names: the buffers' names within the wrapped model, also of those that are None now.
        buffers: those that are there.
    """
    wrapper.parameters_to_ignore |= set(names)
    for buffer in buffers:
        buffer._ddp_ignored = True  # type: ignore[attr-defined]


def broadcast_in_buckets(tensors: list[Tensor], group: "dist.ProcessGroup") -> None:
    """Give every process the first one's values, in buckets of 250 MiB as `DistributedDataParallel` does it."""
    dist._broadcast_coalesced(group, tensors, 250 * 2**20, 0)
