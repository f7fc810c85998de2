"""The square root of a covariance, by operations that autograd can differentiate any number of times.

With ``B = A^½`` the rule of products gives ``B dB + dB B = dA``: dB solves a Lyapunov equation. Its solution
``X = L(B, G)``, of ``B X + X B = G`` for symmetric G, changes by ``dX = L(B, dG − dB X − X dB)``. L(B, ·) is its own
adjoint, so that

    ∂L/∂A = L(B, ∂L/∂B)        Y = L(B, ∂L/∂X)        ∂L/∂G = Y        ∂L/∂B = −(Y X + X Y)

and every derivative consists of solutions again. In B's eigenbasis ``X_ij = G_ij / (b_i + b_j)``: no difference of
eigenvalues divides, as it would in the derivative of an eigenvector.
"""

from typing import Any

import torch
from torch import Tensor

from ..inverse.eigh import decompose, spectral_adjoint


class _Lyapunov(torch.autograd.Function):
    """Solves ``root X + X root = (right + rightᵀ) / 2``."""

    @staticmethod
    def forward(root: Tensor, right: Tensor) -> Tensor:
        values, vectors = decompose(root)
        return spectral_adjoint(right, vectors, 1 / (values.unsqueeze(-1) + values.unsqueeze(-2)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(inputs[0], output)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        root, solution = ctx.saved_tensors
        of_right = _Lyapunov.apply(root, grad_output)
        product = of_right @ solution
        return -(product + product.mT), of_right


class _SquareRoot(torch.autograd.Function):
    @staticmethod
    def forward(matrix: Tensor) -> Tensor:
        values, vectors = decompose(matrix)
        return (vectors * values.sqrt().unsqueeze(-2)) @ vectors.mT

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Tensor:  # type: ignore[override]
        return _Lyapunov.apply(ctx.saved_tensors[0], grad_output)


def square_root(matrix: Tensor) -> Tensor:
    """Compute ``matrix^½`` of n symmetric positive definite matrices ``(n, M, M)``; NaN where one is not."""
    return _SquareRoot.apply(matrix)
