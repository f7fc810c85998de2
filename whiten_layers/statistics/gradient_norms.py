"""Measurement of what a transform does to gradients, on batches that it was not computed from."""

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from .._torch.operations import copy_each
from .covariance import (
    RUNNING,
    Moments,
    SolvedStatistics,
    aged,
    is_in_range,
    merged,
    of_valid_groups,
    zero_moments,
)

EARLY = 3  # batches, after which a norm may count twice as much as the limit
WAITING = 256  # measurements that wait at most
FASTER = 10  # times as fast as the statistics of features: norms are single numbers, known well from a few batches


class Measurement:
    """Numbers that tell what a transform does to a gradient: ‖G‖, ``⟨Ĝ, G⟩`` and ‖Ĝ‖, each ().

    Args:
        plain: G, of any shape.
        mapped: Ĝ, of the same.
    """

    __slots__ = ("_pair", "_product", "mapped_norm", "norm")

    def __init__(self, plain: Tensor, mapped: Tensor) -> None:
        self._pair = plain, mapped
        self._product: Tensor | None = None
        self.norm, self.mapped_norm = torch.linalg.vector_norm(plain), torch.linalg.vector_norm(mapped)

    def product(self) -> Tensor:
        """Compute ``⟨Ĝ, G⟩``, which in some batches nobody asks for."""
        if self._product is None:
            plain, mapped = self._pair
            self._product = torch.dot(plain.detach().flatten(), mapped.detach().flatten())
        return self._product


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

    def usual_component(self) -> Tensor:
        """Compute the geometric mean () of ``⟨Ĝ, G⟩ / ‖G‖²``, without the correction; 1 where none was measured."""
        return self.running_mean[0, 0].exp()

    def observe_gradient(self, measured: Measurement, valid: Tensor | bool) -> None:
        """Take a gradient into the window, as it was mapped with the correction.

        A component of 0, or one that is not positive, has no logarithm: such a gradient is left out. What follows from
        the three numbers is computed later, for many gradients at once.
        """
        if valid is not False:
            self._window.measured.append(((measured.norm, measured.product(), measured.mapped_norm), valid))
            if len(self._window.measured) == WAITING:
                self._make_rows()

    def _make_rows(self) -> None:
        if not self._window.measured:
            return
        rows, known = _rows([self])
        self._window.measured = []
        if known is None or known.is_cpu:  # to be indexed without waiting
            rows = rows if known is None else rows[:, known[0]]
        else:
            rows = torch.where(known.unsqueeze(-1), rows, torch.nan)  # to be left out
        if rows.shape[1]:
            self._append(rows, 1, known is not None and not known.is_cpu)

    def _moments(self, rows: Tensor, size: int, known: Tensor | None) -> Moments:
        return _means_and_variances(rows, known)

    @staticmethod
    @torch.no_grad()
    def renew(those: "Sequence[GradientNorms]", elapsed: int) -> None:
        alike = defaultdict(list)
        for one in those:
            alike[one.limit.device, one.limit.dtype, one.decay, one.bound, one.rescale].append(one)
        for together in alike.values():
            _renew(together, elapsed)

    def extra_repr(self) -> str:
        return f"bound={self.bound}"


def _rows(those: Sequence[GradientNorms]) -> tuple[Tensor, Tensor | None]:
    """Compute the rows of what norms have measured, as many times each: ``(norms, times, 3)``.

    Returns:
        The rows, and which of them count, ``(norms, times)``; None for all.
    """
    measured = [measurement for one in those for measurement in one._window.measured]
    numbers = torch.stack([number for three, _ in measured for number in three])
    norm, product, mapped = numbers.view(len(those), -1, 3).unbind(-1)
    limit, correction = (
        torch.stack(parts).unsqueeze(1) for parts in zip(*[(one.limit, one.correction) for one in those], strict=True)
    )
    most = limit * (1 + EARLY / torch.stack([one.running_count for one in those]))
    counted = torch.where(limit > 0, torch.minimum(norm, most), norm)
    component = product / norm / norm / correction
    rows = torch.stack([component.log(), (mapped / norm).log(), counted], -1)
    known = torch.isfinite(rows).all(-1)
    if not all(valid is True for _, valid in measured):
        valid = torch.stack([torch.as_tensor(valid, device=rows.device) for _, valid in measured])
        known = known & valid.view_as(known)
    return rows, None if known.is_cpu and known.all() else known


def _means_and_variances(rows: Tensor, known: Tensor | None) -> Moments:
    """Compute of the moments of rows ``(norms, times, 3)`` all that is needed."""
    known = rows.new_ones(rows.shape[:2]) if known is None else known
    number, counts = known.sum(1).to(rows), known.unsqueeze(-1) > 0
    total = number.clamp(min=1).unsqueeze(-1)
    mean = torch.where(counts, rows, 0).sum(1) / total
    variance = torch.where(counts, rows - mean.unsqueeze(1), 0).square().sum(1) / total
    return Moments(number, number, mean, torch.diag_embed(variance))


def _windows_of(those: Sequence[GradientNorms]) -> Moments:
    """Return the windows of norms, one below the other."""
    windows = [one._window for one in those]
    times = {len(window.measured) for window in windows}
    if len(times) == 1 and times != {0} and not any(window.moments or window.pending for window in windows):
        return _means_and_variances(*_rows(those))
    each = [one.window or zero_moments(one.running_mean) for one in those]
    return Moments(*map(torch.cat, zip(*each, strict=True)))


def _renew(those: Sequence[GradientNorms], elapsed: int) -> None:
    """Do for all norms together, of the same options, what is to be done for each: networks have many layers."""
    first, window = those[0], _windows_of(those)
    running = Moments(*(torch.cat([getattr(one, name) for one in those]) for name in RUNNING))
    for one in those:
        one.window = None
    window = of_valid_groups(is_in_range(window, running.mean), window)
    running = merged(aged(running, window, first.decay**elapsed), window)
    renewed: dict[str, Tensor] = dict(zip(RUNNING, running, strict=True))
    component, ratio, norm = running.mean.unbind(-1)
    if first.rescale:
        renewed["correction"] = (-component).exp()
    if first.bound is not None:
        usual = (norm.square() + running.covariance[:, 2, 2]).sqrt()
        renewed |= {"limit": first.bound * usual, "mixed_from": usual * ratio.exp().clamp(min=first.bound)}
    targets = [getattr(one, name) for name in renewed for one in those]
    sources = [value for values in renewed.values() for value in values]
    copy_each(targets, [value.view_as(target) for value, target in zip(sources, targets, strict=True)])
