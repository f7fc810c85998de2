"""Checking what a layer or a transform is asked for."""

import math
import numbers


def check(name: str, value: object, allowed: bool, choices: str) -> None:
    """Raise the ValueError of an option that is not allowed; it names the option, its value and the choices."""
    if not allowed:
        raise ValueError(f"{name}={value!r} is not possible: give {choices}")


def is_real(value: object) -> bool:
    """Whether a value is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def is_count(value: object) -> bool:
    """Whether a value is an integer of at least 1."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and int(value) >= 1
