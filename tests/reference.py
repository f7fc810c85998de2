"""The truth, slow and in float64: what the library must equal, written from the formulas, not from its code."""

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def padded(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """The input of a convolution with what its padding adds, for every spelling of padding."""
    if layer.padding == "valid":
        sides = [(0, 0)] * 2
    elif layer.padding == "same":
        totals = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        sides = [(total // 2, total - total // 2) for total in totals]
    else:
        sides = [(p, p) for p in layer.padding]
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    return F.pad(x, (*sides[1], *sides[0]), mode=mode)


def rows(layer: nn.Module, x: Tensor) -> Tensor:
    """What each row of the weight is multiplied with: ``(groups, rows, M)``, differentiable in x."""
    if isinstance(layer, nn.Linear):
        return x.reshape(1, -1, x.shape[-1])
    x = padded(layer, x if x.dim() == 4 else x[None])
    heights = range(0, x.shape[2] - layer.dilation[0] * (layer.kernel_size[0] - 1), layer.stride[0])
    widths = range(0, x.shape[3] - layer.dilation[1] * (layer.kernel_size[1] - 1), layer.stride[1])
    patches = []
    for image, top, left in itertools.product(range(len(x)), heights, widths):
        bottom = top + layer.dilation[0] * (layer.kernel_size[0] - 1) + 1
        right = left + layer.dilation[1] * (layer.kernel_size[1] - 1) + 1
        patch = x[image, :, top : bottom : layer.dilation[0], left : right : layer.dilation[1]]
        patches.append(patch.reshape(layer.groups, -1))
    return torch.stack(patches, dim=1)


def output_rows(layer: nn.Module, y: Tensor) -> Tensor:
    """An output (or its gradient) as ``(groups, rows, S)``, in the order of `rows`."""
    if isinstance(layer, nn.Linear):
        return y.reshape(1, -1, y.shape[-1])
    y = y if y.dim() == 4 else y[None]
    return y.permute(1, 0, 2, 3).reshape(layer.groups, y.shape[1] // layer.groups, -1).mT


def moments(x: Tensor, center: bool = True) -> tuple[Tensor, Tensor]:
    """Mean and covariance of ``(rows, M)``, row by row."""
    mean = sum(x) / len(x) if center else torch.zeros_like(x[0])
    return mean, sum(torch.outer(row - mean, row - mean) for row in x) / len(x)


def weighted_moments(batches: list[Tensor], decay: float) -> tuple[Tensor, Tensor]:
    """Mean and covariance of all rows of all batches, a row's weight being ``decay^age`` of its batch."""
    ages = range(len(batches) - 1, -1, -1)
    weights = torch.cat(
        [torch.full((len(b),), decay**age, dtype=b.dtype) for b, age in zip(batches, ages, strict=True)]
    )
    x = torch.cat(batches)
    mean = (weights[:, None] * x).sum(0) / weights.sum()
    return mean, ((x - mean).T * weights) @ (x - mean) / weights.sum()


def block_diagonal(matrix: Tensor, block_size: int | None, taps: int = 1) -> Tensor:
    """Zeros between channels of different blocks: as equal as can be, in order, of at most `block_size` channels."""
    channels = len(matrix) // taps
    number = math.ceil(channels / (block_size or channels))
    block = torch.arange(channels).repeat_interleave(taps) // math.ceil(channels / number)
    return matrix * (block[:, None] == block)


def inverse_power(covariance: Tensor, power: float, damping: float, rescale: bool) -> Tensor:
    """``k (C + λI)^(-p)``, λ relative to the mean variance, by a singular value decomposition."""
    size = len(covariance)
    damped = covariance + damping * covariance.trace() / size * torch.eye(size, dtype=covariance.dtype)
    u, s, _ = torch.linalg.svd(damped)
    inverse = u @ torch.diag(s**-power) @ u.T
    scale = math.sqrt(covariance.trace() / (inverse @ covariance @ inverse).trace()) if rescale else 1.0
    return scale * inverse


def with_spectrum(values: Tensor, seed: int = 0) -> Tensor:
    """A covariance with these eigenvalues, in a random basis."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator, dtype=torch.float64)).Q
    matrix = (basis * values.double()) @ basis.mT
    return (matrix + matrix.mT) / 2


def condition(inverse: Tensor, covariance: Tensor) -> float:
    """Of ``P^½ C P^½``; not a number where P is not positive definite."""
    lower, info = torch.linalg.cholesky_ex(inverse.double())
    values = torch.linalg.eigvalsh(lower.mT @ covariance.double() @ lower)
    return (values[-1] / values[0]).item() if info == 0 else float("nan")


def tap_correlation(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """``(groups, taps, taps)``: autocorrelation of the centred channels by displacement, a position at a time."""
    x = x if x.dim() == 4 else x[None]
    taps = list(itertools.product(*map(range, layer.kernel_size)))
    result = []
    for group in x.chunk(layer.groups, dim=1):
        centred = group - group.mean((0, 2, 3), keepdim=True)
        height, width = centred.shape[2:]

        def at(dy: int, dx: int, centred: Tensor = centred, height: int = height, width: int = width) -> Tensor:
            total = torch.zeros((), dtype=centred.dtype)
            for i, j in itertools.product(range(height), range(width)):
                if 0 <= i + dy < height and 0 <= j + dx < width:
                    total = total + (centred[:, :, i, j] * centred[:, :, i + dy, j + dx]).sum()
            return total

        dilation = layer.dilation
        values = [[at((c - a) * dilation[0], (d - b) * dilation[1]) for c, d in taps] for a, b in taps]
        result.append(torch.stack([torch.stack(row) for row in values]) / at(0, 0))
    return torch.stack(result)


def transformed(
    grad_weight: Tensor,
    grad_bias: Tensor | None,
    mean: Tensor | None,
    precision: Tensor,
    output_precision: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """``Ĝ = Q (G − g μᵀ) P`` and ``ĝ = Q g − Ĝ μ``, group by group; None for Q stands for the identity.

    G ``(S, ...)``, g ``(S,)``, μ ``(groups, M)``, P ``(groups, M, M)``, Q ``(groups, S / groups, S / groups)``.
    """
    groups = len(precision)
    weights, biases = [], []
    for i in range(groups):
        weight = grad_weight.flatten(1).chunk(groups)[i]
        q = torch.eye(len(weight), dtype=weight.dtype) if output_precision is None else output_precision[i]
        if grad_bias is None:
            weights.append(q @ weight @ precision[i])
            continue
        bias = grad_bias.chunk(groups)[i]
        shift = torch.zeros_like(precision[i][0]) if mean is None else mean[i]
        weights.append(q @ (weight - torch.outer(bias, shift)) @ precision[i])
        biases.append(q @ bias - weights[-1] @ shift)
    return torch.cat(weights).view_as(grad_weight), torch.cat(biases) if biases else None


def root(matrix: Tensor) -> Tensor:
    """A root T, ``TᵀT = matrix``; any will do, so not a symmetric one."""
    return torch.linalg.cholesky(matrix).T


class SampleWhitening:
    """The layer that whitens its samples: ``y = R (W̃ T (x − μ) + b̃)``, with W̃ and b̃ as its parameters.

    ``TᵀT = P`` and ``RRᵀ = Q``; `reparametrise` chooses new T, μ and R for the same function. Without
    a bias nothing can absorb a shift: ``y = R W̃ T x``.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self.groups = getattr(layer, "groups", 1)
        weight = layer.weight.detach().clone()
        self.out_features = weight.shape[0] // self.groups
        features = weight[0].numel()
        self.transform = torch.eye(features).expand(self.groups, -1, -1).to(weight)
        self.mean = torch.zeros(self.groups, features).to(weight)
        self.output = torch.eye(self.out_features).expand(self.groups, -1, -1).to(weight)
        self.weight = weight.reshape(self.groups, self.out_features, features).requires_grad_()
        self.bias = None
        if layer.bias is not None:
            self.bias = layer.bias.detach().clone().view(self.groups, self.out_features).requires_grad_()

    def parameters(self) -> list[Tensor]:
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    def __call__(self, x: Tensor) -> Tensor:
        self.seen = rows(self.layer, x)
        shift = 0 if self.bias is None else self.mean[:, None]
        hidden = (self.seen - shift) @ self.transform.mT @ self.weight.mT
        if self.bias is not None:
            hidden = hidden + self.bias[:, None]
        self.result = hidden @ self.output.mT
        self.result.retain_grad()
        return self._shaped(x)

    def _shaped(self, x: Tensor) -> Tensor:
        if isinstance(self.layer, nn.Linear):
            return self.result[0].view(*x.shape[:-1], -1)
        spatial = F.conv2d(
            padded(self.layer, x),
            self.layer.weight.detach(),
            None,
            self.layer.stride,
            0,
            self.layer.dilation,
            self.groups,
        ).shape[2:]
        y = self.result.mT.reshape(self.groups * self.out_features, len(x), *spatial)
        return y.transpose(0, 1)

    @torch.no_grad()
    def plain(self) -> tuple[Tensor, Tensor | None]:
        """The plain parameters ``W = R W̃ T`` and ``b = R b̃ − W μ``."""
        weight = self.output @ self.weight @ self.transform
        bias = None
        if self.bias is not None:
            bias = (self.output @ self.bias[..., None] - weight @ self.mean[..., None]).flatten()
        return weight.reshape(self.layer.weight.shape), bias

    @torch.no_grad()
    def reparametrise(self, transform: Tensor, mean: Tensor, output: Tensor) -> None:
        weight, bias = self.plain()
        weight = weight.view(self.weight.shape)
        self.transform, self.mean, self.output = transform, mean, output
        self.weight = (torch.linalg.inv(output) @ weight @ torch.linalg.inv(transform)).requires_grad_()
        if bias is not None:
            bias = bias.view(self.bias.shape)[..., None] + weight @ mean[..., None]
            self.bias = (torch.linalg.inv(output) @ bias).squeeze(-1).requires_grad_()
