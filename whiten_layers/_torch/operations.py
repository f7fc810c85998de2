"""Marks of custom operations, where the installed version of PyTorch knows them."""

from typing import Any

import torch

# For operations whose effects a recorded CUDA graph would not repeat.
NOT_IN_CUDA_GRAPHS: dict[str, Any] = (
    {"tags": [torch.Tag.cudagraph_unsafe]} if hasattr(torch.Tag, "cudagraph_unsafe") else {}
)


def keep_order(operation: Any) -> None:
    """Let a compiler run every call of a custom operation, in the order of the calls.

    It would otherwise merge equal calls and move others about. PyTorch 2.6 has no such mark.
    """
    if hasattr(operation, "register_effect"):
        operation.register_effect(torch.library.EffectType.ORDERED)
