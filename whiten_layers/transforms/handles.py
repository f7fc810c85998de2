"""Numbers that stand for gradient transforms in compiled graphs, which can hold tensors but no Python objects."""

import itertools
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

TRANSFORMS: WeakValueDictionary[int, Any] = WeakValueDictionary()  # by their numbers
_numbers = itertools.count(1)


def new_handle(transform: Any) -> Tensor:
    """Number a transform; return the number as a tensor on the CPU, so that one graph serves all layers alike."""
    number = next(_numbers)
    TRANSFORMS[number] = transform
    return torch.tensor(number, device="cpu")
