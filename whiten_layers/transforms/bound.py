"""Limit on the length of a transformed gradient: one that is longer than usual is mixed and shortened."""

import math

import torch
from torch import Tensor

from ..statistics.gradient_norms import GradientNorms, Measurement


def shorten(
    plain: Tensor, mapped: Tensor, measured: Measurement, norms: GradientNorms, mix: bool, is_longer: Tensor | bool
) -> Tensor:
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
        is_longer: whether ‖Ĝ‖ is beyond the limit: True where that was read, or a tensor (), where nothing is read.
    """
    norm, mapped_norm, limit, mixed_from = measured.norm, measured.mapped_norm, norms.limit, norms.mixed_from
    if isinstance(is_longer, Tensor):
        return _shortened_by_tensors(plain, mapped, norm, mapped_norm, limit, mixed_from, mix, is_longer)
    own = float(norm), float(measured.product()), float(mapped_norm)
    return _shortened_by_numbers(plain, mapped, *own, float(limit), float(mixed_from), mix)


def _shortened_by_numbers(
    plain: Tensor,
    mapped: Tensor,
    norm: float,
    product: float,
    mapped_norm: float,
    limit: float,
    mixed_from: float,
    mix: bool,
) -> Tensor:
    """Shorten a gradient that is longer than the limit.

    Where a norm is out of range, no length can be kept: a gradient whose entries are finite becomes zero.
    """
    try:
        part = min(mixed_from / mapped_norm, 1.0) if mix else 1.0
        part = part * part
        # Squared norm of the mixture and norm that is allowed, relative to ‖G‖, so that no square is out of range
        share, rest = part * mapped_norm / norm, 1 - part
        mixed = share * share + 2 * part * rest * (product / norm / norm) + rest * rest
        allowed = limit / norm
        length = min(max(allowed, math.sqrt(allowed)) / math.sqrt(mixed), 1.0)
    except (ArithmeticError, ValueError):  # where tensors give an Inf or a NaN
        return mapped * 0.0
    length = 0.0 if math.isnan(length) else length
    return mapped * length if part == 1 else torch.lerp(plain, mapped, part).mul_(length)


def _shortened_by_tensors(
    plain: Tensor,
    mapped: Tensor,
    norm: Tensor,
    mapped_norm: Tensor,
    limit: Tensor,
    mixed_from: Tensor,
    mix: bool,
    is_longer: Tensor,
) -> Tensor:
    """Do the same without reading a number, and return the gradient as it is where it is not longer.

    Here each operation of numbers is a kernel of its own, so the mixture's norm is measured, and not computed. Where
    ‖Ĝ‖ alone is out of range, that is the plain gradient's, which is left, shortened.
    """
    if mix:
        part = (mixed_from / mapped_norm).clamp_(max=1).square_()
        mapped = torch.lerp(plain, mapped, torch.where(is_longer, part, 1))
        mapped_norm = torch.linalg.vector_norm(mapped)
    allowed = limit / norm
    length = torch.maximum(allowed, allowed.sqrt()).mul_(norm).div_(mapped_norm).clamp_(max=1).nan_to_num_(nan=0)
    return mapped * torch.where(is_longer, length, 1)
