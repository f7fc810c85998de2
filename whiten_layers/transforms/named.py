"""A transform from its name and its options."""

import copy
import difflib
import inspect
from typing import Any

from ..inverse import METHODS
from ..options import check
from .base import GradientTransform
from .gain import OptimalInputGain
from .whitening import FeatureWhitening


def make_transform(transform: GradientTransform | str | None, **options: Any) -> GradientTransform:
    """Make a new transform: a copy of the given one, the one of the given name, or the default, with options.

    A name is "optimal_gain", or an inverse method of `FeatureWhitening`.

    Raises:
        ValueError: the name is unknown, or an option has a value that is not allowed.
        TypeError: `transform` is neither a transform, a name nor None; it does not have an option; or there are options
            beside a transform that is made already.
    """
    if isinstance(transform, GradientTransform):
        if options:
            raise TypeError(f"{', '.join(options)}: give these options to the {type(transform).__name__} itself")
        return copy.deepcopy(transform)
    if transform is not None and not isinstance(transform, str):
        cure = f"{transform.__name__}()" if isinstance(transform, type) else "a GradientTransform, a name, or None"
        raise TypeError(f"transform={transform!r} is not possible: give {cure}")
    names = ("optimal_gain", "auto", *METHODS)
    is_known = transform is None or transform in names
    check("transform", transform, is_known, f"one of {', '.join(names)}, or a GradientTransform")
    kind = OptimalInputGain if transform == "optimal_gain" else FeatureWhitening
    if transform in METHODS:
        options = {"method": transform, **options}
    known = list(inspect.signature(kind).parameters)
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            cure = f"{near[0]!r}?" if near else f"one of {', '.join(known)}"
            raise TypeError(f"{name}: {kind.__name__} has no such option; {'did you mean' if near else 'give'} {cure}")
    return kind(**options)


def settings(transform: GradientTransform) -> list[tuple[type, dict[str, Any]]]:
    """List the kind and the options of each part of a transform."""
    found = []
    for part in transform.parts():
        names = inspect.signature(type(part)).parameters
        found.append((type(part), {name: getattr(part, name) for name in names if hasattr(part, name)}))
    return found
