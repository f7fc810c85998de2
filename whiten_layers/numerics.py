"""Full float32 products, whatever the user's global setting."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

_BACKENDS = (torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None))


def _fp32_precisions() -> list[str | None]:
    return [getattr(backend, "fp32_precision", None) for backend in _BACKENDS]  # None before torch 2.9


@contextmanager
def full_precision() -> Iterator[None]:
    """Multiply float32 matrices in float32 inside this context, not in TF32 or bf16.

    TF32 keeps ten bits of a mantissa, too few for a covariance or its inverse. The setting is the
    process's own and is put back afterwards; where it is full already, nothing is touched.
    """
    try:
        overall = torch.get_float32_matmul_precision()
    except RuntimeError:  # it was set for each backend, which this question does not understand
        overall = None
    before = _fp32_precisions()
    if overall == "highest" and set(before) <= {None, "none", "ieee"}:
        yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        if overall is not None:
            torch.set_float32_matmul_precision(overall)
        for backend, value, now in zip(_BACKENDS, before, _fp32_precisions(), strict=True):
            if value != now:
                setattr(backend, "fp32_precision", value)  # noqa: B010 - absent before torch 2.9


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Autocast off for a device: a backward pass inside an autocast block would run our products in its type."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
