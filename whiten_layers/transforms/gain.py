"""Optimal input gains (arXiv 2303.17732), as this library's extension to any layer of a deep network.

In the paper the columns of a direction D, one for each input feature m of a hidden layer, are scaled by gains r that
minimise a Gauss–Newton model of the error (`whiten_layers.two_stage`). Here the same is done for a layer
``y = W x + b`` somewhere in a network, from what is at hand in backward: its inputs x and the gradients δ of its
outputs. With the bias as the column of a feature that is always 1, a step against ``D diag(r)`` lowers the loss of
row p, to first order, by the sum over m of r_m times

    v_pm = x_pm Σ_k δ_pk D_km                     whose sum over p is  g_m = Σ_k G_km D_km,  G = Σ_p δ_p x_pᵀ

and the empirical Fisher matrix, which stands in for Gauss–Newton where the loss is not known, has the curvature
``H = E[v vᵀ]`` along the gains. (Where x and δ are independent that is ``R ∘ (Dᵀ Δ D)``, of the second moments R of x
and Δ of δ; the rows themselves cost little more and assume nothing.) So the model to be minimised is

    ½ rᵀ H r − cᵀ r,        c = E[v],  H = E[v vᵀ]

and both follow from the mean and the covariance of the rows v, which is what `FeatureCovariance` keeps: as with a
covariance of inputs, the rows of several batches, and of several processes, are put together.

**A fixed linear map.** The paper solves for the gains of one gradient. Here c and H are means over the batches so far,
and the gains that follow are in force until the next refresh, whatever gradients come. That asks for two changes.

- *Gains are at least 0.* Near a minimum the gradient of an error e in the weights is ``e R``, and what is left of it
  after a step ``e − η e R diag(r)``. ``R diag(r)`` is similar to ``R^½ diag(r) R^½``, which by Sylvester's law has as
  many negative eigenvalues as r has negative entries: a map that keeps one diverges for every η > 0. (Of whitened
  directions, ``R P diag(r)``, the same holds where P and R commute.) So r minimises the model over ``r ≥ 0``.
- *Damping leads to the plain gradient.* What is minimised is ``½ rᵀ H r − cᵀ r + ½ λ h ‖r − z‖²``, h the mean of H's
  diagonal and ``z = Σ c_m / Σ H_mu`` the best gain that all could have in common. So a singular H has a
  solution; a feature that is never active, of which v tells nothing, has the gain z; and λ → ∞ is the plain gradient.
  Much of it is needed: the features behind a rectifier rise and fall together, and with λ = 0.03 half of the gains in
  a ResNet-20 are 0 at any time, their columns stand still, and it trains more slowly than with the plain gradient.

**Scale.** Of each batch v is divided by ``√E‖v‖²``, so that batches count alike: whatever the loss is multiplied by,
whether it is a sum or a mean, however large the gradients are by now, and when the map before the gains
changes. With it the scale of r is arbitrary; as `FeatureWhitening` does with `rescale`, it is chosen such that the
norm of the gradient stays on the mean: with ``c_m = E Σ_k G_km²`` (of D = G, in those units), ``Σ c_m r_m² = Σ c_m``.
Of whitened directions c is the norm in the metric of the map before, and a column in which it is not positive counts as
0.
"""

from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from .._torch.function_transforms import call_on_plain_tensors
from .._torch.precision import full_precision
from ..options import check, check_statistics, is_real
from ..statistics.covariance import SolvedStatistics, moments
from ..statistics.patches import Geometry, channel_rows, linear_rows, output_sizes, patch_rows
from ..statistics.whitening_factor import snapshot_for_graph
from .base import GradientTransform

PATIENCE = 3  # exchanges of whole sets that may bring nothing before one index at a time is exchanged


def nonnegative_minimum(matrix: Tensor, slope: Tensor) -> Tensor:
    """The r ≥ 0 that minimise ``½ rᵀ A r − cᵀ r``, for n symmetric positive definite A ``(n, M, M)`` and c ``(n, M)``.

    Block principal pivoting (Portugal, Júdice & Vicente 1994): solve for the entries that are free, the others being
    0; then exchange the free ones that are negative and the others whose slope asks for more. Where that does
    not lessen their number for a while only the last one is exchanged, which ends after finitely many steps (Murty
    1974); three a feature are taken at most. NaN where A is singular.
    """
    free, counts = torch.ones_like(slope, dtype=torch.bool), torch.arange(1, slope.shape[1] + 1, device=slope.device)
    fewest = torch.full_like(slope[:, 0], slope.shape[1] + 1)
    patience = torch.full_like(fewest, PATIENCE)
    gains = slope
    for _ in range(3 * slope.shape[1] + 10):
        both = free.unsqueeze(1) & free.unsqueeze(2)
        # In the rows of those that are 0: the identity.
        system = torch.where(both, matrix, torch.diag_embed((~free).to(matrix)))
        gains, info = torch.linalg.solve_ex(system, (slope * free).unsqueeze(-1))
        gains = torch.where(info[:, None] == 0, gains.squeeze(-1), torch.nan)
        products = matrix @ gains.unsqueeze(-1)
        rounding = torch.finfo(slope.dtype).eps * slope.shape[1] * slope.abs().amax(1, keepdim=True)
        wrong = torch.where(free, gains < 0, products.squeeze(-1) < slope - rounding)
        number = wrong.sum(1)
        if not number.any():
            break
        gains = torch.where((number > 0).unsqueeze(1), torch.nan, gains)  # unless a later exchange brings the end
        lessened = number < fewest
        fewest = torch.minimum(fewest, number.to(fewest))
        patience = torch.where(lessened, PATIENCE, patience - 1)
        last = (wrong * counts).amax(1, keepdim=True) == counts
        free = free ^ (wrong & ((patience >= 0).unsqueeze(1) | last))
    return gains.clamp(min=0)


class Gains(SolvedStatistics):
    """Mean and covariance of the rows v of the module's docstring, and the gains in force that follow from them.

    Args:
        groups, features: the shape of the gains.
        damping, decay: as for `OptimalInputGain`.

    Buffers, beside the statistics: ``gains`` (groups, features), 1 until the first refresh; ``num_refreshes`` and
    ``num_refreshes_failed`` ().
    """

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
            self.register_buffer(name, torch.zeros((), device=device, dtype=torch.long))

    @torch.no_grad()
    def reset_state(self) -> None:
        """Forget everything: the buffers as they were when made."""
        self.clear()
        self.gains.fill_(1)

    def model(self) -> tuple[Tensor, Tensor]:
        """The damped model's matrix ``H + λ h I`` (groups, M, M) and slope ``c + λ h z`` (groups, M), up to scale.

        Both are brought to mean diagonal 1 and common gain z = 1: ``r → r / z`` with ``H → H / h``.
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

    @torch.no_grad()
    def solve_in_place(self) -> None:
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
        # A group that has seen nothing yet has nothing to fail at.
        self.num_refreshes_failed.add_((~valid & (self.running_count > 0)).any())

    def extra_repr(self) -> str:
        return ", ".join(str(size) for size in self.gains.shape)


class OptimalInputGain(GradientTransform):
    """Scale each input channel's part of the gradient by the gain that suits it best.

    One gain for each input feature of a linear layer, for each input channel of a convolution (its taps share it), and
    one for the bias. They minimise, over gains of at least 0, a Gauss–Newton model of the loss along them; see the
    module's docstring for the model, for what it has of the paper, and for what is this library's own. In
    a chain they scale what the transforms before have made of the gradient, and are solved for that:
    ``Chain(FeatureWhitening(), OptimalInputGain())`` is the paper's OIG-HWO.

    Args:
        damping: λ, at least 0: how much the gains are held together, as a multiple of the mean curvature. Low values
            suit a single layer or a regression on features of unequal scales (0.03), not a deep network.
        decay: weight of the past at each batch, as for `FeatureWhitening`.
        update_interval: batches between two refreshes of the gains, after 1, 2, 4, 8, … at first.
        statistics_interval: batches between two that are observed, after 1, 2, 4, 8, … at first.
        max_rows: rows (positions, for a convolution, of which whole patches are unfolded) that are sampled of a batch
            that is observed; None for all.

    Raises:
        ValueError: an option is outside what is allowed; the message names it, its value and the choices.

    State, after `bind`: ``slopes``, a `Gains` of ``in_channels + 1`` features a group, the bias last.

    A refresh solves a few systems of that size; every process does so for itself. Processes that train one model have
    the same gains, from all their rows; but each row's v is taken with its own process's gradient,
    before those are averaged, so that the gains are those of batches as large as one process's.
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
        # Of a batch that is to be observed, kept until `observe` knows whether it is a good one.
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
        self, grad_weight: Tensor, grad_bias: Tensor | None, weight: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        if self._grad_output is not None:
            # What comes here is the direction: the gradient, or what the transforms before have made of it.
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
        # `torch.vmap` over samples has a gradient for each of them, and one batch all the same.
        pairs = zip(direction, dims, strict=False)
        self._direction = tuple(part.detach().sum_to_size(part.shape[-dim:]).clone() for part, dim in pairs)

    def observe_output(self, grad_output: Tensor) -> None:
        self.schedule.begin_batch(self, announced=True)
        self._forget()
        if grad_output.numel() > 0 and self.schedule.statistics_are_due(self):
            # A copy: of a compiled graph the memory is another's when the operation has returned.
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
        """The rows v ``(groups, n, C + 1)`` of a batch, and of which groups there are any: not of one with δ = 0."""
        geometry, phase = self.geometry, batch // self.statistics_interval
        dtype = self.slopes.gains.dtype
        if geometry.spatial_dims == 0:
            inputs, outputs = (linear_rows(tensor, self.max_rows, phase) for tensor in (input, grad_output))
        else:
            # Of the positions that an `output_size` adds no patches are sampled.
            sizes = output_sizes(geometry, input.shape[-geometry.spatial_dims :])
            pairs = zip(sizes, grad_output.shape[-geometry.spatial_dims :], strict=True)
            grad_output = F.pad(grad_output, [side for size, now in reversed([*pairs]) for side in (0, size - now)])
            inputs = patch_rows(input, geometry, self.max_rows, phase)
            outputs = channel_rows(grad_output, geometry.groups, geometry.spatial_dims, self.max_rows, phase)
        inputs, outputs = inputs.to(dtype), outputs.to(dtype)
        # First by the largest number of each, whose squares might not be numbers of the type.
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
        known = level != 0  # also of one that is not finite: that makes the batch a bad one
        return rows / torch.where(known, level, 1)[:, None, None], known

    def extra_repr(self) -> str:
        return f"optimal gains, damping={self.damping}"


def _unit(rows: Tensor) -> Tensor:
    """Rows ``(groups, n, S)`` over each group's largest number."""
    largest = rows.abs().amax((1, 2), keepdim=True)
    return rows / torch.where(largest == 0, 1, largest)
