"""Network deconvolution (arXiv 1905.11926), written from its formulas: layers that whiten their own inputs."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .curvature import input_rows

ITERATIONS = 5
EPSILON = 1e-5
MOMENTUM = 0.1  # weight of a new batch in the running statistics
BLOCK = 16  # channels that are whitened together; the paper takes 64, which is too slow on a CPU
ROWS = 4096  # of a batch, for the covariance


def inverse_root(covariance: Tensor) -> Tensor:
    """Compute ``covariance^(-½)`` (n, M, M) by a few coupled Newton-Schulz steps, through which gradients flow."""
    norm = torch.linalg.matrix_norm(covariance, keepdim=True)
    eye = torch.eye(covariance.shape[-1], dtype=covariance.dtype).expand_as(covariance)
    y, z = covariance / norm, eye
    for _ in range(ITERATIONS):
        step = (3 * eye - z @ y) / 2
        y, z = y @ step, step @ z
    return z / norm.sqrt()


class Deconvolution(nn.Module):
    """A linear layer or convolution on whitened inputs, with the parameters of the plain layer.

    ``w D (x − μ) + b`` is computed as a plain layer with the weight ``w D`` and the bias ``b − w D μ``. D is the
    inverse root of the covariance of the batch's rows, in blocks of channels, or in evaluation a running average.
    """

    mean: Tensor
    root: Tensor

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer, self.taps = layer, layer.weight[0, 0].numel()
        features = layer.weight.shape[1]
        block = max(size for size in range(1, min(BLOCK, features) + 1) if features % size == 0)
        self.size = block * self.taps
        if layer.bias is None:
            layer.bias = nn.Parameter(torch.zeros(len(layer.weight)))
        self.register_buffer("mean", torch.zeros(features * self.taps))
        self.register_buffer("root", torch.eye(self.size).repeat(features // block, 1, 1))

    def forward(self, inputs: Tensor) -> Tensor:
        mean, root = self.mean, self.root
        if self.training:
            rows = input_rows(self.layer, inputs)
            rows = rows[:: -(-len(rows) // ROWS)]
            mean = rows.mean(0)
            parts = (rows - mean).unflatten(1, (-1, self.size)).transpose(0, 1)
            covariance = parts.mT @ parts / len(rows)
            root = inverse_root(covariance + EPSILON * torch.eye(self.size, dtype=inputs.dtype))
            self.mean.lerp_(mean.detach(), MOMENTUM)
            self.root.lerp_(root.detach(), MOMENTUM)
        weight = self.layer.weight.flatten(1)
        weight = (weight.unflatten(1, (-1, self.size)).transpose(0, 1) @ root).transpose(0, 1).flatten(1)
        bias = self.layer.bias - weight @ mean
        weight = weight.view_as(self.layer.weight)
        if isinstance(self.layer, nn.Linear):
            return F.linear(inputs, weight, bias)
        operation = F.conv2d if isinstance(self.layer, nn.Conv2d) else F.conv1d
        return operation(inputs, weight, bias, self.layer.stride, self.layer.padding, self.layer.dilation)


def deconvolve(network: nn.Module) -> nn.Module:
    """Replace linear layers and convolutions, in place, and take out the batch normalizations, as the paper does."""
    for name, child in list(network.named_children()):
        if isinstance(child, nn.Linear | nn.Conv1d | nn.Conv2d):
            setattr(network, name, Deconvolution(child))
        elif isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d):
            setattr(network, name, nn.Identity())
        else:
            deconvolve(child)
    return network
