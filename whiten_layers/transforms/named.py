"""A transform from its name and its options."""

import copy
import difflib
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..inverse import METHODS
from ..options import check
from .base import GradientTransform
from .eigenbasis import EigenbasisScaling
from .gain import OptimalInputGain
from .whitening import FeatureWhitening

KINDS: dict[str, type[GradientTransform]] = {"optimal_gain": OptimalInputGain, "eigenbasis": EigenbasisScaling}


def make_transform(
    transform: GradientTransform | str | None, others: Sequence[str] = (), **options: Any
) -> GradientTransform:
    """Make a new transform: a copy of the given one, the one of the given name, or the default, with options.

    A name is one of `KINDS`, or an inverse method of `FeatureWhitening`.

    Args:
        transform: a transform, a name, or None.
        others: names of the caller's own options, which a misspelled one may stand for.
        options: of the transform.

    Raises:
        ValueError: the name is unknown, or an option has a value that is not allowed.
        TypeError: `transform` is neither a transform, a name nor None; it does not have an option; or there are options
            beside a transform that is made already.
    """
    if transform is None or isinstance(transform, str):
        names = (*KINDS, "auto", *METHODS)
        is_known = transform is None or transform in names
        check("transform", transform, is_known, f"one of {', '.join(names)}, or a GradientTransform")
        kind: type[GradientTransform] = KINDS.get(transform or "", FeatureWhitening)
    elif isinstance(transform, GradientTransform):
        kind = type(transform)
    else:
        is_kind = isinstance(transform, type) and issubclass(transform, GradientTransform)
        cure = f"{transform.__name__}()" if is_kind else "a GradientTransform, a name, or None"
        raise TypeError(f"transform={transform!r} is not possible: give {cure}")
    known = [*inspect.signature(kind).parameters, *others]
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            cure = f"did you mean {near[0]!r}?" if near else f"give one of {', '.join(known)}"
            raise TypeError(f"{name}: there is no such option; {cure}")
    if isinstance(transform, GradientTransform):
        if options:
            raise TypeError(f"{', '.join(options)}: give these options to the {kind.__name__} itself")
        return copy.deepcopy(transform)
    if transform in METHODS:
        if "method" in options:
            raise TypeError(f"method: the transform's name, {transform!r}, is one already")
        options["method"] = transform
    return kind(**options)


def are_alike(first: GradientTransform, second: GradientTransform) -> bool:
    """Tell whether two transforms are of one kind and have the same options, in all their parts."""
    pairs = list(zip(first.parts(), second.parts(), strict=False))
    if len(first.parts()) != len(second.parts()) or any(type(one) is not type(other) for one, other in pairs):
        return False
    return all(
        _equal(getattr(one, name, None), getattr(other, name, None))
        for one, other in pairs
        for name in inspect.signature(type(one)).parameters
    )


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return isinstance(one, Tensor) and isinstance(other, Tensor) and torch.equal(one, other)
    return bool(one == other)
