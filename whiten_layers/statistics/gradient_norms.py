"""Measurement of what a transform does to gradients, on batches that it was not computed from."""

import torch
from torch import Tensor

from .covariance import SolvedStatistics, snapshot_for_graph

EARLY = 3  # batches, after which a norm may count twice as much as the limit


class GradientNorms(SolvedStatistics):
    """Running means of what a transform does to gradients, and the two numbers that follow from them.

    A factor's scale k keeps the *expected* component of a gradient along the plain one: expected from the rows that its
    inverse was computed from, and for an upstream gradient that does not depend on the input. Neither holds exactly. So
    each batch that is observed measures ``⟨Ĝ, G⟩ / ‖G‖²``, with the transform of the batches before it and without
    the correction. ``correction`` makes the mean of its logarithm 0. Only the ratio counts, so loss scaling cancels.
    The first batch, which nothing maps yet, counts as a ratio of 1: a single measurement is not trusted in full.

    ``limit`` is `bound` times the root mean square of ‖G‖. A norm counts as no more than the limit of the day, so a few
    long gradients do not raise it. What stays long does, slowly: with a decay of 0.99 and a bound of 1.4 the limit
    doubles in 145 batches. It does faster as long as few batches are known, since gradients may well grow then: those
    of a network whose last layer starts at zero do.

    Between two refreshes both are fixed numbers.

    Args:
        bound: at least 1; None for no limit.
        rescale: whether there is a correction; 1 otherwise.
        decay, device, dtype: as for `FeatureCovariance`, of which this is one of two features.

    Buffers, beside the statistics: ``correction`` () and ``limit`` (). Until the first refresh they are 1, and 0 for no
    limit.
    """

    correction: Tensor
    limit: Tensor

    def __init__(
        self,
        *,
        bound: float | None,
        rescale: bool,
        decay: float,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(1, 2, decay=decay, device=device, dtype=dtype)
        self.bound, self.rescale = bound, rescale
        self.register_buffer("correction", torch.ones((), device=device, dtype=dtype))
        self.register_buffer("limit", torch.zeros((), device=device, dtype=dtype))

    @torch.no_grad()
    def reset_state(self) -> None:
        """Set every buffer to what it was when made."""
        self.clear()
        self.correction.fill_(1)

    def current_correction(self) -> Tensor | None:
        """Return the correction, to be multiplied by a gradient; None for 1."""
        return snapshot_for_graph(self.correction) if self.rescale else None

    def observe_gradient(self, norm: Tensor, component: Tensor, valid: Tensor | bool) -> None:
        """Take a gradient into the window: ‖G‖, and ``⟨Ĝ, G⟩ / ‖G‖²`` with the correction.

        A component of 0, or one that is not positive, has no logarithm: such a gradient is left out.
        """
        most = self.limit * (1 + EARLY / self.running_count.squeeze())
        norm = torch.where(self.limit > 0, torch.minimum(norm, most), norm)
        self.observe_rows(torch.stack([(component / self.correction).log(), norm]).view(1, 1, 2), valid=valid)

    @torch.no_grad()
    def solve_in_place(self) -> None:
        mean, variance = self.running_mean[0], self.running_covariance[0].diagonal()
        if self.rescale:
            self.correction.copy_((-mean[0]).exp())
        if self.bound is not None:
            self.limit.copy_(self.bound * (mean[1].square() + variance[1]).sqrt())

    def extra_repr(self) -> str:
        return f"bound={self.bound}"
