"""Base of transforms that follow from covariances of a layer's inputs and of the gradients of its outputs."""

import math
from abc import abstractmethod
from typing import Any, Literal, Self

import torch
from torch import Tensor

from ..options import check, check_statistics, is_count
from ..refresh.schedule import observation_interval
from ..state import safe_to_load
from ..statistics.covariance import Moments
from ..statistics.gradient_norms import Measurement
from ..statistics.patches import Geometry, channel_rows, count_samples, linear_rows, patch_rows, tap_autocovariance
from ..statistics.whitening_factor import WhiteningFactor
from .base import GradientTransform

Side = Literal["inputs", "channels", "taps", "outputs"]
FEATURES = ("kronecker", "patch", "auto")
LARGEST_PATCH = 300  # features that "auto" whitens together: 32 channels at 9 taps
LARGEST_BLOCK = 256  # channels: no larger block was better, and an inverse of 256 features takes milliseconds
MOST_ROWS, FEWEST_ROWS = 512, 64  # of a batch, with max_rows="auto"
EARLY_BATCHES = 20  # in which as many rows are taken as ever: with 512 of each, 34 for each of 300 features
ROWS_PER_FEATURE = 32  # that a memory holds then; more of them bring nothing, see benchmarks/results/NOTES.md
CUBES = 2**28  # largest channels · block², to which the operations of a layer's inverses are proportional


def default_block_size(channels: int) -> int:
    """Return how many channels to whiten together, a power of 2, such that no layer's inverses take long.

    256 for up to 4,096 channels of a layer, all groups together, 128 up to 16,384, 64 up to 65,536, and so on: inverses
    of b blocks of M channels take b M³ operations.
    """
    block = LARGEST_BLOCK
    while block > 1 and channels * block**2 > CUBES:
        block //= 2
    return block


def has_small_patches(geometry: Geometry) -> bool:
    """Tell whether a layer's whole patches are cheap to whiten: no larger than a block of channels, and not too many.

    Up to this size Kronecker factors save little, and what they leave out, how one channel at one tap goes with another
    at another tap, is worth more (benchmarks/results/NOTES.md, "Whole patches where they are small").
    """
    size = geometry.in_channels * geometry.taps
    return size <= LARGEST_PATCH and geometry.groups * size**3 <= CUBES


def default_rows(batch: int, features: int, decay: float, interval: int) -> int:
    """Return how many rows of the `batch`-th batch, counted from 1, tell enough of features that vary together.

    At first as many as are cheap; then as many as keep `ROWS_PER_FEATURE` in a memory of ``1 / (1 − decay)`` batches,
    of which one in every `interval` is observed.
    """
    if batch <= EARLY_BATCHES:
        return MOST_ROWS
    return min(MOST_ROWS, max(FEWEST_ROWS, math.ceil(ROWS_PER_FEATURE * features * (1 - decay) * interval)))


@safe_to_load
class _Batch:
    """Measurements of the batch in progress. A plain object, because setting an attribute of a module is slow."""

    output_rows: tuple[Tensor, int] | None = None
    measured: Measurement | None = None  # by a subclass


class CovarianceTransform(GradientTransform):
    """Base of transforms that follow from covariances of a layer's inputs, of its outputs' gradients, or of both.

    Subclasses implement `make_factor` and `transform`.

    Args:
        observes_input, observes_output: whose covariance is kept.
        features, decay, center, update_interval, statistics_interval, max_rows, block_size: as for `FeatureWhitening`.

    State, after `bind`: a factor called ``inputs``, or two called ``channels`` and ``taps``; one called ``outputs``.
    """

    geometry: Geometry
    separable: bool  # whether a convolution's channels and taps have a factor each
    is_centred: bool

    def __init__(
        self,
        *,
        observes_input: bool,
        observes_output: bool,
        features: str,
        decay: float,
        center: bool | None,
        update_interval: int | Literal["auto"],
        statistics_interval: int | Literal["auto"],
        max_rows: int | Literal["auto"] | None,
        block_size: int | Literal["auto"] | None,
    ) -> None:
        super().__init__()
        check("features", features, features in FEATURES, f"one of {', '.join(FEATURES)}")
        check("center", center, center is None or isinstance(center, bool), "True, False or None")
        check_statistics(decay, update_interval, statistics_interval, max_rows, automatic=True)
        is_limit = block_size is None or block_size == "auto" or is_count(block_size)
        check("block_size", block_size, is_limit, "an integer of at least 1, 'auto', or None")
        self.observes_input, self.observes_output = observes_input, observes_output
        self.features, self.decay, self.center, self.max_rows = features, decay, center, max_rows
        self.update_interval, self.statistics_interval = update_interval, statistics_interval
        self.block_size: int | Literal["auto"] | None = block_size
        self._batch = _Batch()

    @abstractmethod
    def make_factor(
        self,
        side: Side,
        channels: int,
        taps: int,
        *,
        block_size: int | None,
        center: bool,
        trace: float | None = None,
        device: torch.device,
        dtype: torch.dtype,
    ) -> WhiteningFactor:
        """Make the factor of that name, with `channels` of `taps` features in each of the layer's groups."""

    def bind(self, geometry: Geometry, *, device: torch.device, dtype: torch.dtype) -> Self:
        self.geometry = geometry
        for name, _ in list(self.named_children()):
            delattr(self, name)  # a transform taken from another layer brings that layer's factors
        self.bind_counters(device)
        self.is_centred = geometry.precedes_normalization if self.center is None else self.center
        whole = self.features == "patch" or (self.features == "auto" and has_small_patches(geometry))
        self.separable = not whole and geometry.taps > 1

        def factor(side: Side, channels: int, taps: int = 1, **options: Any) -> WhiteningFactor:
            block = default_block_size(geometry.groups * channels) if self.block_size == "auto" else self.block_size
            wide = torch.promote_types(dtype, torch.float32)
            return self.make_factor(side, channels, taps, block_size=block, device=device, dtype=wide, **options)

        if self.observes_input and self.separable:
            self.channels = factor("channels", geometry.in_channels, center=self.is_centred)
            self.taps = factor("taps", 1, geometry.taps, center=True, trace=geometry.taps / geometry.spread)
        elif self.observes_input:
            self.inputs = factor("inputs", geometry.in_channels, geometry.taps, center=self.is_centred)
        if self.observes_output:
            self.outputs = factor("outputs", geometry.out_channels, center=False, trace=1.0)
        return self

    def reset_state(self) -> None:
        self.reset_counters()
        self._batch = _Batch()
        for factor in self.factors():
            factor.reset_state()

    def pending(self) -> dict[str, Any]:
        return {"_batch": _Batch()}

    def observe_output(self, grad_output: Tensor) -> None:
        batch = self.schedule.begin_batch(self, announced=True)
        if grad_output.numel() > 0 and self.schedule.statistics_are_due(self):
            # Kept until `observe` knows whether the batch is valid.
            rows, samples = self._rows(grad_output, batch, self.outputs)
            self._batch.output_rows = rows.clone(), samples  # a compiled graph may reuse the memory

    def observe(self, input: Tensor, grad_weight: Tensor) -> None:
        batch = self.schedule.begin_batch(self)
        is_observed = self.schedule.statistics_are_due(self)
        if input.numel() > 0:
            # A NaN or Inf anywhere in the input or in the output's gradient reaches the weight's gradient. Reading a
            # number on the CPU does not block, and saves three small operations per step.
            measured = self._batch.measured
            valid: Tensor | bool = False
            if measured is not None and measured.norm.is_cpu:
                valid = math.isfinite(measured.norm)
            elif measured is not None and measured.norm.element_size() >= 4:  # no norm of use is out of float32's range
                valid = measured.norm < math.inf
            if valid is False:  # not measured, or a norm that is out of range
                total = grad_weight.sum(dtype=torch.promote_types(grad_weight.dtype, torch.float32))
                # On other devices a number is not read, and two operations are less than the four of `isfinite`.
                valid = math.isfinite(total) if total.is_cpu else total.abs() < math.inf
            if is_observed:
                valid = self._observe_factors(input, batch, valid)
            # Norms cost little, and follow their own memory of ten batches: they become no rarer.
            if measured is not None and (is_observed or self.statistics_interval == "auto"):
                self.observe_measured(measured, valid)
            if valid is not True:
                self.num_batches_skipped.add_(torch.as_tensor(valid).logical_not())
        self._batch.output_rows = self._batch.measured = None
        self.schedule.end_batch(self)

    def observe_measured(self, measured: Measurement, valid: Tensor | bool) -> None:
        """Take what was measured of a batch's gradients into the statistics, if the batch is `valid`."""

    def positions(self, tensor: Tensor, max_rows: int | None = None, phase: int = 0) -> Tensor:
        """Take an input's or output's channels, group by group, at all positions or at sampled ones."""
        dims = self.geometry.spatial_dims
        if dims == 0:
            return linear_rows(tensor, max_rows, phase)
        return channel_rows(tensor, self.geometry.groups, dims, max_rows, phase)

    def _max_rows(self, batch: int, factor: WhiteningFactor, interval: int) -> int | None:
        """Return how many rows of a batch a factor is given at most."""
        if self.max_rows == "auto":
            return default_rows(batch, factor.running_mean.shape[1], self.decay, interval)
        return self.max_rows

    def _rows(self, tensor: Tensor, batch: int, factor: WhiteningFactor, patches: bool = False) -> tuple[Tensor, int]:
        """Sample rows of channels, or of whole patches, for a factor; return them and the number of samples."""
        if self.geometry.positions_first and tensor.dim() > 2:
            tensor = tensor.transpose(-3, -2)  # positions of one sequence tell less than those of several
        interval = observation_interval(batch, self.statistics_interval)
        most, phase = self._max_rows(batch, factor, interval), batch // interval
        rows = patch_rows(tensor, self.geometry, most, phase) if patches else self.positions(tensor, most, phase)
        return rows, count_samples(tensor, self.geometry.spatial_dims, most)

    def _observe_factors(self, input: Tensor, batch: int, valid: Tensor | bool) -> Tensor | bool:
        """Add a batch to the statistics if it is valid; return whether it is."""
        if self.observes_input and self.separable:
            valid = self.channels.observe_rows(*self._rows(input, batch, self.channels), valid)
            if self.taps.window is None:  # so small a matrix needs one batch a window
                self._observe_taps(input, batch, torch.as_tensor(valid))
        elif self.observes_input:
            patches = self.geometry.spatial_dims > 0
            valid = self.inputs.observe_rows(*self._rows(input, batch, self.inputs, patches), valid)
        if self._batch.output_rows is not None:
            self.outputs.observe_rows(*self._batch.output_rows, valid)
        return valid

    def _observe_taps(self, input: Tensor, batch: int, valid: Tensor) -> None:
        channels, phase = self.channels, batch // observation_interval(batch, self.statistics_interval)
        if self.is_centred:
            # A mean that is the same in every process and has not changed since the window was opened
            mean = channels.join_mean(channels.running_mean)
            valid = valid & (channels.running_count.view(self.geometry.groups, -1).amax(1) > 0)
        else:
            mean = input.new_zeros(self.geometry.groups, self.geometry.in_channels)
        most = MOST_ROWS if self.max_rows == "auto" else self.max_rows
        positions, effective, covariance = tap_autocovariance(input, self.geometry, mean, most, phase)
        number = covariance.new_full((len(covariance),), positions)
        self.taps.observe(Moments(number, effective, torch.zeros_like(self.taps.mean), covariance), valid)
