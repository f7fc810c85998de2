"""Folding normalizations that whiten into the layers in front of them, for inference.

An evaluating normalization is a fixed linear map of the channels, ``y = A x + s`` with A block-diagonal, and what
a linear or convolutional layer in front of it gives is ``x = W u + b``: together one layer, with A W and A b + s.
Where nothing stands in front that could take it, the map is a convolution of its own with a 1×1 kernel.
"""

from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from .convert import NORMS, PLAIN, TWINS, unwhiten
from .dataflow import followed_by
from .norm.base import WhiteningNorm
from .norm.samples import scaled, shift

M = TypeVar("M", bound=nn.Module)

CONVOLUTIONS = {4: nn.Conv2d, 5: nn.Conv3d}  # by the dimensions of the input


@torch.no_grad()
def fold(model: M) -> M:
    """Fold the evaluating whitening normalizations of a model into its plain layers, in place.

    What is left is a plain network with the same outputs, to rounding: whitened layers are turned back, a
    normalization whose input is one layer's output, and nothing else's, is folded into that layer and
    gives way to `nn.Identity`, and any other to a convolution with a 1×1 kernel (among them one that mixes channels
    of several groups of the convolution in front). Of a linear layer in front of a 1-dimensional normalization the
    inputs are taken to be rows ``(N, features)``. The forward pass is traced by `torch.fx`, as by ``whiten(psi=True)``;
    hooks of what is replaced are gone.

    Returns:
        `model`, or, of a single normalization, what takes its place.

    Raises:
        ValueError: the model cannot be traced; or a normalization is in training mode, or without running
            statistics, or a 1-dimensional one that no layer can take, whose inputs may be rows or sequences; or
            `unwhiten` raises one. Nothing is changed then.
    """
    norms: dict[str, Any] = {name: one for name, one in model.named_modules() if isinstance(one, WhiteningNorm)}
    for name, norm in norms.items():
        if norm.training or norm.running_mean is None:
            why = "is in training mode: call model.eval() first" if norm.training else "has no running statistics"
            raise ValueError(f"{name or 'the model'} cannot be folded: it {why}")
    kinds = tuple(twin for twins in NORMS.values() for twin in twins.values())
    layers = {norm: layer for layer, norm in followed_by(model, (*TWINS, *PLAIN), kinds).items()} if norms else {}
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
    for name, norm in norms.items():
        matrix, moved = _map(norm)
        if name in takers:
            _fold_into(takers[name], matrix, moved)
            model = _replaced(model, norm, nn.Identity())
        else:
            model = _replaced(model, norm, _convolution(norm, matrix, moved))
    return model


def _map(norm: WhiteningNorm) -> tuple[Tensor, Tensor]:
    """A ``(C, C)`` and s ``(C,)`` of ``y = A x + s``, in float64."""
    matrices, shifts = [], []
    for part in norm.parts():
        mean, matrix = norm.running_map(part)
        weight, bias = norm.affine_of(part)
        matrix = scaled(matrix.double(), weight)
        matrices += [*matrix]
        shifts.append(shift(matrix, mean.double(), bias).flatten())
    return torch.block_diag(*matrices), torch.cat(shifts)


def _takes(layer: Any, norm: WhiteningNorm) -> bool:
    """Whether the layer's outputs are the norm's channels, and no two that the norm mixes are of different groups."""
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
    if isinstance(layer, _ConvTransposeNd):  # (inputs, outputs of a group, *kernel)
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


def _convolution(norm: WhiteningNorm, matrix: Tensor, moved: Tensor) -> nn.Module:
    size = norm.width if norm.num_features % norm.width == 0 else norm.num_features
    like: Any = norm.running_mean if norm.weight is None else norm.weight
    groups = norm.num_features // size
    make = CONVOLUTIONS[max(norm.dims)]
    layer = make(norm.num_features, norm.num_features, 1, groups=groups, device=like.device, dtype=like.dtype)
    layer.weight.copy_(_blocks(matrix, size).view_as(layer.weight))
    assert layer.bias is not None
    layer.bias.copy_(moved)
    return layer.eval()


def _replaced(model: Any, old: nn.Module, new: nn.Module) -> Any:
    """The model with another module in a module's place, under all its names; the new one if it is the model."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if child is old:
                setattr(parent, name, new)
    return new if model is old else model
