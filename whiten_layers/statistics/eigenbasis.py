"""Eigenvectors of a running second moment."""

from typing import Any

import torch
from torch import Tensor

from ..inverse import Inverse, Method
from ..inverse.eigh import decompose
from .covariance import FeatureCovariance
from .whitening_factor import Damped, RefreshResult, WhiteningFactor


def _eigenvectors(moment: Tensor) -> Inverse:
    return Inverse(decompose(moment)[1])


class Eigenbasis(WhiteningFactor):
    """Running second moment about zero, and its eigenvectors as of the last refresh, in the columns of ``precision``.

    A refresh is that of a `WhiteningFactor`, also over processes, but for what is computed: no inverse power. Of equal
    eigenvalues any basis may come out. Until the first refresh the basis is that of the features themselves.

    Args:
        groups, channels, taps, options: as for `FeatureCovariance`.
    """

    nonnegative = (*FeatureCovariance.nonnegative, "scale")
    is_symmetric = False
    inversion = Method(_eigenvectors, 1, powers=(), operations=9)

    def __init__(self, groups: int, channels: int, taps: int = 1, **options: Any) -> None:
        fixed: dict[str, Any] = {"method": "eigh", "power": 0.5, "damping": 0.0, "rescale": False, "center": False}
        super().__init__(groups, channels, taps, **fixed, **options)
        self.method = "eigenbasis"

    def damped(self, times: float = 1, dtype: torch.dtype | None = None) -> Damped:
        matrix, diagonal, variance = super().damped(times, dtype)
        if self._padding:  # eigenvectors come in the order of their values: what fills up a block stays last
            last = matrix.diagonal(dim1=-2, dim2=-1)[self.blocks - 1 :: self.blocks, -self._padding :]
            last.add_(2 * self.features)  # the trace is the number of features
        return Damped(matrix, diagonal, variance)

    def scale_inverse(self, inverse: Inverse, damped: Damped) -> RefreshResult:
        vectors = inverse.matrix
        valid = torch.isfinite(self.group_sum(vectors.sum((-2, -1))))
        return RefreshResult(valid.int(), torch.zeros_like(valid), torch.ones_like(self.scale), vectors)

    def rotate(self, rows: Tensor) -> Tensor:
        """Express rows ``(groups, n, features)`` in the basis."""
        return self.product(rows, self.precision)

    def rotate_back(self, rows: Tensor) -> Tensor:
        """Undo `rotate`."""
        return self.product(rows, self.precision.mT)

    def extra_repr(self) -> str:
        sizes = {"groups": self.groups, "blocks": self.blocks}
        return ", ".join([str(self.features), *(f"{name}={number}" for name, number in sizes.items() if number > 1)])
