"""Custom operations' marks, which the installed version of PyTorch may know, and a call that is quicker than many."""

from typing import Any

import torch

# For operations whose effects a recorded CUDA graph would not repeat.
NOT_IN_CUDA_GRAPHS: dict[str, Any] = (
    {"tags": [torch.Tag.cudagraph_unsafe]} if hasattr(torch.Tag, "cudagraph_unsafe") else {}
)


def is_exporting() -> bool:
    """Tell whether `torch.export` is at work; False where PyTorch, as 2.6, does not tell."""
    return hasattr(torch.compiler, "is_exporting") and torch.compiler.is_exporting()


def keep_order(operation: Any) -> None:
    """Let a compiler run every call of a custom operation, in the order of the calls.

    It would otherwise merge equal calls and move others about. PyTorch 2.6 has no such mark.
    """
    if hasattr(operation, "register_effect"):
        operation.register_effect(torch.library.EffectType.ORDERED)


def copy_each(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    """Copy tensors into others of the same shapes, all in one call."""
    torch._foreach_copy_(targets, sources)
