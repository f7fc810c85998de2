"""Feature whitening by transforming the gradient (arXiv 2010.01546).

A layer ``y = W x + b`` trained on whitened inputs ``x̃ = T (x − μ)``, ``TᵀT = P``, has parameters
``W̃`` and ``b̃`` with ``W = W̃ T`` and ``b = b̃ − W̃ T μ``. With ``G = ∂L/∂W = Σ δ xᵀ`` and
``g = ∂L/∂b = Σ δ`` the chain rule gives ``∂L/∂W̃ = Σ δ x̃ᵀ = (G − g μᵀ) Tᵀ`` and ``∂L/∂b̃ = g``. A
gradient step on ``(W̃, b̃)`` therefore moves the plain parameters by

    Ĝ = (G − g μᵀ) P            ĝ = g − Ĝ μ

This costs one product per batch, where whitening the samples costs two per sample. Without a bias nothing can absorb
the shift: the samples are ``x̃ = T x``, and ``Ĝ = G P``. Where a batch has fewer samples than the layer has outputs,
``Ĝ = Σ δ (P x)ᵀ`` costs less.

On the output side, ``y = R ỹ`` with ``R Rᵀ = Q`` has ``∂L/∂ỹ = Rᵀ δ``: the plain parameters move by ``Q Ĝ`` and
``Q ĝ``. Here ``Q = k' (D + λI)^(-q)`` with D the second moment of δ, as ``P = k (C + λI)^(-p)``.
"""

import math
from typing import Any, Literal, Self

import torch
from torch import Tensor

from .._torch import function_transforms
from .._torch.function_transforms import call_on_plain_tensors, sum_over_samples
from ..inverse import METHODS, resolve, supports
from ..options import check, is_count, is_real
from ..state import COUNT
from ..statistics.covariance import snapshot_for_graph
from ..statistics.gradient_norms import GradientNorms, Measurement
from ..statistics.patches import Geometry, from_channel_rows, patch_rows
from ..statistics.whitening_factor import WhiteningFactor
from .base import Samples
from .bound import shorten
from .covariances import CovarianceTransform, Side


class FeatureWhitening(CovarianceTransform):
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
            separately. "auto": "patch" for layers with M up to 300, if not for very many groups, and "kronecker" for
            others.
        power: p in ``P = k (C + λI)^(-p)``, in [0, 1]: 1 whitens fully (as in the paper), ½ half way.
        output_power: q in ``Q = k' (D + λI)^(-q)``, in [0, 1]. D is the second moment of the output's gradient, with
            its trace normalised at each refresh so that loss scaling cancels.
        damping: λ as a multiple of the mean variance of the features, at least 0. Each factor of a Kronecker product is
            damped by the root of λ, so that the product's floor is λ.
        decay: factor on the weight of past rows at each batch, observed or not, in [0, 1). All that is observed between
            two refreshes forms one window, in which all rows have the same weight.
        center: whiten about the mean (True: covariance, with the bias gradient ĝ above) or about zero (False: second
            moment, with the plain bias gradient g). None is True for a convolution without a bias: a normalization
            follows, which takes the mean out. It is False otherwise: an optimizer that scales weight and bias each for
            itself (Adam, Muon) breaks the coupling of Ĝ and ĝ, by which the mean cancels; and in a linear layer without
            a bias nothing takes it out.
        rescale: choose k so that the component of the gradient along the plain one stays: ``⟨Ĝ, G⟩ = ‖G‖²`` on the
            mean. To first order in the learning rate the loss then falls as fast as with the plain gradient. k is
            first what the statistics predict, then what is measured on new batches. In a convolution without a bias k
            is between that and what keeps the norm, as predicted; see `_scale_is_between`. Otherwise k = 1 (recursive
            method with power 1: k such that the whitened features have mean variance 1).
        shrink: shrink C towards a multiple of the identity, the more the fewer effective rows it comes from; see
            `WhiteningFactor.estimate`. Otherwise directions that few rows happen not to show are amplified.
        bound: norm up to which a weight's gradient, after the transform, is an ordinary one, as a multiple of the usual
            norm of the plain gradient (its root mean square over recent batches), at least 1. A longer one is counted
            in ``num_batches_bounded``, mixed with the plain gradient and shortened; see `shorten`. This is the only
            place where the map is not linear. Each micro-batch, each process and each call of the layer is bounded for
            itself. None for no bound.
        update_interval: batches between two refreshes of P, on the mean: one of every so many batches, at a place that
            is in step with no loop. Before that many, P is refreshed after 1, 2, 4, 8, … "auto": 10, from batch 500 on
            20, from batch 1,000 on 40.
        statistics_interval: the same for the batches that are observed. A layer that such a batch does not reach
            observes the next one that does. "auto": 1, from batch 500 on 2, from batch 1,000 on 4; gradients are
            measured in each batch.
        max_rows: rows (positions, for a convolution) sampled from each observed batch; None for all. "auto": 512 of
            each of the first 20 batches, then as many as make 32 for each feature in the observed ones of
            ``1 / (1 − decay)`` batches, but 64 to 512.
        block_size: largest number of channels (of a linear layer: features) that are whitened together; None for all,
            "auto" for 256, or fewer where a layer has more than 4,096 channels (see `default_block_size`). They are
            split in order into equal parts, and the covariance becomes block-diagonal. With "patch" features a
            channel's taps stay together. Divides memory and the cost of the transform by the number of blocks, and the
            cost of an inverse by its square (of a recursive one, by the number).
        rank: number of columns in the recursive method, at least 1. With power 1 a refresh whitens twice as many
            directions; another power tracks this many eigenvectors.

    Raises:
        ValueError: an option has a value that is not allowed; the message names it, its value and the choices.

    State, after `bind`: a `WhiteningFactor` called ``inputs``, or two called ``channels`` and ``taps``, one called
    ``outputs`` if the outputs are whitened, and `GradientNorms` called ``norms`` with `rescale` or `bound`.
    """

    newer_state = ("norms.", "num_batches_bounded")
    norms: GradientNorms | None
    num_batches_bounded: Tensor

    def __init__(
        self,
        method: str = "auto",
        *,
        features: str = "auto",
        power: float = 0.5,
        output_power: float = 0.0,
        damping: float = 0.03,
        decay: float = 0.99,
        center: bool | None = None,
        rescale: bool = True,
        shrink: bool = True,
        bound: float | None = 1.2,
        update_interval: int | Literal["auto"] = "auto",
        statistics_interval: int | Literal["auto"] = "auto",
        max_rows: int | Literal["auto"] | None = "auto",
        block_size: int | Literal["auto"] | None = "auto",
        rank: int = 16,
    ) -> None:
        check("method", method, method == "auto" or method in METHODS, f"one of {', '.join(['auto', *METHODS])}")
        check("damping", damping, is_real(damping) and 0 <= damping < math.inf, "a number of at least 0")
        for name, value in [("power", power), ("output_power", output_power)]:
            check(name, value, is_real(value) and 0 <= value <= 1, "a number in [0, 1]")
            choices = [key for key in ("auto", *METHODS) if supports(key, value)]
            powers = METHODS[method].powers or () if method in METHODS else ()
            own = " or ".join(f"{name}={power:g}" for power in powers)
            others = f"method {' or '.join(choices)}"
            check(name, value, value == 0 or method in choices, f"{own}, as {method!r} needs it, or {others}")
        for name, value in [("rescale", rescale), ("shrink", shrink)]:
            check(name, value, isinstance(value, bool), "True or False")
        check("bound", bound, bound is None or (is_real(bound) and bound >= 1), "a number of at least 1, or None")
        check("rank", rank, is_count(rank), "an integer of at least 1")
        super().__init__(
            observes_input=power > 0,
            observes_output=output_power > 0,
            features=features,
            decay=decay,
            center=center,
            update_interval=update_interval,
            statistics_interval=statistics_interval,
            max_rows=max_rows,
            block_size=block_size,
        )
        self.method, self.power, self.output_power, self.damping = method, power, output_power, damping
        self.rescale, self.shrink, self.bound, self.rank = rescale, shrink, bound, rank

    @classmethod
    def exact(cls, method: str = "auto", **options: Any) -> Self:
        """Make the paper's form: whole patches, power 1, no rescaling, all rows, and a refresh after every batch."""
        exact: dict[str, Any] = {"features": "patch", "power": 1.0, "center": True, "block_size": None}
        exact |= {"rescale": False, "shrink": False, "bound": None}
        every = {"update_interval": 1, "statistics_interval": 1, "max_rows": None}
        return cls(method, **(exact | every | options))

    def make_factor(self, side: Side, channels: int, taps: int, **options: Any) -> WhiteningFactor:
        return WhiteningFactor(
            self.geometry.groups,
            channels,
            taps,
            method=self.method,
            power=self.output_power if side == "outputs" else self.power,
            damping=math.sqrt(self.damping) if side in ("channels", "taps") else self.damping,
            decay=self.decay,
            rescale=self.rescale,
            shrink=self.shrink,
            between=self._scale_is_between(),
            rank=self.rank,
            **options,
        )

    def bind(self, geometry: Geometry, *, device: torch.device, dtype: torch.dtype) -> Self:
        super().bind(geometry, device=device, dtype=dtype)
        self.maps_bias = self.is_centred or self.output_power > 0
        self.samples_up_to = self._samples_up_to()
        self.norms = None
        if (self.rescale or self.bound is not None) and self.power + self.output_power > 0:
            is_corrected = self.rescale and not self._scale_is_between()
            wide = torch.promote_types(dtype, torch.float32)
            self.norms = GradientNorms(
                bound=self.bound, rescale=is_corrected, decay=self.decay, device=device, dtype=wide
            )
        self.register_buffer("num_batches_bounded", torch.zeros((), device=device, dtype=COUNT))
        return self

    def _scale_is_between(self) -> bool:
        """Tell whether k is between what keeps the gradient's component and what keeps its norm.

        It is where a normalization follows. There the loss does not depend on the length of W, so G and W are
        orthogonal, and each step lengthens W by Pythagoras: a longer Ĝ soon makes each later step turn W by less. But
        it is the component by which the loss falls, so k is halfway, as predicted: the measured correction would keep
        the component.

        An approximate inverse keeps the component, since ``tr(PCP)`` takes the M³ operations that it saves.
        """
        is_approximate = METHODS[resolve(self.method, self.power)].is_approximate
        return self.rescale and self.geometry.precedes_normalization and not is_approximate

    def reset_state(self) -> None:
        super().reset_state()
        self.num_batches_bounded.zero_()
        if self.norms is not None:
            self.norms.reset_state()

    def transform(
        self, grad_weight: Tensor, grad_bias: Tensor | None, weight: Tensor | None, samples: Samples | None = None
    ) -> tuple[Tensor, Tensor | None]:
        geometry, dtype = self.geometry, grad_weight.dtype
        rows = geometry.rows(grad_weight)
        if dtype not in (torch.float32, torch.float64):
            rows = rows.to(torch.float32)
        bias = mean = None
        if grad_bias is not None and self.maps_bias:
            bias = grad_bias.reshape(rows.shape[:2]).to(rows.dtype)
            if self.power > 0 and self.is_centred:
                mean = self._mean_of_rows()
                rows = rows - bias.unsqueeze(2) * mean.unsqueeze(1)
        plain = rows
        norms, correction = self.norms, None
        if norms is not None and norms.rescale:
            correction = snapshot_for_graph(norms.correction)
        if samples is not None and mean is None:
            rows = self._from_samples(samples, correction)
        elif self.power > 0 and self.separable:
            # Taps first, and from the left, on whole rows of channels: products with 9 columns take five times as long,
            # and a copy of the transposed gradient six times as long as this product that reads it in place.
            matrix = rows.unflatten(2, (-1, geometry.taps)).transpose(2, 3)
            matrix = self.taps.current_precision(correction).unsqueeze(1) @ matrix
            matrix = self.channels.multiply(matrix.flatten(1, 2)).view(matrix.shape)
            rows = matrix.transpose(2, 3).flatten(2)
        elif self.power > 0:
            rows = self.inputs.multiply(rows, correction)
        if self.output_power > 0:
            correction = None if self.power > 0 else correction
            rows = self.outputs.multiply(rows.mT, correction).mT
            bias = None if bias is None else self.outputs.multiply(bias.unsqueeze(1)).squeeze(1)
        rows = self._bounded(plain, rows)
        if bias is not None and mean is not None:
            bias = bias - (rows * mean.unsqueeze(1)).sum(-1)
        mapped = geometry.weight(rows, grad_weight).to(dtype)
        return mapped, grad_bias if bias is None else bias.flatten().to(dtype)

    def _mean_of_rows(self) -> Tensor:
        """Return the mean of a patch, ``(groups, C·taps)``, as of the last refresh."""
        if not self.separable:
            return self.inputs.current_mean()
        # All taps of a channel have the channel's mean.
        mean = self.channels.current_mean().unsqueeze(-1) / self.geometry.spread
        return mean.expand(-1, -1, self.geometry.taps).flatten(1)

    def _from_samples(self, samples: Samples, correction: Tensor | None) -> Tensor:
        """Compute G P as ``Σ δ (P x)ᵀ``, ``(groups, S, C·taps)``."""
        geometry, input = self.geometry, samples.input
        if self.separable:
            channels = self.channels.multiply(self.positions(input))
            patches = patch_rows(from_channel_rows(channels, input, geometry.spatial_dims), geometry)
            taps = patches.unflatten(2, (-1, geometry.taps)) @ self.taps.current_precision(correction).unsqueeze(1)
            rows = taps.flatten(2)
        else:
            rows = patch_rows(input, geometry) if geometry.spatial_dims else self.positions(input)
            rows = self.inputs.multiply(rows, correction)
        return torch.bmm(self.positions(samples.grad_output).mT, rows)

    def _samples_up_to(self) -> int:
        """Count the numbers in an output up to which `_from_samples` takes fewer operations than the product with P.

        The transform takes one product for each row of G, where whitening the samples takes one for each sample, and
        then the weight's gradient once more: that pays where a layer of many outputs sees few samples.
        """
        geometry = self.geometry
        if self.power == 0 or geometry.upsampling or (self.is_centred and geometry.has_bias):
            return 0
        factors = (self.channels, self.taps) if self.separable else (self.inputs,)
        width = sum(factor.precision.shape[-1] for factor in factors)  # operations for each number of a row of G
        of_sample: float = width
        if self.separable:  # the channels are whitened before patches are unfolded, at each position of the input
            positions = math.prod(geometry.stride) / geometry.taps
            of_sample = self.channels.precision.shape[-1] * positions + geometry.taps
        outputs = geometry.out_channels
        return geometry.groups * outputs * int(outputs * width / (outputs + of_sample))

    def _bounded(self, plain: Tensor, mapped: Tensor) -> Tensor:
        """Measure what the transform does to a gradient; make one that is longer than usual safe.

        Not being linear, this is left out under `torch.func`: there the gradients of single samples have to add up to
        the batch's.
        """
        if self.norms is None:
            return mapped
        call_on_plain_tensors(self._measure, plain, mapped)
        if self.bound is None or self._batch.measured is None or function_transforms.are_active():
            return mapped
        limit, measured = self.norms.limit, self._batch.measured
        is_longer: Tensor | bool
        if limit.is_cpu:  # there numbers can be read without waiting
            is_longer = float(measured.mapped_norm) > float(limit) > 0
            if not is_longer:
                return mapped
        else:
            is_longer = (measured.mapped_norm > limit) & (limit > 0)
        self.num_batches_bounded.add_(is_longer)
        mix = not self.geometry.precedes_normalization
        return shorten(plain, mapped, measured, self.norms, mix, is_longer)

    def _measure(self, plain: Tensor, mapped: Tensor) -> None:
        if plain.dim() > 3:  # under `torch.vmap`; every step comes here
            plain, mapped = (sum_over_samples(rows, 3) for rows in (plain, mapped))
        self._batch.measured = Measurement(plain, mapped)

    def observe_measured(self, measured: Measurement, valid: Tensor | bool) -> None:
        assert self.norms is not None  # since it has measured
        self.norms.observe_gradient(measured, valid)

    def extra_repr(self) -> str:
        options = {"power": self.power, "output_power": self.output_power, "features": self.features}
        if METHODS[resolve(self.method, self.power)].is_approximate:
            options["rank"] = self.rank
        if self.block_size not in (None, "auto"):
            options["block_size"] = self.block_size
        return ", ".join([repr(self.method), *(f"{name}={value!r}" for name, value in options.items())])
