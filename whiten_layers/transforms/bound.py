"""Limit on the length of a transformed gradient: one that is longer than usual is mixed and shortened."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..statistics.gradient_norms import GradientNorms, Measurement


def shorten(plain: Tensor, mapped: Tensor, measured: Measurement, norms: GradientNorms, mix: bool) -> Tensor:
    """Mix a transformed gradient beyond the limit with the plain one, and shorten it; return others as they are.

    Near the largest stable learning rate a few long gradients follow each other, and grow. What ends that is the plain
    gradient's component in the strong directions, which whitening suppresses. So ``a Ĝ + (1 − a) G`` is taken, with
    ``a = (mixed_from / ‖Ĝ‖)²``: the longer the gradient, the more of the plain one. The square leaves ordinary
    gradients nearly as they are. The norm is then shortened to the limit, or, where the plain gradient is beyond the
    limit itself, to the geometric mean of ``‖G‖`` and the limit: gradients that grow because training needs it must not
    be held back.

    Args:
        plain: G.
        mapped: Ĝ, of the same shape.
        measured: ‖G‖, ``⟨Ĝ, G⟩`` and ‖Ĝ‖.
        norms: the limit, and the norm from which to mix.
        mix: False to shorten only: before a normalization a long step lengthens W, and later ones turn it by less, so
            spikes end by themselves.
    """
    numbers: Any = measured.norm, measured.product(), measured.mapped_norm, norms.limit, norms.mixed_from
    if norms.limit.is_cpu:  # there they are read without waiting, and Python computes faster than thirty operations
        norm, product, mapped_norm, limit, mixed_from = map(float, numbers)
        return _shortened_by_numbers(plain, mapped, norm, product, mapped_norm, limit, mixed_from, mix)
    return _shortened_by_tensors(plain, mapped, *numbers, mix)


def _shortened_by_numbers(
    plain: Tensor,
    mapped: Tensor,
    norm: float,
    product: float,
    mapped_norm: float,
    limit: float,
    start: float,
    mix: bool,
) -> Tensor:
    if not mapped_norm > limit > 0:
        return mapped
    try:
        part, length = _mixture(norm, product, mapped_norm, limit, start, mix, 1.0, math.sqrt, min, max)
    except (ArithmeticError, ValueError):  # where tensors give an Inf or a NaN
        return mapped * 0.0
    length = 0.0 if math.isnan(length) else length
    return mapped * length if part == 1 else torch.lerp(plain, mapped, part).mul_(length)


def _shortened_by_tensors(plain: Tensor, mapped: Tensor, *numbers: Any) -> Tensor:
    *_, mapped_norm, limit, _, _ = numbers
    one, functions = torch.ones_like(limit), (torch.sqrt, torch.minimum, torch.maximum)
    part, length = _mixture(*(*numbers, one, *functions))
    is_longer = (mapped_norm > limit) & (limit > 0)
    part, length = torch.where(is_longer, part, 1), torch.where(is_longer, length.nan_to_num(nan=0), 1)
    return torch.lerp(plain, mapped, part) * length


def _mixture(
    norm: Any,
    product: Any,
    mapped_norm: Any,
    limit: Any,
    mixed_from: Any,
    mix: bool,
    one: Any,
    sqrt: Callable[..., Any],
    least: Callable[..., Any],
    most: Callable[..., Any],
) -> tuple[Any, Any]:
    """Compute a, and what a gradient beyond the limit, so mixed, is multiplied by: of numbers, or of tensors ().

    Where a norm is out of range, no length can be kept, and the second is a NaN: a gradient whose entries are finite is
    to become zero.
    """
    part = least(mixed_from / mapped_norm, one) if mix else one
    part = part * part
    # Squared norm of the mixture and norm that is allowed, relative to ‖G‖, so that no square is out of range
    share, rest = part * mapped_norm / norm, one - part
    mixed = share * share + 2 * part * rest * (product / norm / norm) + rest * rest
    allowed = limit / norm
    allowed = most(allowed, sqrt(allowed))
    return part, least(allowed / sqrt(mixed), one)
