"""Folding of normalizations that whiten into the layers in front of them, for inference.

In evaluation mode, a normalization is a fixed linear map of the channels, ``y = A x + s`` with A block-diagonal. A
linear or convolutional layer in front of it computes ``x = W u + b``. Together they are one layer with weight A W and
bias A b + s. If no layer in front can absorb the map, it becomes a convolution of its own with a 1×1 kernel.
"""

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .._torch.convolutions import AnyTransposedConvolution
from .._torch.modules import become, has_forward_hooks, holds_parameter
from ..layers import PLAIN, TWINS
from ..norm.base import WhiteningNorm
from ..norm.samples import scaled
from .convert_batchnorm import NORMS
from .tracing import sole_consumers
from .whiten import unwhiten

M = TypeVar("M", bound=nn.Module)

CONVOLUTIONS = {4: nn.Conv2d, 5: nn.Conv3d}  # by the number of the input's dimensions


@torch.no_grad()
def fold(model: M) -> M:
    """Fold a model's whitening normalizations, in evaluation mode, into its plain layers, in place.

    The result is a plain network with the same outputs, up to rounding. Whitened layers become plain again. A
    normalization is folded into a layer, and becomes a `nn.Identity`, if the layer's output is its input and goes
    nowhere else. Any other becomes a convolution with a 1×1 kernel. So does one that mixes channels of several groups
    of the convolution in front, one with forward hooks, and one whose layer in front has forward hooks or a computed
    weight or bias. All modules stay the same objects.

    `torch.fx` traces the forward pass in the model's current mode, with optional arguments at their defaults: what
    another call would do with a layer in front is not seen. A linear layer in front of a 1-dimensional normalization is
    assumed to get rows ``(N, features)``.

    Returns:
        `model`.

    Raises:
        ValueError: the model cannot be traced; or a normalization is in training mode, has no running statistics, or is
            of a subclass, which may compute something else; or a 1-dimensional one cannot be folded into a layer, so
            that it is unknown whether its inputs are rows or sequences; or `unwhiten` raises one. Nothing has been
            changed then.
    """
    norms: dict[str, Any] = {name: one for name, one in model.named_modules() if isinstance(one, WhiteningNorm)}
    kinds = tuple(twin for twins in NORMS.values() for twin in twins.values())
    for name, norm in norms.items():
        why = None
        if type(norm) not in kinds:
            why = f"is a {type(norm).__name__}, which may compute otherwise"
        elif norm.training:
            why = "is in training mode: call model.eval() first"
        elif norm.running_mean is None:
            why = "has no running statistics"
        if why:
            raise ValueError(f"{name or 'the model'} cannot be folded: it {why}")
    layers = {norm: layer for layer, norm in sole_consumers(model, (*TWINS, *PLAIN), kinds).items()} if norms else {}
    modules: dict[str, Any] = dict(model.named_modules())
    fronts = {name: modules[layers[name]] for name in norms if name in layers}
    takers = {name: layer for name, layer in fronts.items() if _takes(layer, norms[name])}
    for name, norm in norms.items():
        if name not in takers and max(norm.dims) not in CONVOLUTIONS:
            raise ValueError(
                f"{name or 'the model'} cannot be folded: no layer in front takes it, and whether the inputs of a "
                f"{type(norm).__name__} are rows or sequences is not known"
            )
    unwhiten(model)
    dtype = next((one.dtype for one in model.parameters() if one.is_floating_point()), torch.get_default_dtype())
    for name, norm in norms.items():
        matrix, moved = _map(norm)
        if name in takers:
            _fold_into(takers[name], matrix, moved)
            become(norm, nn.Identity().eval())
        else:
            become(norm, _convolution(norm, matrix, moved, dtype))
    return model


def _map(norm: WhiteningNorm) -> tuple[Tensor, Tensor]:
    """Compute A ``(C, C)`` and s ``(C,)`` of ``y = A x + s``, in float64."""
    matrices, shifts = [], []
    for part in norm.parts():
        mean, matrix = (buffer.double() for buffer in norm.running_map(part))
        weight, bias = norm.affine_of(part)
        matrix = scaled(matrix, weight)
        moved = (matrix @ mean.unsqueeze(-1)).flatten()
        matrices += [*matrix]
        shifts.append(-moved if bias is None else bias.double() - moved)
    return torch.block_diag(*matrices), torch.cat(shifts)


def _takes(layer: Any, norm: WhiteningNorm) -> bool:
    """Tell whether a layer can absorb a norm: the channels match, and the norm mixes none across the layer's groups."""
    is_computed = not (holds_parameter(layer, "weight") and holds_parameter(layer, "bias"))
    if is_computed or has_forward_hooks(layer) or has_forward_hooks(norm):
        return False
    if isinstance(layer, nn.Linear):
        return layer.out_features == norm.num_features and 2 in norm.dims
    size = layer.out_channels // layer.groups
    starts = range(0, norm.num_features, norm.width)
    ends = [min(start + norm.width, norm.num_features) for start in starts]
    alike = all(start // size == (end - 1) // size for start, end in zip(starts, ends, strict=True))
    return layer.out_channels == norm.num_features and alike


def _fold_into(layer: Any, matrix: Tensor, moved: Tensor) -> None:
    groups = getattr(layer, "groups", 1)
    size = len(matrix) // groups
    blocks = _blocks(matrix, size)
    weight = layer.weight.double()
    if isinstance(layer, AnyTransposedConvolution):  # (inputs, outputs of a group, *kernel)
        folded = torch.einsum("gts,gisk->gitk", blocks, weight.view(groups, -1, size, weight[0, 0].numel()))
    else:  # (outputs, inputs of a group, *kernel)
        folded = blocks @ weight.view(groups, size, -1)
    layer.weight.copy_(folded.reshape(weight.shape))
    bias = moved if layer.bias is None else matrix @ layer.bias.double() + moved
    if layer.bias is None:
        layer.bias = nn.Parameter(bias.to(layer.weight.dtype), layer.weight.requires_grad)
    else:
        layer.bias.copy_(bias)


def _blocks(matrix: Tensor, size: int) -> Tensor:
    return torch.stack([matrix[i : i + size, i : i + size] for i in range(0, len(matrix), size)])


def _convolution(norm: WhiteningNorm, matrix: Tensor, moved: Tensor, dtype: torch.dtype) -> nn.Module:
    size = norm.width if norm.num_features % norm.width == 0 else norm.num_features
    groups, device = norm.num_features // size, matrix.device
    dtype = dtype if norm.weight is None else norm.weight.dtype
    make = CONVOLUTIONS[max(norm.dims)]
    layer = make(norm.num_features, norm.num_features, 1, groups=groups, device=device, dtype=dtype)
    layer.weight.copy_(_blocks(matrix, size).view_as(layer.weight))
    assert layer.bias is not None
    layer.bias.copy_(moved)
    return layer.eval()
