"""Rules for state that is saved: of what type counts are, which classes may be loaded, what a load warns of."""

import warnings
from typing import TypeVar

import torch
from torch.serialization import add_safe_globals

COUNT = torch.float32
"""Type of the buffers that count. They are not integers, since scripts average, scale and halve whole state dicts."""


Kind = TypeVar("Kind", bound=type)


def safe_to_load(kind: Kind) -> Kind:
    """Let `torch.load` make objects of a class, also with its default ``weights_only=True``; for use as a decorator.

    A model that was saved whole needs it, as do the other classes that it is made of.
    """
    add_safe_globals([kind])
    return kind


def warn_of_loading(reason: str) -> None:
    """Warn that not all of a checkpoint is taken; of many layers once, since the text is the same."""
    warnings.warn(f"the whitening state of a checkpoint is not taken as it is: {reason}", stacklevel=2)
