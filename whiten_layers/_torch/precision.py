"""Matrix products in float32 at least, whatever the user's global setting or autocast asks for."""

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

_BACKENDS = (torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None))


def _fp32_precisions() -> list[str | None]:
    return [getattr(backend, "fp32_precision", None) for backend in _BACKENDS]  # None before torch 2.9


_lock = threading.Lock()
_users = 0
_before: tuple[str | None, list[str | None]] | None = None  # what the last user restores


@contextmanager
def full_precision() -> Iterator[None]:
    """Multiply float32 matrices in float32 inside this context, not in TF32 or bf16.

    TF32 keeps ten bits of a mantissa, too few for a covariance or its inverse. The setting is process-wide: of several
    threads in this context, the first changes it and the last restores it. If it is full already, nothing is changed.
    """
    global _users, _before
    with _lock:
        if _users == 0:
            _before = _raise_precision()
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0 and _before is not None:
                _restore_precision(*_before)


def _raise_precision() -> tuple[str | None, list[str | None]] | None:
    try:
        overall = torch.get_float32_matmul_precision()
    except RuntimeError:  # it was set for each backend, which this query does not support
        overall = None
    before = _fp32_precisions()
    if overall == "highest" and set(before) <= {None, "none", "ieee"}:
        return None
    torch.set_float32_matmul_precision("highest")
    return overall, before


def _restore_precision(overall: str | None, before: list[str | None]) -> None:
    if overall is not None:
        torch.set_float32_matmul_precision(overall)
    backend: Any
    for backend, value, now in zip(_BACKENDS, before, _fp32_precisions(), strict=True):
        if value != now:
            backend.fp32_precision = "none"  # inherit the overall setting; that may be all it had
            if backend.fp32_precision != value:
                backend.fp32_precision = value


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Return the dtype that autocast casts to on a device; None where it is off."""
    # Asking for the meta device raises. A graph of torch 2.6 cannot call `is_autocast_available` instead.
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Turn autocast off for a device: in an autocast block, a backward pass would run our products in its dtype."""
    return nullcontext() if autocast_dtype(device) is None else torch.autocast(device.type, enabled=False)


def full_precision_outside_graphs() -> AbstractContextManager:
    """Enter `full_precision`, except in a compiled graph, whose products are as precise as the setting says."""
    return nullcontext() if torch.compiler.is_compiling() else full_precision()
