"""Mean and covariance of the rows of one batch, and how many rows' worth they are."""

from typing import NamedTuple

import torch
from torch import Tensor

from .._torch.precision import full_precision


class Moments(NamedTuple):
    """Number of rows, of rows that tell something new, mean and covariance, for each group.

    Shapes: (groups,), (groups,), (groups, M), (groups, M, M). Where there are no rows the others are 0. For
    ``effective_rows`` see the function of that name.
    """

    rows: Tensor
    effective_rows: Tensor
    mean: Tensor
    covariance: Tensor


def zero_moments(mean: Tensor) -> Moments:
    """Moments of no rows, for the groups and features of a mean ``(groups, M)``."""
    groups, features = mean.shape
    none = mean.new_zeros(groups)
    return Moments(none, none, torch.zeros_like(mean), mean.new_zeros(groups, features, features))


def effective_rows(covariance: Tensor, squared: Tensor, samples: Tensor | int, rows: Tensor | int) -> Tensor:
    """Count how many independent Gaussian rows would estimate a covariance as well as `samples` samples did.

    The positions of one image, or of one sequence, are rows that resemble each other, so n of them tell less than n
    rows of n images. Samples are independent. With Sᵢ the covariance of sample i alone and S their mean, the error of S
    is ``E‖S − C‖² = Σ ‖Sᵢ − S‖² / N(N − 1)`` (Ledoit & Wolf 2004, with samples instead of rows). For n Gaussian rows it
    would be ``(tr(C²) + tr(C)²) / n``. The two are set equal. One sample does not tell how samples differ: it counts as
    one row.

    Args:
        covariance: S, ``(groups, M, M)``, or what has the same norm and trace.
        squared: ``Σ ‖Sᵢ‖² / N tr(S)²`` of each group.
        samples: N.
        rows: number of rows in all samples, which is the most that is returned.
    """
    trace = covariance.diagonal(dim1=-2, dim2=-1).sum(-1)
    norm = (covariance / trace[:, None, None]).square().sum((-2, -1))
    effective = (norm + 1) * (samples - 1) / (squared - norm)
    # All, too, where no sample differs from another but by rounding
    effective = torch.where((effective > 0) & (effective < rows), effective, rows)
    return torch.where(torch.as_tensor(samples) < 2, 1, effective).clamp(min=1)


def moments(rows: Tensor, center: bool = True, samples: int | None = None, known: Tensor | None = None) -> Moments:
    """Compute the moments of rows ``(groups, n, M)``, at least one of each group.

    The covariance divides by the number of rows; it is 0 where it is only rounding of the mean. Rows of fewer than 32
    bits are computed with as float32.

    Args:
        rows: the rows.
        center: False for a mean of zero, and the second moment about zero instead of the covariance.
        samples: how many independent samples the rows come from, in order and as many of each; None for n.
        known: ``(groups, n)``, False for rows that are left out; None for all.
    """
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    groups, most, features = rows.shape
    number = rows.new_full((groups,), most) if known is None else known.sum(1).to(rows)
    total = number.clamp(min=1)
    if known is not None:
        rows = torch.where(known.unsqueeze(-1), rows, 0)
    mean = rows.sum(1) / total[:, None] if center else rows.new_zeros(groups, features)
    if center:
        rows = rows - mean.unsqueeze(1)
        rows = rows if known is None else torch.where(known.unsqueeze(-1), rows, 0)
    samples = most if samples is None else min(samples, most)
    size = most // samples
    with full_precision():
        covariance = rows.mT @ rows / total[:, None, None]
        trace = covariance.diagonal(dim1=-2, dim2=-1).sum(-1)
        if center:
            rounding = (4 * torch.finfo(rows.dtype).eps) ** 2 * torch.linalg.vecdot(mean, mean)
            covariance = torch.where((trace > rounding)[:, None, None], covariance, 0)
        parts = rows[:, : samples * size].unflatten(1, (samples, size))
        if size == 1:
            grams = torch.linalg.vecdot(parts, parts).unsqueeze(-1)
        else:
            grams = parts @ parts.mT if size <= features else parts.mT @ parts  # of equal norm
        share = number / most
        squared = (grams / (size * trace)[:, None, None, None]).square().sum((1, 2, 3)) / (samples * share)
    effective = effective_rows(covariance, squared, samples * share, number)
    return Moments(number, torch.where(number > 0, effective, 0), mean, covariance)


def merged(first: Moments, second: Moments) -> Moments:
    """Merge the moments of two sets of rows into those of all rows (Chan, Golub & LeVeque 1983)."""
    total = first.rows + second.rows
    weight = torch.where(total > 0, second.rows / total, 0).unsqueeze(-1)
    shift = second.mean - first.mean
    covariance = torch.lerp(first.covariance, second.covariance, weight.unsqueeze(-1))
    covariance += (weight * (1 - weight) * shift).unsqueeze(-1) * shift.unsqueeze(-2)
    return Moments(total, first.effective_rows + second.effective_rows, first.mean + weight * shift, covariance)
