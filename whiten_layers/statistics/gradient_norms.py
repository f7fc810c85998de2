"""Measurement of what a transform does to gradients, on batches that it was not computed from."""

import torch
from torch import Tensor

from .covariance import Moments, SolvedStatistics, snapshot_for_graph

EARLY = 3  # batches, after which a norm may count twice as much as the limit
WAITING = 256  # measurements that wait at most
FASTER = 10  # times as fast as the statistics of features: norms are single numbers, known well from a few batches


class GradientNorms(SolvedStatistics):
    """Running means of what a transform does to gradients, and the numbers that follow from them.

    A factor's scale k keeps the *expected* component of a gradient along the plain one: expected from the rows that its
    inverse was computed from, and for an upstream gradient that does not depend on the input. Neither holds exactly. So
    each batch that is observed measures ``⟨Ĝ, G⟩ / ‖G‖²``, with the transform of the batches before it and without
    the correction. ``correction`` makes the mean of its logarithm 0. Only the ratio counts, so loss scaling cancels.
    The first batch, which nothing maps yet, counts as a ratio of 1: a single measurement is not trusted in full.

    ``limit`` is `bound` times the root mean square of ‖G‖. A norm counts as no more than the limit of the day, so a few
    long gradients do not raise it. What stays long does, slowly: with the default decay of 0.99, of which norms take
    the tenth power, and a bound of 1.2 the limit doubles in 34 batches. It does faster as long as few batches are
    known, since gradients may well grow then: those of a network whose last layer starts at zero do.

    ``mixed_from`` is the norm from which a transformed gradient is mixed with the plain one: the limit or, if that is
    more, the usual ‖Ĝ‖: the root mean square of ‖G‖ times the geometric mean of ``‖Ĝ‖ / ‖G‖``. For where inputs have
    very unequal variances Ĝ is longer than G in every batch, and only the unusual ones are to be mixed. A ratio does
    not grow with a spike, as a mean of ‖Ĝ‖ would.

    Between two refreshes all are fixed numbers.

    Args:
        bound: at least 1; None for no limit.
        rescale: whether there is a correction; 1 otherwise. What it would be is measured all the same.
        decay: of the features' statistics, which norms follow `FASTER`.
        device, dtype: as for `FeatureCovariance`, of which this is one of three features.

    Buffers, beside the statistics: ``correction`` (), ``limit`` () and ``mixed_from`` (). Until the first refresh they
    are 1, and 0 for no limit.
    """

    nonnegative = (*SolvedStatistics.nonnegative, "correction", "limit", "mixed_from")
    correction: Tensor
    limit: Tensor
    mixed_from: Tensor

    def __init__(
        self,
        *,
        bound: float | None,
        rescale: bool,
        decay: float,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(1, 3, decay=decay**FASTER, device=device, dtype=dtype)
        self.bound, self.rescale = bound, rescale
        self.register_buffer("correction", torch.ones((), device=device, dtype=dtype))
        self.register_buffer("limit", torch.zeros((), device=device, dtype=dtype))
        self.register_buffer("mixed_from", torch.zeros((), device=device, dtype=dtype))

    @torch.no_grad()
    def reset_state(self) -> None:
        """Set every buffer to what it was when made."""
        self.clear()
        self.correction.fill_(1)

    def current_correction(self) -> Tensor | None:
        """Return the correction, to be multiplied by a gradient; None for 1."""
        return snapshot_for_graph(self.correction) if self.rescale else None

    def usual_component(self) -> Tensor:
        """Compute the geometric mean () of ``⟨Ĝ, G⟩ / ‖G‖²``, without the correction; 1 where none was measured."""
        return self.running_mean[0, 0].exp()

    def observe_gradient(self, norm: Tensor, product: Tensor, mapped: Tensor, valid: Tensor | bool) -> None:
        """Take a gradient into the window: ‖G‖, and ``⟨Ĝ, G⟩`` and ‖Ĝ‖ with the correction.

        A component of 0, or one that is not positive, has no logarithm: such a gradient is left out. What follows from
        the three numbers is computed later, for many gradients at once.
        """
        if valid is not False:
            self._window.measured.append(((norm, product, mapped), valid))
            if len(self._window.measured) == WAITING:
                self._make_rows()

    def _make_rows(self) -> None:
        measured, self._window.measured = self._window.measured, []
        if not measured:
            return
        numbers = torch.stack([number for three, _ in measured for number in three])
        norm, product, mapped = numbers.view(-1, 3).unbind(1)
        most = self.limit * (1 + EARLY / self.running_count.squeeze())
        counted = torch.where(self.limit > 0, torch.minimum(norm, most), norm)
        component = product / norm / norm / self.correction
        rows = torch.stack([component.log(), (mapped / norm).log(), counted], 1)
        finite = torch.isfinite(rows).all(1)
        is_known = finite.is_cpu and all(valid is True for _, valid in measured)  # without waiting
        if is_known:
            rows = rows[finite]
        else:
            valid = torch.stack([torch.as_tensor(valid, device=rows.device) for _, valid in measured])
            rows = torch.where((finite & valid).unsqueeze(1), rows, torch.nan)  # to be left out
        if len(rows):
            self._append(rows.unsqueeze(0), 1, not is_known)

    def _moments(self, rows: Tensor, size: int, known: Tensor | None) -> Moments:
        """Compute means and variances, which are all that is needed."""
        known = rows.new_ones(rows.shape[:2]) if known is None else known
        number, counts = known.sum(1).to(rows), known.unsqueeze(-1) > 0
        total = number.clamp(min=1).unsqueeze(-1)
        mean = torch.where(counts, rows, 0).sum(1) / total
        variance = torch.where(counts, rows - mean.unsqueeze(1), 0).square().sum(1) / total
        return Moments(number, number, mean, torch.diag_embed(variance))

    @torch.no_grad()
    def solve_in_place(self) -> None:
        mean, variance = self.running_mean[0], self.running_covariance[0].diagonal()
        if self.rescale:
            self.correction.copy_((-mean[0]).exp())
        if self.bound is not None:
            usual = (mean[2].square() + variance[2]).sqrt()
            self.limit.copy_(self.bound * usual)
            self.mixed_from.copy_(usual * mean[1].exp().clamp(min=self.bound))

    def extra_repr(self) -> str:
        return f"bound={self.bound}"
