"""Optimal input gains (arXiv 2303.17732), extended by this library to any layer of a deep network.

The paper scales the columns of a direction D, one for each input feature m of a hidden layer, by gains r that minimise
a Gauss–Newton model of the error (`whiten_layers.two_stage`). Here the same is done for a layer ``y = W x + b``
anywhere in a network, from what backward has at hand: its inputs x and the gradients δ of its outputs. The bias is the
column of a feature that is always 1. To first order, a step against ``D diag(r)`` lowers the loss of row p by the sum
over m of r_m times

    v_pm = x_pm Σ_k δ_pk D_km                     whose sum over p is  g_m = Σ_k G_km D_km,  G = Σ_p δ_p x_pᵀ

The loss is not known here, so the empirical Fisher matrix replaces Gauss–Newton. Its curvature along the gains is
``H = E[v vᵀ]``. (If x and δ are independent, that is ``R ∘ (Dᵀ Δ D)``, with R and Δ the second moments of x and δ.
Using the rows themselves costs little more and assumes nothing.) So the model to minimise is

    ½ rᵀ H r − cᵀ r,        c = E[v],  H = E[v vᵀ]

Both c and H follow from the mean and the covariance of the rows v, which `FeatureCovariance` keeps. As for a covariance
of inputs, the rows of several batches, and of several processes, are pooled.

**A fixed linear map.** The paper solves for the gains of one gradient. Here c and H are means over the batches so far,
and the gains apply to every gradient until the next refresh. That requires two changes.

- *Gains are at least 0.* Near a minimum, an error e in the weights has the gradient ``e R``. A step leaves the error
  ``e − η e R diag(r)``. ``R diag(r)`` is similar to ``R^½ diag(r) R^½``, which by Sylvester's law has as many negative
  eigenvalues as r has negative entries. So a fixed map with a negative entry diverges for every η > 0. (For whitened
  directions, ``R P diag(r)``, the same holds where P and R commute.) So r minimises the model over ``r ≥ 0``.
- *Damping leads to the plain gradient.* The function minimised is ``½ rᵀ H r − cᵀ r + ½ λ h ‖r − z‖²``, with h the mean
  of H's diagonal and ``z = Σ c_m / Σ H_mu`` the best gain that all features could share. So a singular H has a
  solution. A feature that is never active, about which v says nothing, has the gain z. λ → ∞ is the plain gradient.
  Strong damping is needed: the features behind a rectifier rise and fall together. With λ = 0.03 half of the gains in a
  ResNet-20 are 0 at any time. Their columns stand still, and it trains more slowly than with the plain gradient.

**Scale.** The rows v of each batch are divided by ``√E‖v‖²``, so that batches count alike: whatever factor the loss
has, whether it is a sum or a mean, however large the gradients currently are, and when the map before the gains
changes. This makes the scale of r arbitrary. As `FeatureWhitening` does with `rescale`, it is chosen such that the
gradient keeps its norm on average: with ``c_m = E Σ_k G_km²`` (for D = G, in those units), ``Σ c_m r_m² = Σ c_m``. For
whitened directions, c is the norm in the metric of the map before. A column whose c is not positive counts as 0.
"""

from collections.abc import Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from .._torch.function_transforms import call_on_plain_tensors, sum_over_samples
from .._torch.precision import full_precision
from ..options import check, check_statistics, is_real
from ..refresh.schedule import observation_interval
from ..state import COUNT
from ..statistics.covariance import SolvedStatistics, moments, snapshot_for_graph
from ..statistics.patches import Geometry, channel_rows, linear_rows, output_sizes, patch_rows
from .base import GradientTransform, Samples

PATIENCE = 3  # exchanges of whole sets without progress, before single indices are exchanged


def nonnegative_minimum(matrix: Tensor, slope: Tensor) -> Tensor:
    """Minimise ``½ rᵀ A r − cᵀ r`` over r ≥ 0, for n symmetric positive definite A ``(n, M, M)`` and c ``(n, M)``.

    Block principal pivoting (Portugal, Júdice & Vicente 1994): solve for the free entries, with the others at 0. Then
    exchange the free entries that are negative and the others at which the model still descends. If their number does
    not decrease for `PATIENCE` steps, exchange only the last one, which ends after finitely many steps (Murty 1974).
    At most 3 M + 10 steps are taken. NaN where A is singular or the steps run out.
    """
    free, counts = torch.ones_like(slope, dtype=torch.bool), torch.arange(1, slope.shape[1] + 1, device=slope.device)
    fewest = torch.full_like(slope[:, 0], slope.shape[1] + 1)
    patience = torch.full_like(fewest, PATIENCE)
    gains = slope
    for _ in range(3 * slope.shape[1] + 10):
        both = free.unsqueeze(1) & free.unsqueeze(2)
        # Rows of entries held at 0 are the identity's.
        system = torch.where(both, matrix, torch.diag_embed((~free).to(matrix)))
        gains, info = torch.linalg.solve_ex(system, (slope * free).unsqueeze(-1))
        gains = torch.where(info[:, None] == 0, gains.squeeze(-1), torch.nan)
        products = matrix @ gains.unsqueeze(-1)
        rounding = torch.finfo(slope.dtype).eps * slope.shape[1] * slope.abs().amax(1, keepdim=True)
        wrong = torch.where(free, gains < 0, products.squeeze(-1) < slope - rounding)
        number = wrong.sum(1)
        if not number.any():
            break
        gains = torch.where((number > 0).unsqueeze(1), torch.nan, gains)  # unless a later step solves it
        lessened = number < fewest
        fewest = torch.minimum(fewest, number.to(fewest))
        patience = torch.where(lessened, PATIENCE, patience - 1)
        last = (wrong * counts).amax(1, keepdim=True) == counts
        free = free ^ (wrong & ((patience >= 0).unsqueeze(1) | last))
    return gains.clamp(min=0)


class Gains(SolvedStatistics):
    """Mean and covariance of the rows v (see the module's docstring), and the current gains computed from them.

    Args:
        groups, features: shape of the gains.
        damping, decay: as for `OptimalInputGain`.

    Buffers, besides the statistics: ``gains`` (groups, features), 1 until the first refresh; ``num_refreshes`` and
    ``num_refreshes_failed`` ().
    """

    nonnegative = (*SolvedStatistics.nonnegative, "gains")
    gains: Tensor
    num_refreshes: Tensor
    num_refreshes_failed: Tensor

    def __init__(
        self,
        groups: int,
        features: int,
        *,
        damping: float,
        decay: float,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(groups, features, decay=decay, device=device, dtype=dtype)
        self.damping = damping
        self.register_buffer("gains", torch.ones_like(self.running_mean))
        for name in ("num_refreshes", "num_refreshes_failed"):
            self.register_buffer(name, torch.zeros((), device=device, dtype=COUNT))

    @torch.no_grad()
    def reset_state(self) -> None:
        """Reset every buffer to its initial value."""
        self.clear()
        self.gains.fill_(1)

    def model(self) -> tuple[Tensor, Tensor]:
        """Return the damped model's matrix ``H + λ h I`` (groups, M, M) and slope ``c + λ h z`` (groups, M).

        Both are scaled to mean diagonal 1 and common gain z = 1: ``r → r / z`` with ``H → H / h``.
        """
        slope = self.running_mean
        curvature = self.running_covariance + slope.unsqueeze(-1) * slope.unsqueeze(-2)
        level = curvature.diagonal(dim1=-2, dim2=-1).mean(-1)
        curvature = curvature / level[:, None, None]
        total = slope.sum(-1, keepdim=True)
        slope = slope * curvature.sum((-2, -1)).unsqueeze(-1) / total  # c / (h z)
        slope = torch.where(total > 0, slope, torch.nan)  # a direction that does not descend has no gains
        curvature.diagonal(dim1=-2, dim2=-1).add_(self.damping)
        return curvature, slope + self.damping

    @staticmethod
    def renew(those: "Sequence[Gains]", elapsed: int) -> None:
        for one in those:
            if one.close_window(elapsed):
                one.solve_in_place()

    @torch.no_grad()
    def solve_in_place(self) -> None:
        """Bring the gains up to date."""
        with full_precision():
            matrix, slope = self.model()
            known = torch.isfinite(slope).all(-1) & torch.isfinite(matrix).flatten(1).all(-1)
            identity = torch.eye(slope.shape[1]).to(matrix)
            gains = nonnegative_minimum(
                torch.where(known[:, None, None], matrix, identity), torch.where(known[:, None], slope, 1)
            )
        weights = self.running_mean.clamp(min=0)
        gains = gains * (weights.sum(-1) / (weights * gains.square()).sum(-1)).sqrt().unsqueeze(-1)
        valid = known & torch.isfinite(gains).all(-1)
        self.gains.copy_(torch.where(valid[:, None], gains, self.gains))
        self.num_refreshes.add_(valid.all())
        # A group without observations has not failed.
        self.num_refreshes_failed.add_((~valid & (self.running_count > 0)).any())

    def extra_repr(self) -> str:
        return ", ".join(str(size) for size in self.gains.shape)


class OptimalInputGain(GradientTransform):
    """Transform that scales each input channel's part of the gradient by its optimal gain.

    Each input feature of a linear layer, or input channel of a convolution (its taps share it), has one gain, and so
    has the bias. Among gains of at least 0 they minimise a Gauss–Newton model of the loss. The module's docstring
    derives it, and tells what is the paper's and what is this library's own. In a chain they scale the result of the
    transforms before, and are solved for that: ``Chain(FeatureWhitening(), OptimalInputGain())`` is the paper's
    OIG-HWO.

    Args:
        damping: λ, at least 0: how strongly the gains are held together, as a multiple of the mean curvature. Low
            values (0.03) suit a single layer or a regression on features of unequal scales, not a deep network.
        decay: weight of the past at each batch, as for `FeatureWhitening`.
        update_interval: batches between two refreshes of the gains; at first after 1, 2, 4, 8, … batches.
        statistics_interval: batches between two that are observed; at first after 1, 2, 4, 8, … batches.
        max_rows: rows sampled from each observed batch; None for all. For a convolution these are positions, whose
            whole patches are unfolded.

    Raises:
        ValueError: an option has an invalid value; the message names it, its value and the choices.

    State, after `bind`: ``slopes``, a `Gains` with ``in_channels + 1`` features per group, the bias last.

    A refresh solves a few systems of that size, in every process for itself. Processes that train one model have the
    same gains, computed from all their rows. But each row's v uses its own process's gradient, before these are
    averaged. So the gains are those of batches as large as one process's.
    """

    geometry: Geometry
    observes_output = True

    def __init__(
        self,
        *,
        damping: float = 10.0,
        decay: float = 0.95,
        update_interval: int = 10,
        statistics_interval: int = 10,
        max_rows: int | None = 1024,
    ) -> None:
        super().__init__()
        check("damping", damping, is_real(damping) and damping >= 0, "a number of at least 0")
        check_statistics(decay, update_interval, statistics_interval, max_rows)
        self.damping, self.decay, self.max_rows = damping, decay, max_rows
        self.update_interval, self.statistics_interval = update_interval, statistics_interval
        self._forget()

    def _forget(self) -> None:
        # Of a batch that is due for statistics, kept until `observe` knows whether it is valid.
        self._grad_output: Tensor | None = None
        self._direction: tuple[Tensor, ...] | None = None

    def bind(self, geometry: Geometry, *, device: torch.device, dtype: torch.dtype) -> Self:
        self.geometry = geometry
        self.bind_counters(device)
        self.slopes = Gains(
            geometry.groups,
            geometry.in_channels + 1,
            damping=self.damping,
            decay=self.decay,
            device=device,
            dtype=torch.promote_types(dtype, torch.float32),
        )
        return self

    def pending(self) -> dict[str, Any]:
        return {"_grad_output": None, "_direction": None}

    def reset_state(self) -> None:
        self.reset_counters()
        self._forget()
        self.slopes.reset_state()

    def transform(
        self, grad_weight: Tensor, grad_bias: Tensor | None, weight: Tensor | None, samples: Samples | None = None
    ) -> tuple[Tensor, Tensor | None]:
        if self._grad_output is not None:
            # The arguments are the direction: the gradient, or the result of the transforms before.
            call_on_plain_tensors(self._take_direction, grad_weight, *([] if grad_bias is None else [grad_bias]))
        dtype = torch.promote_types(grad_weight.dtype, torch.float32)
        gains = snapshot_for_graph(self.slopes.gains).to(dtype)
        matrix = self.geometry.matrix(grad_weight).to(dtype) * gains[:, None, :-1, None]
        matrix = self.geometry.weight(matrix, grad_weight).to(grad_weight.dtype)
        if grad_bias is None:
            return matrix, None
        bias = grad_bias.reshape(len(gains), -1).to(dtype) * gains[:, -1:]
        return matrix, bias.flatten().to(grad_bias.dtype)

    def _take_direction(self, *direction: Tensor) -> None:
        dims = (2 + self.geometry.spatial_dims, 1)
        pairs = zip(direction, dims, strict=False)
        self._direction = tuple(sum_over_samples(part.detach(), dim).clone() for part, dim in pairs)

    def observe_output(self, grad_output: Tensor) -> None:
        self.schedule.begin_batch(self, announced=True)
        self._forget()
        if grad_output.numel() > 0 and self.schedule.statistics_are_due(self):
            # Copy: a compiled graph may reuse the memory once the operation has returned.
            self._grad_output = grad_output.detach().clone()

    def observe(self, input: Tensor, grad_weight: Tensor) -> None:
        batch = self.schedule.begin_batch(self)
        if input.numel() > 0:
            valid = torch.isfinite(grad_weight.sum(dtype=torch.promote_types(grad_weight.dtype, torch.float32)))
            if self._grad_output is not None and self._direction is not None:
                rows, known = self._rows(input, self._grad_output, self._direction, batch)
                valid = self._observe_rows(rows, known, valid)
            self.num_batches_skipped.add_(valid.logical_not())
        self._forget()
        self.schedule.end_batch(self)

    def _observe_rows(self, rows: Tensor, known: Tensor, valid: Tensor) -> Tensor:
        batch = moments(rows)
        finite = torch.isfinite(batch.covariance.diagonal(dim1=-2, dim2=-1).sum(-1)) | ~known
        valid = valid & finite.all()
        self.slopes.observe(batch, known & valid)
        return valid

    def _rows(
        self, input: Tensor, grad_output: Tensor, direction: tuple[Tensor, ...], batch: int
    ) -> tuple[Tensor, Tensor]:
        """Compute a batch's rows v ``(groups, n, C + 1)``, and which groups have any but 0: not where δ = 0."""
        geometry, phase = self.geometry, batch // observation_interval(batch, self.statistics_interval)
        dtype = self.slopes.gains.dtype
        if geometry.spatial_dims == 0:
            inputs, outputs = (linear_rows(tensor, self.max_rows, phase) for tensor in (input, grad_output))
        else:
            # Crop the positions that an `output_size` adds: they have no patches.
            sizes = output_sizes(geometry, input.shape[-geometry.spatial_dims :])
            pairs = zip(sizes, grad_output.shape[-geometry.spatial_dims :], strict=True)
            grad_output = F.pad(grad_output, [side for size, now in reversed([*pairs]) for side in (0, size - now)])
            inputs = patch_rows(input, geometry, self.max_rows, phase)
            outputs = channel_rows(grad_output, geometry.groups, geometry.spatial_dims, self.max_rows, phase)
        inputs, outputs = inputs.to(dtype), outputs.to(dtype)
        # First divide by the largest number of each, so that the dtype can hold the squares.
        outputs, matrix = _unit(outputs), geometry.matrix(direction[0]).to(dtype).flatten(2)
        bias = None if len(direction) == 1 else direction[1].to(dtype).view(geometry.groups, -1, 1)
        largest = matrix.abs().amax((1, 2), keepdim=True)
        if bias is not None:
            largest = torch.maximum(largest, bias.abs().amax((1, 2), keepdim=True))
        largest = torch.where(largest == 0, 1, largest)
        with full_precision():
            rows = outputs @ (matrix / largest) * inputs
            rows = rows.unflatten(-1, (geometry.in_channels, -1)).sum(-1)
            rows = F.pad(rows, (0, 1)) if bias is None else torch.cat([rows, outputs @ (bias / largest)], -1)
        level = rows.square().sum(-1).mean(-1).sqrt()
        known = level != 0  # True also where it is not finite, which makes the batch invalid
        return rows / torch.where(known, level, 1)[:, None, None], known

    def extra_repr(self) -> str:
        return f"optimal gains, damping={self.damping}"


def _unit(rows: Tensor) -> Tensor:
    """Divide rows ``(groups, n, S)`` by each group's largest absolute value."""
    largest = rows.abs().amax((1, 2), keepdim=True)
    return rows / torch.where(largest == 0, 1, largest)
