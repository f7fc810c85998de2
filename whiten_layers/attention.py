"""Multi-head attention whose projections are whitened.

The projections of a self-attention, ``(q, k, v) = W x + b`` with one weight for all three, are a linear layer, and so
is the one of the output. What is between them stays PyTorch's own.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.fx import Proxy

from ._torch.attention import OutProjection, attend, project_apart
from .layers import Whitened, WhitenedLinear, attach, register
from .options import check
from .statistics.patches import Geometry
from .transforms import GradientTransform


def _each(change: Callable[[Tensor], Tensor], query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    """Change all three tensors; those that are one tensor stay so."""
    changed = change(key)
    return changed if query is key else change(query), changed, changed if value is key else change(value)


class WhitenedOutProjection(WhitenedLinear, OutProjection):
    """`WhitenedLinear` that an attention ends with. The plain attention only reads its parameters."""

    is_inner = True

    @staticmethod
    def geometry(layer: Any) -> Geometry:
        return replace(WhitenedLinear.geometry(layer), positions_first=True)


class WhitenedMultiheadAttention(Whitened, nn.MultiheadAttention):
    """`nn.MultiheadAttention` whose projections' gradients are taken as if their inputs were whitened.

    The projections of query, key and value are whitened together, where all three are one tensor, as in a
    self-attention. Otherwise their gradients are plain, since then one weight has several inputs. The projection of the
    output, ``out_proj``, is always whitened, as a layer of its own.

    Args:
        embed_dim, …, dtype: as for `nn.MultiheadAttention`, but for `kdim` and `vdim`, which it has no weight of one
            piece with: they must be None or `embed_dim`.
        transform: as for `WhitenedLinear`.

    Shape: as for `nn.MultiheadAttention`.

    Raises:
        ValueError: `kdim` or `vdim` is another size than `embed_dim`.
    """

    parameter_names = ("in_proj_weight", "in_proj_bias")

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        transform: GradientTransform | str | None = None,
    ) -> None:
        for name, size in [("kdim", kdim), ("vdim", vdim)]:
            check(name, size, size in (None, embed_dim), f"None or embed_dim, {embed_dim}")
        options: tuple[Any, ...] = (dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype)
        super().__init__(embed_dim, num_heads, *options)
        attach(self, transform)
        attach(self.out_proj, transform)
        self.out_proj.__class__ = WhitenedOutProjection

    @staticmethod
    def geometry(layer: Any) -> Geometry:
        outputs, inputs = layer.in_proj_weight.shape
        return Geometry(inputs, outputs, has_bias=layer.in_proj_bias is not None, positions_first=True)

    @staticmethod
    def inner_layers(layer: Any) -> list[nn.Module]:
        return [layer.out_proj]

    @classmethod
    def why_not(cls, layer: Any) -> str | None:
        return "with a kdim or vdim of its own" if layer.in_proj_weight is None else super().why_not(layer)

    def trained_parameters(self) -> Iterator[nn.Parameter]:
        return (parameter for name, parameter in self.named_parameters() if "in_proj" in name)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        options: dict[str, Any] = {
            "key_padding_mask": key_padding_mask,
            "need_weights": need_weights,
            "attn_mask": attn_mask,
            "average_attn_weights": average_attn_weights,
            "is_causal": is_causal,
        }
        if isinstance(query, Proxy) and self.is_traced(query):
            return self.note_call(query, key, value, **options)
        if self.is_plain() or query.is_nested or key.is_nested or value.is_nested:  # an error in training
            return super().forward(query, key, value, **options)
        is_single = query.dim() == key.dim() == value.dim() == 2
        is_turned = self.batch_first and query.dim() == 3
        if is_single:
            query, key, value = _each(lambda tensor: tensor.unsqueeze(1), query, key, value)
            if key_padding_mask is not None:
                options["key_padding_mask"] = key_padding_mask.unsqueeze(0)
        elif is_turned:
            query, key, value = _each(lambda tensor: tensor.transpose(0, 1), query, key, value)
        sizes = (self.embed_dim, self.num_heads)
        extra = (self.bias_k, self.bias_v, self.add_zero_attn, self.dropout)
        projections: tuple[Any, ...] = (*sizes, self._project_in, None, *extra, partial(self._project_out, query), None)
        output, weights = attend(query, key, value, *projections, training=self.training, **options)
        if is_single:
            return output.squeeze(1), None if weights is None else weights.squeeze(0)
        return output.transpose(0, 1) if is_turned else output, weights

    def _project_in(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """Compute ``W x + b`` for the query, the key and the value, each with its own third of W."""
        if query is not key or key is not value:
            return project_apart(query, key, value, self.in_proj_weight, self.in_proj_bias)
        projected = self.transformed(F.linear, query)
        return tuple(rearrange(projected, "l n (parts c) -> parts l n c", parts=3).contiguous())

    def _project_out(self, query: Tensor, rows: Tensor) -> Tensor:
        """Apply ``out_proj`` to the rows of an ``(L, N, C)``, as the query is; without its hooks, as PyTorch does."""
        layer: Any = self.out_proj
        if not isinstance(layer, Whitened) or layer.is_plain():
            return F.linear(rows, layer.weight, layer.bias)
        return layer.transformed(F.linear, rows.unflatten(0, query.shape[:2])).flatten(0, 1)


register(nn.MultiheadAttention, WhitenedMultiheadAttention)
register(OutProjection, WhitenedOutProjection)
