"""Measurement of what a transform does to the norm of a gradient, on batches that it was not computed from."""

import torch
from torch import Tensor

from .covariance import SolvedStatistics, snapshot_for_graph


class NormRatio(SolvedStatistics):
    """Running mean of ``log(‖Ĝ‖ / ‖G‖)``, and the factor ``correction`` that makes it 0.

    A factor's scale k keeps the *expected* norm of a gradient: expected from the rows that its inverse was computed
    from, and for an upstream gradient that does not depend on the input. Neither holds exactly. So the ratio is
    measured at every batch that is observed, with the transform of the batches before, and without the correction.
    Only the ratio counts, so loss scaling cancels. Between two refreshes the correction is a fixed number.

    Args:
        decay, device, dtype: as for `FeatureCovariance`, of which this is one of a single feature.

    Buffers, beside the statistics: ``correction`` (), 1 until the first refresh after a measurement.
    """

    correction: Tensor

    def __init__(self, *, decay: float, device: torch.device | None = None, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(1, 1, decay=decay, device=device, dtype=dtype)
        self.register_buffer("correction", torch.ones((), device=device, dtype=dtype))

    @torch.no_grad()
    def reset_state(self) -> None:
        """Set every buffer to what it was when made."""
        self.clear()
        self.correction.fill_(1)

    def current_correction(self) -> Tensor:
        """Return the correction, to be multiplied by a gradient."""
        return snapshot_for_graph(self.correction)

    def observe_norms(self, plain: Tensor, transformed: Tensor, valid: Tensor | bool) -> None:
        """Take the norms of a gradient before and after the transform, with the correction, into the window."""
        self.observe_rows((transformed / (plain * self.correction)).log().view(1, 1, 1), valid=valid)

    @torch.no_grad()
    def solve_in_place(self) -> None:
        self.correction.copy_((-self.running_mean).exp().squeeze())

    def extra_repr(self) -> str:
        return ""
