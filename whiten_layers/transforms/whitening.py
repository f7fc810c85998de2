"""Feature whitening by transforming the gradient (arXiv 2010.01546).

A layer ``y = W x + b`` trained on whitened inputs ``x̃ = T (x − μ)``, ``TᵀT = P``, has parameters
``W̃`` and ``b̃`` with ``W = W̃ T`` and ``b = b̃ − W̃ T μ``. With ``G = ∂L/∂W = Σ δ xᵀ`` and
``g = ∂L/∂b = Σ δ`` the chain rule gives ``∂L/∂W̃ = Σ δ x̃ᵀ = (G − g μᵀ) Tᵀ`` and ``∂L/∂b̃ = g``. A
gradient step on ``(W̃, b̃)`` therefore moves the plain parameters by

    Ĝ = (G − g μᵀ) P            ĝ = g − Ĝ μ

This costs one product per batch, where whitening the samples costs two per sample. Without a bias nothing can absorb
the shift: the samples are ``x̃ = T x``, and ``Ĝ = G P``.

On the output side, ``y = R ỹ`` with ``R Rᵀ = Q`` has ``∂L/∂ỹ = Rᵀ δ``: the plain parameters move by ``Q Ĝ`` and
``Q ĝ``. Here ``Q = k' (D + λI)^(-q)`` with D the second moment of δ, as ``P = k (C + λI)^(-p)``.
"""

import math
from typing import Any, Self

import torch
from torch import Tensor

from ..inverse import METHODS, resolve, supports
from ..options import check, check_statistics, is_count, is_real
from ..statistics.covariance import Moments, moments
from ..statistics.patches import Geometry, channel_rows, linear_rows, patch_rows, tap_autocovariance
from ..statistics.whitening_factor import WhiteningFactor
from .base import GradientTransform

FEATURES = ("kronecker", "patch")


class FeatureWhitening(GradientTransform):
    """Transform that whitens a layer's input features, and with `output_power` the gradients of its outputs.

    Args:
        method: how the inverse is computed: "cholesky" (power 1), "eigh" (any power), "newton_schulz" (powers 1 and ½,
            matrix products only), "recursive" (any power, approximate, a few products with `rank` columns), or "auto",
            the cheapest exact method that supports the power.
        features: the features of a convolution that are whitened together. "patch": all ``M = C·taps`` entries of a
            patch, as in the paper. "kronecker": ``C ≈ A ⊗ B`` with the channels' covariance A and the taps' correlation
            B (unit diagonal), each damped and inverted separately. No patch is unfolded, and C² + taps² numbers are
            kept. B is taken about the running mean from before the batch, and so starts with the second window (see
            `decay`). Both are the same for a linear layer and for a kernel of one tap. Each group is whitened
            separately.
        power: p in ``P = k (C + λI)^(-p)``, in [0, 1]: 1 whitens fully (as in the paper), ½ half way.
        output_power: q in ``Q = k' (D + λI)^(-q)``, in [0, 1]. D is the second moment of the output's gradient, with
            its trace normalised at each refresh so that loss scaling cancels.
        damping: λ as a multiple of the mean variance of the features, at least 0. Each factor of a Kronecker product is
            damped by the root of λ, so that the product's floor is λ.
        decay: factor on the weight of past rows at each batch, observed or not, in [0, 1). All that is observed between
            two refreshes forms one window, in which all rows have the same weight.
        center: whiten about the mean (covariance) or about zero (second moment).
        rescale: choose k so that the expected norm of the gradient stays that of the plain one. A learning rate tuned
            for the plain network then still fits. Otherwise k = 1 (recursive method with power 1: k such that the
            whitened features have mean variance 1).
        update_interval: batches between two refreshes of P; before that many, P is refreshed after 1, 2, 4, 8, …
        statistics_interval: batches between two that are observed; before that many, batches 1, 2, 4, 8, … are
            observed. A layer that such a batch does not reach observes the next one that does.
        max_rows: rows (positions, for a convolution) sampled from each observed batch; None for all.
        block_size: largest number of channels (of a linear layer: features) that are whitened together; None for all.
            They are split in order into equal parts, and the covariance becomes block-diagonal. With "patch" features a
            channel's taps stay together. Divides memory by the number of blocks, and the cost of an inverse by its
            square (of a recursive one, by the number).
        rank: number of columns in the recursive method, at least 1. With power 1 a refresh whitens twice as many
            directions; another power tracks this many eigenvectors.

    Raises:
        ValueError: an option has a value that is not allowed; the message names it, its value and the choices.

    State, after `bind`: a `WhiteningFactor` called ``inputs``, or two called ``channels`` and ``taps``, and one called
    ``outputs`` if the outputs are whitened.
    """

    geometry: Geometry
    separable: bool

    def __init__(
        self,
        method: str = "auto",
        *,
        features: str = "kronecker",
        power: float = 0.5,
        output_power: float = 0.0,
        damping: float = 0.03,
        decay: float = 0.95,
        center: bool = True,
        rescale: bool = True,
        update_interval: int = 10,
        statistics_interval: int = 10,
        max_rows: int | None = 4096,
        block_size: int | None = None,
        rank: int = 16,
    ) -> None:
        super().__init__()
        check("method", method, method == "auto" or method in METHODS, f"one of {', '.join(['auto', *METHODS])}")
        check("features", features, features in FEATURES, f"one of {', '.join(FEATURES)}")
        check("damping", damping, is_real(damping) and 0 <= damping < math.inf, "a number of at least 0")
        check_statistics(decay, update_interval, statistics_interval, max_rows)
        for name, value in [("power", power), ("output_power", output_power)]:
            check(name, value, is_real(value) and 0 <= value <= 1, "a number in [0, 1]")
            choices = [key for key in ("auto", *METHODS) if supports(key, value)]
            check(name, value, value == 0 or method in choices, f"another power, or method {' or '.join(choices)}")
        for name, value in [("center", center), ("rescale", rescale)]:
            check(name, value, isinstance(value, bool), "True or False")
        is_limit = block_size is None or is_count(block_size)
        check("block_size", block_size, is_limit, "an integer of at least 1, or None")
        check("rank", rank, is_count(rank), "an integer of at least 1")
        self.method, self.features = method, features
        self.power, self.output_power = power, output_power
        self.damping, self.decay, self.center, self.rescale = damping, decay, center, rescale
        self.update_interval, self.statistics_interval, self.max_rows = update_interval, statistics_interval, max_rows
        self.block_size, self.rank = block_size, rank
        self._output_moments: Moments | None = None

    @classmethod
    def exact(cls, method: str = "auto", **options: Any) -> Self:
        """Make the paper's form: whole patches, power 1, no rescaling, all rows, and a refresh after every batch."""
        exact: dict[str, Any] = {"features": "patch", "power": 1.0, "rescale": False}
        every = {"update_interval": 1, "statistics_interval": 1, "max_rows": None}
        return cls(method, **(exact | every | options))

    def bind(self, geometry: Geometry, *, device: torch.device, dtype: torch.dtype) -> Self:
        self.geometry, self.observes_output = geometry, self.output_power > 0
        for name, _ in list(self.named_children()):
            delattr(self, name)  # a transform taken from another layer brings that layer's factors
        self.bind_counters(device)

        def factor(
            channels: int, taps: int, power: float, damping: float = self.damping, trace: float | None = None
        ) -> WhiteningFactor:
            return WhiteningFactor(
                geometry.groups,
                channels,
                taps,
                method=self.method,
                power=power,
                damping=damping,
                decay=self.decay,
                rescale=self.rescale,
                block_size=self.block_size,
                rank=self.rank,
                trace=trace,
                device=device,
                dtype=torch.promote_types(dtype, torch.float32),
            )

        self.separable = self.features == "kronecker" and geometry.taps > 1
        if self.power > 0 and self.separable:
            self.channels = factor(geometry.in_channels, 1, self.power, math.sqrt(self.damping))
            self.taps = factor(
                1, geometry.taps, self.power, math.sqrt(self.damping), trace=geometry.taps / geometry.spread
            )
        elif self.power > 0:
            self.inputs = factor(geometry.in_channels, geometry.taps, self.power)
        if self.output_power > 0:
            self.outputs = factor(geometry.out_channels, 1, self.output_power, trace=1.0)
        return self

    def reset_state(self) -> None:
        self.reset_counters()
        self._output_moments = None
        for factor in self.factors():
            factor.reset_state()

    def transform(
        self, grad_weight: Tensor, grad_bias: Tensor | None, weight: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        geometry = self.geometry
        dtype = torch.promote_types(grad_weight.dtype, torch.float32)
        matrix = geometry.matrix(grad_weight).to(dtype)
        shape = matrix.shape
        bias = None if grad_bias is None else grad_bias.reshape(shape[:2]).to(dtype)

        mean = None
        if bias is not None and self.power > 0 and self.center:
            # The mean of a patch. If channels and taps are separate, all taps of a channel have the channel's mean.
            mean = (self.channels if self.separable else self.inputs).current_mean()
            mean = mean.unsqueeze(-1) / geometry.spread if self.separable else mean.view(shape[0], *shape[2:])
            matrix = matrix - bias[:, :, None, None] * mean.unsqueeze(1)
        if self.power > 0 and self.separable:
            # Two plain products: a broadcast one would multiply row by row, which takes three times as long.
            matrix = self.taps.multiply(matrix.flatten(1, 2)).view(shape)
            matrix = self.channels.multiply(matrix.transpose(2, 3).flatten(1, 2))
            matrix = matrix.view(shape[0], shape[1], shape[3], shape[2]).transpose(2, 3)
        elif self.power > 0:
            matrix = self.inputs.multiply(matrix.flatten(2)).view(shape)
        if self.output_power > 0:
            matrix = self.outputs.multiply(matrix.flatten(2).mT).mT.reshape(shape)
            bias = None if bias is None else self.outputs.multiply(bias.unsqueeze(1)).squeeze(1)
        if bias is not None and mean is not None:
            bias = bias - (matrix * mean.unsqueeze(1)).sum((-2, -1))
        matrix = geometry.weight(matrix, grad_weight).to(grad_weight.dtype)
        return matrix, None if bias is None else bias.flatten().to(grad_weight.dtype)

    def pending(self) -> dict[str, Any]:
        return {"_output_moments": None}

    def observe_output(self, grad_output: Tensor) -> None:
        batch = self.schedule.begin_batch(self, announced=True)
        if grad_output.numel() > 0 and self.schedule.statistics_are_due(self):
            # Kept until `observe` knows whether the batch is valid.
            self._output_moments = moments(self.outputs.split(self._rows(grad_output, batch)), center=False)

    def observe(self, input: Tensor, grad_weight: Tensor) -> None:
        batch = self.schedule.begin_batch(self)
        is_observed = self.schedule.statistics_are_due(self)
        if input.numel() > 0:
            # A NaN or Inf anywhere in the input or in the output's gradient reaches the weight's gradient.
            total = grad_weight.sum(dtype=torch.promote_types(grad_weight.dtype, torch.float32))
            # Reading a number on the CPU does not block, and saves three small operations per step.
            valid = math.isfinite(total) if total.is_cpu else torch.isfinite(total)
            if is_observed:
                valid = self._observe_factors(input, batch, valid)
            if valid is not True:
                self.num_batches_skipped.add_(torch.as_tensor(valid).logical_not())
        self._output_moments = None
        self.schedule.end_batch(self)

    def _rows(self, tensor: Tensor, batch: int) -> Tensor:
        """Sample rows of an input's or output's channels, group by group."""
        phase = batch // self.statistics_interval
        if self.geometry.spatial_dims == 0:
            return linear_rows(tensor, self.max_rows, phase)
        return channel_rows(tensor, self.geometry.groups, self.geometry.spatial_dims, self.max_rows, phase)

    def _observe_factors(self, input: Tensor, batch: int, valid: Tensor | bool) -> Tensor | bool:
        """Add a batch to the statistics if it is valid; return whether it is."""
        phase = batch // self.statistics_interval
        if self.power > 0 and self.separable:
            channels = self.channels
            valid = channels.observe_rows(self._rows(input, batch), self.center, valid)
            # About a mean that is the same in every process and has not changed since the window was opened.
            mean = channels.join_mean(channels.running_mean)
            positions, covariance = tap_autocovariance(input, self.geometry, mean, self.max_rows, phase)
            count = covariance.new_full((len(covariance),), positions)
            known = channels.running_count.view(self.geometry.groups, -1).amax(1) > 0
            self.taps.observe(Moments(count, torch.zeros_like(self.taps.mean), covariance), known & valid)
        elif self.power > 0:
            if self.geometry.spatial_dims:
                rows = patch_rows(input, self.geometry, self.max_rows, phase)
            else:
                rows = self._rows(input, batch)
            valid = self.inputs.observe_rows(rows, self.center, valid)
        if self._output_moments is not None:
            self.outputs.observe(self._output_moments, valid)
        return valid

    def extra_repr(self) -> str:
        options = {"power": self.power, "output_power": self.output_power, "features": self.features}
        if METHODS[resolve(self.method, self.power)].is_approximate:
            options["rank"] = self.rank
        if self.block_size is not None:
            options["block_size"] = self.block_size
        return ", ".join([repr(self.method), *(f"{name}={value!r}" for name, value in options.items())])
