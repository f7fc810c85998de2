"""Which processes share statistics, where there are several."""

from typing import TYPE_CHECKING, Any, Self

import torch.distributed as dist

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Processes:
    """Those that were asked for, or those of the wrapper that took the model, or all.

    A copy has the same; pickling, which groups do not bear, forgets them.
    """

    def __init__(self, given: "ProcessGroup | None" = None) -> None:
        self.given = given
        self.wrapper: ProcessGroup | None = None

    def group(self) -> "ProcessGroup | None":
        """Their group; None where this process is alone."""
        if not (dist.is_available() and dist.is_initialized()):
            return None
        group = self.given or self.wrapper or dist.group.WORLD
        return group if dist.get_world_size(group) > 1 else None

    def are_all_of(self, group: "ProcessGroup") -> bool:
        """Whether every process of a group is among them, if that is the wrapper's."""
        if self.given is None:
            return True
        return set(dist.get_process_group_ranks(group)) <= set(dist.get_process_group_ranks(self.given))

    def default_to(self, other: "Processes") -> None:
        """Take from others what is not known here."""
        self.given, self.wrapper = self.given or other.given, self.wrapper or other.wrapper

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        copied = type(self)()
        copied.default_to(self)
        return copied

    def __getstate__(self) -> dict[str, Any]:
        return {"given": None, "wrapper": None}
