"""Full float32 products, whatever the user's global setting."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def full_precision() -> Iterator[None]:
    """Multiply float32 matrices in float32 inside this context, not in TF32 or bf16.

    TF32 keeps ten bits of a mantissa, too few for a covariance or its inverse. The setting is the
    process's own and is put back afterwards.
    """
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    if hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        name, exact = "fp32_precision", "ieee"
    else:  # torch < 2.9 has one switch a device
        name, exact = "allow_tf32", False
        backends = backends[:1]
    before = [getattr(backend, name) for backend in backends]
    try:
        for backend in backends:
            setattr(backend, name, exact)
        yield
    finally:
        for backend, value in zip(backends, before, strict=True):
            setattr(backend, name, value)
