"""Global covariance pooling: the square root of the covariance of a feature map's positions (arXiv 1703.08050).

The n positions of a sample are the columns of X, with C channels. Then

    m = X 1 / n      Σ = (X − m)(X − m)ᵀ / n      V = Σ^½      y = V_ij, i ≤ j

The gradient of y is that of V's upper triangle. From it the root's adjoint (`inverse`) yields ``S = ∂L/∂Σ``, symmetric:

    ∂L/∂X = 2 S (X − m) / n

There is no further term for the mean, since the columns of X − m sum to zero. Backward computes X − m again.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.fx
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ._torch.precision import full_precision_outside_graphs, without_autocast
from .inverse import ROOTS
from .options import check, is_count
from .state import safe_to_load

STEPS = {"newton_schulz": ("iterations",), "pade": ("degree",)}  # what a root takes beside the factor


def _centred(input: Tensor) -> Tensor:
    """Copy samples ``(N, C, …)`` to ``(N, C, n)``, in float32 or wider, minus their means."""
    columns = input.flatten(2).to(torch.promote_types(input.dtype, torch.float32))
    return columns - columns.mean(-1, keepdim=True)


class _Triangle(torch.autograd.Function):
    """Autograd function from samples to the upper triangles of their roots, which are computed already.

    Double backward raises an error: the second derivative is not implemented.
    """

    @staticmethod
    def forward(input: Tensor, root: Tensor, adjoint: Callable[..., Tensor], *kept: Tensor) -> Tensor:
        rows, columns = _places(root)
        return root[:, rows, columns].to(input.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        input, root, adjoint, *kept = inputs
        ctx.save_for_backward(input, root, *kept)
        ctx.adjoint = adjoint

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple:  # type: ignore[override]
        input, root, *kept = ctx.saved_tensors
        rows, columns = _places(root)
        with without_autocast(input.device), full_precision_outside_graphs():
            of_root = torch.zeros_like(root)
            of_root[:, rows, columns] = grad_output.to(root.dtype)
            centred = _centred(input)
            grad = ctx.adjoint(of_root, root, *kept) @ centred * (2 / centred.shape[-1])
            grad_input = torch.empty_like(input).copy_(grad.view(input.shape))
        return grad_input, None, None, *[None] * len(kept)


def _places(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows and columns of the upper triangle's entries, row by row."""
    size = matrices.shape[-1]
    rows, columns = torch.triu_indices(size, size, device=matrices.device)
    return rows, columns


@torch.fx.wrap
def _pool(input: Tensor, dims: int, method: str, steps: tuple[int, ...]) -> Tensor:
    """Check samples and pool them; `torch.fx` puts it into a graph as one call."""
    name = f"CovariancePooling{dims - 2}d"
    if input.dim() != dims:
        shape = "(N, C, L)" if dims == 3 else "(N, C, H, W)"
        raise ValueError(f"{name} expects an input {shape}, got size {tuple(input.shape)}")
    if not input.is_floating_point():
        raise ValueError(f"{name} expects an input of a floating-point type, got {input.dtype}")
    if input.shape[1] == 0 or input.shape[2:].numel() < 2:
        raise ValueError(f"{name} expects at least 1 channel and 2 positions, got size {tuple(input.shape)}")
    with torch.no_grad(), without_autocast(input.device), full_precision_outside_graphs():
        centred = _centred(input)
        root = ROOTS[method](centred / centred.shape[-1] ** 0.5, *steps)
    return _Triangle.apply(input, root.matrix, root.adjoint, *root.kept)


class _CovariancePooling(nn.Module):
    dims: ClassVar[int]  # of an input

    def __init__(self, method: str = "newton_schulz", *, iterations: int = 5, degree: int = 5) -> None:
        super().__init__()
        check("method", method, isinstance(method, str) and method in ROOTS, f"one of {', '.join(ROOTS)}")
        check("iterations", iterations, is_count(iterations), "an integer of at least 1")
        check("degree", degree, is_count(degree), "an integer of at least 1")
        self.method, self.iterations, self.degree = method, iterations, degree

    def forward(self, input: Tensor) -> Tensor:
        steps = tuple(getattr(self, name) for name in STEPS.get(self.method, ()))
        return _pool(input, self.dims, self.method, steps)

    def extra_repr(self) -> str:
        return ", ".join([repr(self.method), *(f"{name}={getattr(self, name)}" for name in STEPS.get(self.method, ()))])


@safe_to_load
class CovariancePooling1d(_CovariancePooling):
    """Global pooling by the square root of the covariance of each sample's positions (arXiv 1703.08050).

    It takes the place of global average pooling in front of a linear layer, which then has C (C + 1) / 2 inputs. The
    covariance divides by the number of positions, of which there may be fewer than channels. The output is the root's
    upper triangle, row by row; entries off the diagonal are not scaled, as in the papers.

    The root is computed by one of these methods:

    - "newton_schulz": a few matrix products, with the gradient through them (iSQRT-COV, arXiv 1712.01034). Small
      eigenvalues of the root are too small. Such roots generalise better than exact ones, as arXiv 2105.02498 reports.
    - "pade": a Padé approximant, with its own gradient (arXiv 2105.02498, 2201.08663). Small eigenvalues are too large.
    - "eigh": the exact root, with the gradient by the Lyapunov equation in the eigenbasis, which divides by no
      difference of eigenvalues.

    All gradients are finite, also where eigenvalues are equal or 0. At a sample that is constant the root has no
    derivative: the gradient is 0. A sample with a NaN or Inf has an output and a gradient of NaN, the others do not.
    Computes in float32 or wider, whatever the input's type and autocast; the output is of the input's type. The second
    derivative is not implemented.

    Args:
        method: "newton_schulz", "pade" or "eigh".
        iterations: steps of "newton_schulz", at least 1; 5 in the paper.
        degree: degree of the approximant of "pade", at least 1, 5 in the paper. It keeps as many C×C matrices a sample
            for backward.

    Shape: ``(N, C, L) -> (N, C (C + 1) / 2)``.

    Raises:
        ValueError: an option is not possible; the input has other dimensions, fewer than 2 positions, or is not of a
            floating-point type.
    """

    dims = 3


@safe_to_load
class CovariancePooling2d(_CovariancePooling):
    """Global pooling by the square root of the covariance of positions; arguments as for `CovariancePooling1d`.

    Shape: ``(N, C, H, W) -> (N, C (C + 1) / 2)``.
    """

    dims = 4
