"""Checks for the options of layers and transforms."""

import math
import numbers

from torch import nn


def check(name: str, value: object, allowed: bool, choices: str) -> None:
    """Raise a ValueError that names the option, its value and the choices, unless the value is allowed."""
    if not allowed:
        raise ValueError(f"{name}={value!r} is not possible: give {choices}")


def is_real(value: object) -> bool:
    """Tell whether a value is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def is_count(value: object) -> bool:
    """Tell whether a value is an integer of at least 1."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and int(value) >= 1


def check_statistics(
    decay: object,
    update_interval: object,
    statistics_interval: object,
    max_rows: object,
    *,
    automatic: bool = False,
) -> None:
    """Check the options common to all transforms with running statistics, of which two may be "auto" in some."""
    auto = ("auto",) if automatic else ()
    check("decay", decay, is_real(decay) and 0 <= decay < 1, "a number in [0, 1)")  # type: ignore[operator]
    choices = "an integer of at least 1"
    for name, interval in [("update_interval", update_interval), ("statistics_interval", statistics_interval)]:
        check(name, interval, is_count(interval) or interval in auto, choices + (", or 'auto'" if automatic else ""))
    is_limit = max_rows is None or is_count(max_rows) or max_rows in auto
    check("max_rows", max_rows, is_limit, choices + (", 'auto'" if automatic else "") + ", or None")


def check_model(model: object) -> None:
    """Raise a TypeError, unless a model is a module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is of type {type(model).__name__}: give an nn.Module, the model itself")
