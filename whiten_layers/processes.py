"""Groups of processes that share statistics."""

from collections.abc import Callable
from typing import Any, Self

import torch.distributed as dist
from torch import Tensor

from .state import safe_to_load

if dist.is_available():
    from torch.distributed import ProcessGroup
else:

    class ProcessGroup:  # type: ignore[no-redef]
        """Placeholder for torch's class where PyTorch was built without distributed training: it has no objects."""


__all__ = ["ProcessGroup", "Processes", "on_whole"]


@safe_to_load
class Processes:
    """The processes of a group that was given, or of the wrapper that took the model, or all.

    A copy has the same group; pickling forgets it, since groups cannot be pickled.
    """

    def __init__(self, given: ProcessGroup | None = None) -> None:
        self.given = given
        self.wrapper: ProcessGroup | None = None

    def group(self) -> ProcessGroup | None:
        """Return the processes' group; None where this process is alone."""
        if not (dist.is_available() and dist.is_initialized()):
            return None
        group = self.given or self.wrapper or dist.group.WORLD
        return group if dist.get_world_size(group) > 1 else None

    def include(self, group: ProcessGroup) -> bool:
        """Tell whether every process of the wrapper's group is among these."""
        if self.given is None:
            return True
        return set(dist.get_process_group_ranks(group)) <= set(dist.get_process_group_ranks(self.given))

    def default_to(self, other: "Processes") -> None:
        """Take the groups that are not known here from others."""
        self.given, self.wrapper = self.given or other.given, self.wrapper or other.wrapper

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        copied = type(self)()
        copied.default_to(self)
        return copied

    def __getstate__(self) -> dict[str, Any]:
        return {"given": None, "wrapper": None}


def on_whole(function: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """Apply a function to a tensor; to a sharded one (a `DTensor`) as a whole in every process, sharded again."""
    if not hasattr(tensor, "full_tensor"):
        return function(tensor)
    from torch.distributed.tensor import DTensor, Replicate

    assert isinstance(tensor, DTensor)
    mesh, placements = tensor.device_mesh, tensor.placements
    whole = DTensor.from_local(function(tensor.full_tensor()), mesh, [Replicate()] * mesh.ndim, run_check=False)
    return whole.redistribute(placements=placements)
