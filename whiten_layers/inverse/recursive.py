"""Inverse power by recursion: a few products with ``rank`` columns per refresh, without a full decomposition.

**Power 1: block quasi-Newton.** In whitened coordinates the covariance is ``H = P^½ C P^½``, and P is exact if H = I.
For q directions S with ``Y = C S`` and ``K = (SᵀY)⁻¹`` (q × q), the update

    P⁺ = (I − S K Yᵀ) P (I − Y K Sᵀ) + S K Sᵀ  =  P − W (S K)ᵀ − (S K) Wᵀ,
    W = Z − ½ S K (YᵀZ + SᵀY),  Z = P Y

makes ``P⁺ C S = S``: those directions are whitened exactly. P⁺ is symmetric positive definite if P is (it is the block
BFGS update of an inverse). The spectrum of P⁺C is that of PC, compressed to the C-orthogonal complement of S, plus q
ones: while 1 lies inside the spectrum, its condition number cannot rise.

The directions of the next step are free: they are the part of ``P C S = Z``, already computed, that is C-orthogonal to
S, ``V = Z − S K (YᵀZ)``. So the steps run through the block Krylov space of PC, as block Lanczos does, across
refreshes. They reach the ends of the spectrum far sooner than random directions with a power iteration, at the same
cost. V is also the part outside S of the error ``Z − S`` that the step removes. So while C moves, V points to what is
now whitened worst.

The start ``P = I / c`` decides at which point of the spectrum the whitened directions gather. c is the smallest Ritz
value of a short block Lanczos run. It is a Rayleigh quotient, so it lies inside the spectrum, and close to its lower
end, where those directions do not get in the way. With c near the mean, the eigenvalues below it would have to be
lifted one by one. C must have the same scale at every call (`WhiteningFactor.damped` has mean variance 1 + λ).

**Other powers: the leading eigenvectors.** The covariance of a layer has a few large eigenvalues and a long tail. U and
d are the leading eigenpairs, from orthogonal iteration on the last U and a Rayleigh–Ritz step. t is the mean of the
other eigenvalues. Then ``P = t^(-p) I + U (d^(-p) − t^(-p)) Uᵀ``. The lower the power, the less there is to gain from
the tail.

The paper (arXiv 2010.01546) announces a recursion that lowers the condition number at M² cost. These two recursions are
this library's own.
"""

import torch
from torch import Tensor

from .base import Inverse, warm_started
from .eigh import decompose, inverse_power

STEPS = 2  # quasi-Newton steps at each refresh
START_BLOCKS = 4  # blocks of the Lanczos run at the start


def recursive(covariance: Tensor, power: float, warm_start: Inverse | None = None, rank: int = 16) -> Inverse:
    """Improve ``P ≈ covariance^(-power)`` for n symmetric positive definite matrices; P is exact if M ≤ rank.

    Args:
        covariance: ``(n, M, M)``, already damped.
        power: any. Power 1 converges to the inverse; another power converges to the approximation by the leading `rank`
            eigenvectors and the mean of the other eigenvalues.
        warm_start: the last result, to continue from. Where it is None, not finite, or no longer positive definite
            because of rounding, the start is a multiple of the identity.
        rank: number of directions that a step whitens. Ignored with a warm start, which fixes the number.

    Returns:
        ``matrix`` (n, M, M), NaN where the covariance turns out not to be positive definite;
        ``directions`` (n, M, min(rank, M)); ``restarted`` where `warm_start` could not be used.

    Raises:
        ValueError: `warm_start` is another method's result.
    """
    columns = min(rank, covariance.shape[-1])
    if warm_start is not None:
        if warm_start.directions is None:
            raise ValueError("warm_start has no directions: give a result of `recursive`, or None")
        columns = warm_start.directions.shape[-1]

    def cold(covariance: Tensor) -> Inverse:
        return _start(covariance, columns)

    def run(covariance: Tensor, start: Inverse) -> Inverse:
        return _quasi_newton(covariance, start) if power == 1 else _leading_eigenvectors(covariance, power, start)

    return warm_started(run, covariance, warm_start, cold)


def _orthonormal(columns: Tensor) -> Tensor:
    return torch.linalg.qr(columns).Q


def _start(covariance: Tensor, rank: int) -> Inverse:
    size = covariance.shape[-1]
    # The same numbers in every call and every process: runs can be repeated, and processes agree.
    noise = torch.randn(size, rank, generator=torch.Generator().manual_seed(0), dtype=covariance.dtype)
    basis = _orthonormal(noise.to(covariance.device)).expand(len(covariance), -1, -1)
    for _ in range(min(START_BLOCKS, size // rank) - 1):
        basis = _orthonormal(torch.cat([basis, covariance @ basis[..., -rank:]], -1))
    values, vectors = decompose(basis.mT @ (covariance @ basis))
    # A larger c lies inside the spectrum too, and P must not span more orders of magnitude than its precision allows.
    low = torch.maximum(values[:, :1], torch.finfo(values.dtype).eps ** 0.5 * values[:, -1:])
    identity = torch.eye(size, dtype=covariance.dtype, device=covariance.device)
    return Inverse(identity / low.unsqueeze(-1), basis @ vectors[..., -rank:])


def _cholesky(gram: Tensor) -> Tensor:
    """Compute Cholesky factors of n small matrices; NaN for one that is not positive definite beyond rounding."""
    factor, info = torch.linalg.cholesky_ex(gram)
    pivots = factor.diagonal(dim1=-2, dim2=-1).square()
    rounding = torch.finfo(gram.dtype).eps * gram.shape[-1] * pivots.amax(-1)
    definite = (info == 0) & (pivots.amin(-1) > rounding)
    return torch.where(definite[:, None, None], factor, torch.nan)


def _quasi_newton(covariance: Tensor, start: Inverse) -> Inverse:
    directions = start.directions
    assert directions is not None
    # P after the steps so far is start.matrix − left @ right.mT: large matrices are only read, and written once.
    left = right = directions[..., :0]
    broken = (start.matrix.diagonal(dim1=-2, dim2=-1) <= 0).any(-1, keepdim=True)
    for _ in range(STEPS):
        images = covariance @ directions
        # First make S orthonormal in the metric of C: errors then grow with C's condition number, not its square.
        lower = _cholesky(directions.mT @ images)
        both = torch.linalg.solve_triangular(lower.mT, torch.cat([directions, images], -2), upper=True, left=False)
        directions, images = both.chunk(2, -2)  # S, Y
        moved = start.matrix @ images - left @ (right.mT @ images)  # Z
        metric, inner = directions.mT @ images, images.mT @ moved  # SᵀY, YᵀZ
        broken = broken | (inner.diagonal(dim1=-2, dim2=-1) <= 0).any(-1, keepdim=True)
        dual = torch.cholesky_solve(directions.mT, _cholesky(metric)).mT  # S K
        update = moved - dual @ ((inner + metric) / 2)  # W
        left, right = torch.cat([left, update, dual], -1), torch.cat([right, dual, update], -1)
        directions = _orthonormal(moved - dual @ inner)  # V
    matrix = torch.baddbmm(start.matrix, left, right.mT, alpha=-1)
    # P is no longer positive definite if P or YᵀPY has a diagonal entry that is not positive. A negative direction that
    # neither shows lies at the end of the spectrum, where the steps lead: a step that whitens it makes it positive.
    matrix.diagonal(dim1=-2, dim2=-1).masked_fill_(broken, torch.nan)
    return Inverse(matrix, directions)


def _leading_eigenvectors(covariance: Tensor, power: float, start: Inverse) -> Inverse:
    assert start.directions is not None
    basis = _orthonormal(covariance @ start.directions)
    values, rotation = decompose(basis.mT @ (covariance @ basis))
    vectors = basis @ rotation
    size, rank = vectors.shape[-2:]
    trace = covariance.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True)
    tail = (trace - values.sum(-1, keepdim=True)) / (size - rank) if size > rank else torch.ones_like(trace)
    # Passed with the largest eigenvalue, so that a tail that is only rounding of it yields NaN, as 0 does.
    flat = inverse_power(torch.cat([tail, values[:, -1:]], -1), power)[:, :1]
    matrix = (vectors * (inverse_power(values, power) - flat).unsqueeze(-2)) @ vectors.mT
    matrix.diagonal(dim1=-2, dim2=-1).add_(flat)
    return Inverse(matrix, vectors)
