"""Limit on the length of a transformed gradient: one that is longer than usual is mixed and shortened."""

import torch
from torch import Tensor

from ..statistics.gradient_norms import GradientNorms


def shorten(
    plain: Tensor, mapped: Tensor, norm: Tensor, product: Tensor, mapped_norm: Tensor, norms: GradientNorms, mix: bool
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
        norm: ‖G‖ ().
        product: ``⟨Ĝ, G⟩`` ().
        mapped_norm: ‖Ĝ‖ ().
        norms: the limit, and the norm from which to mix.
        mix: False to shorten only: before a normalization a long step lengthens W, and later ones turn it by less, so
            spikes end by themselves.
    """
    limit = norms.limit
    part = (norms.mixed_from / mapped_norm).clamp(max=1).square() if mix else torch.ones_like(norm)
    # Squared norm of the mixture and norm that is allowed, relative to ‖G‖, so that no square is out of range
    mixed = (part * mapped_norm / norm).square() + 2 * part * (1 - part) * (product / norm / norm) + (1 - part).square()
    allowed = limit / norm
    allowed = torch.maximum(allowed, allowed.sqrt())
    is_longer = (mapped_norm > limit) & (limit > 0)
    part = torch.where(is_longer, part, 1)
    # Where a norm is out of range, no length can be kept: a gradient whose entries are finite becomes zero.
    shortened = torch.where(is_longer, (allowed / mixed.sqrt()).clamp(max=1).nan_to_num(nan=0), 1)
    return torch.lerp(plain, mapped, part) * shortened
