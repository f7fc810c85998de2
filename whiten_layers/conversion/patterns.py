"""Selection of a model's layers by glob patterns of their names."""

import fnmatch
from collections.abc import Iterable
from typing import Any


def pattern_list(patterns: str | Iterable[str] | None) -> list[str] | None:
    """Turn one pattern or several into a list; None stays None."""
    return [patterns] if isinstance(patterns, str) else None if patterns is None else list(patterns)


def check_patterns(option: str, patterns: list[str], layers: Iterable[str], what: str) -> None:
    """Raise a ValueError that names the option, the pattern and the layers, if a pattern matches no layer."""
    for pattern in patterns:
        if not fnmatch.filter(layers, pattern):
            raise ValueError(f"{option}={pattern!r} matches no {what}: there are {', '.join(layers) or 'none'}")


def chosen_layers(layers: dict[str, Any], include: list[str] | None, skip: list[str] | None, what: str) -> set[int]:
    """Return the ids of the layers to convert. A shared layer is skipped if any of its names is."""
    check_patterns("include", include or [], layers, what)
    check_patterns("skip", skip or [], layers, what)
    included = {id(module) for name, module in layers.items() if include is None or matches(name, include)}
    return included - {id(module) for name, module in layers.items() if matches(name, skip)}


def matches(name: str, patterns: list[str] | None) -> bool:
    """Tell whether a name matches one of the patterns."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns or [])
