"""Custom operations and Functions: marks that the installed version of PyTorch may know, and quicker calls."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

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


def leave_unbound(function: Callable[..., Any]) -> None:
    """Spare calls of the ``forward`` of an autograd Function, which gets all arguments by position, some 75 µs.

    `Function.apply` binds its arguments to the signature of ``forward``, in case some have defaults. It takes 50 µs to
    find the signature, and 25 µs to bind to it.
    """
    signature = _Positional(list(inspect.signature(function).parameters.values()))
    setattr(function, "__signature__", signature)  # noqa: B010


class _Positional(inspect.Signature):
    def bind(self, *args: Any, **kwargs: Any) -> Any:
        return super().bind(*args, **kwargs) if kwargs else _Bound(args, {})


class _Bound(NamedTuple):
    """The part of an `inspect.BoundArguments` that `Function.apply` reads."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def apply_defaults(self) -> None:
        """Do nothing: there are no defaults."""
