"""Base class of the whitening normalizations: batch normalization's signature, checks and bookkeeping."""

import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy

from .._torch.engine import current_pass
from .._torch.modules import WideBuffers
from .._torch.precision import full_precision_outside_graphs, without_autocast
from ..options import check, is_count, is_real
from ..processes import Processes, ProcessGroup
from .samples import BatchMoments, Whitening, batch_moments, columns, normalize_by_batch, normalized


class Part(NamedTuple):
    """Groups of equal width: their channels, and their place among all groups."""

    channels: slice
    first: int
    groups: int
    width: int

    def of(self, buffer: Tensor) -> Tensor:
        """Return a view of these groups' matrices in a buffer ``(groups, D, D)``."""
        return buffer[self.first : self.first + self.groups, : self.width, : self.width]


class WhiteningNorm(WideBuffers, ABC):
    """A drop-in for `nn.BatchNorm1d`, `2d` or `3d` that also decorrelates the channels, group by group.

    In training, and in evaluation without running statistics, it uses the mean and covariance of the batch; otherwise
    the running ones. It computes in float32 or wider, whatever the input's dtype and autocast. Under
    `torch.distributed`, training statistics are those of all processes' batches together, as in `nn.SyncBatchNorm`.

    A forward pass inside a backward pass, as activation checkpointing runs it, changes no buffer (unless the
    checkpoint holds a compiled graph). A batch that is empty, or whose statistics hold a NaN or Inf, changes none
    either: it is only counted as skipped, and its output is returned as it is. A second derivative through the
    statistics of several processes' batches raises an error.

    Subclasses compute the whitening from a covariance and choose the running statistics. Their ``__init__`` ends with
    `reset_parameters`.

    Buffers, where running statistics are tracked: ``running_mean`` (C,), ``num_batches_tracked``,
    ``num_batches_skipped``, and those of the subclass. Matrices are ``(groups, D, D)``; a smaller last group is in the
    upper left corner of its matrix.
    """

    dims: ClassVar[tuple[int, ...]]  # numbers of dimensions that an input may have

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    running_mean: Tensor | None
    num_batches_tracked: Tensor
    num_batches_skipped: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float,
        momentum: float | None,
        affine: bool,
        track_running_stats: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        *,
        bias: bool,
        group_size: int | None,
        synchronize: bool,
        process_group: ProcessGroup | None,
    ) -> None:
        super().__init__()
        check("num_features", num_features, is_count(num_features), "an integer of at least 1")
        check("eps", eps, is_real(eps) and eps >= 0, "a number of at least 0")
        check("group_size", group_size, group_size is None or is_count(group_size), "an integer of at least 1, or None")
        self.num_features, self.eps, self.momentum = num_features, eps, momentum
        self.affine, self.track_running_stats = affine, track_running_stats
        self.group_size, self.synchronize, self.processes = group_size, synchronize, Processes(process_group)
        for name, has in [("weight", affine), ("bias", affine and bias)]:
            parameter = nn.Parameter(torch.empty(num_features, device=device, dtype=dtype)) if has else None
            self.register_parameter(name, parameter)
        self._register_wide("running_mean", (num_features,), device, dtype, has=track_running_stats)
        for name in ("num_batches_tracked", "num_batches_skipped"):
            count = torch.empty((), device=device, dtype=torch.long) if track_running_stats else None
            self.register_buffer(name, count)

    def _register_wide(
        self,
        name: str,
        shape: tuple[int, ...],
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        *,
        has: bool = True,
    ) -> None:
        """Register a buffer of float32 or wider; None unless `has`."""
        dtype = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
        self.register_buffer(name, torch.empty(shape, device=device, dtype=dtype) if has else None)

    @abstractmethod
    def _reset_running(self) -> None:
        """Reset the subclass's running buffers, if any, to their values before the first batch."""

    @abstractmethod
    def _reset_learned(self) -> None:
        """Reset the subclass's other buffers, if any, to their initial values."""

    @abstractmethod
    def _take_variance(self, variance: Tensor) -> None:
        """Fill the subclass's running buffers as for uncorrelated channels of this variance ``(C,)``."""

    @abstractmethod
    def _whitening(self, covariance: Tensor, part: Part, learns: bool) -> Whitening:
        """Compute the whitening of a batch's covariance ``(G, D, D)``. `learns`: whether buffers may be updated."""

    @abstractmethod
    def _running(self, moments: list[BatchMoments], whitenings: list[Whitening]) -> dict[str, Tensor]:
        """Return this batch's values for the subclass's running buffers to average, by buffer name."""

    @abstractmethod
    def _running_matrix(self, part: Part) -> Tensor:
        """Compute the whitening matrices ``(G, D, D)`` from the running statistics."""

    @classmethod
    @torch.no_grad()
    def like(cls, layer: Any, **options: Any) -> Any:
        """Make a layer of this class that evaluates like a `nn.BatchNorm1d`, 2d or 3d, but with new parameters.

        `options` are this class's own, beyond those of batch normalization.
        """
        tracks = layer.running_mean is not None
        settings = (layer.num_features, layer.eps, layer.momentum, layer.affine, tracks)
        tensors = [*layer.parameters(), *layer.buffers()]
        device, dtype = (tensors[0].device, tensors[0].dtype) if tensors else (None, None)
        made = cls(*settings, device, dtype, bias=layer.bias is not None, **options)
        if tracks:
            made.running_mean.copy_(layer.running_mean)  # type: ignore[union-attr]
            if layer.num_batches_tracked is not None:
                made.num_batches_tracked.copy_(layer.num_batches_tracked)
            made._take_variance(layer.running_var)
        return made

    def reset_running_stats(self) -> None:
        """Reset the running statistics, but nothing that was learned."""
        if self.running_mean is not None:
            self.running_mean.zero_()
            self.num_batches_tracked.zero_()
            self.num_batches_skipped.zero_()
            self._reset_running()

    def reset_parameters(self) -> None:
        """Reset everything: weight 1, bias 0, buffers as before the first batch."""
        self.reset_running_stats()
        self._reset_learned()
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @property
    def groups(self) -> int:
        """Number of groups; the last may be smaller."""
        return math.ceil(self.num_features / self.width)

    @property
    def width(self) -> int:
        """Number of channels in a group."""
        return min(self.group_size or self.num_features, self.num_features)

    def parts(self) -> list[Part]:
        """List the groups, those of equal width together."""
        whole, rest = divmod(self.num_features, self.width)
        end = whole * self.width
        parts = [Part(slice(0, end), 0, whole, self.width)]
        return [*parts, Part(slice(end, None), whole, 1, rest)] if rest else parts

    def _fill_diagonal(self, buffer: Tensor, values: Tensor | float) -> None:
        """Fill a buffer of all groups with diagonal matrices, from a value for each channel or one for all."""
        buffer.zero_()
        values = torch.as_tensor(values, device=buffer.device).expand(self.num_features)
        for part in self.parts():
            part.of(buffer).diagonal(dim1=-2, dim2=-1).copy_(values[part.channels].view(part.groups, part.width))

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, Proxy) and self.is_traced(input):
            return self.note_call(input)
        self._check_input(input)
        parts = self.parts()
        inputs = [input] if len(parts) == 1 else [input[:, part.channels] for part in parts]
        with without_autocast(input.device), full_precision_outside_graphs():
            by_batch = self.training or self.running_mean is None
            outputs = self._by_batch(inputs, parts) if by_batch else self._by_running(inputs, parts)
        return outputs[0] if len(parts) == 1 else torch.cat(outputs, 1)

    def _by_batch(self, inputs: list[Tensor], parts: list[Part]) -> list[Tensor]:
        group = self.processes.group() if self.training and self.synchronize else None
        size = inputs[0].shape
        if group is None and size[0] * math.prod(size[2:]) == 1:
            size = torch.Size([size[0], self.num_features, *size[2:]])
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {size}")
        learns = self.training and not is_repeating()
        outputs, moments, whitenings = [], [], []
        for input, part in zip(inputs, parts, strict=True):
            with torch.no_grad():
                one, centred = batch_moments(input, part.groups, group)
                whitening = self._whitening(one.covariance, part, learns)
            outputs.append(normalize_by_batch(input, *self.affine_of(part), centred, one, whitening, group))
            moments.append(one)
            whitenings.append(whitening)
        if learns:
            with torch.no_grad():
                self._follow(parts, moments, whitenings)
        return outputs

    def _by_running(self, inputs: list[Tensor], parts: list[Part]) -> list[Tensor]:
        outputs = []
        for input, part in zip(inputs, parts, strict=True):
            dtype = torch.promote_types(input.dtype, torch.float32)
            # Copy: a training pass may write to the buffers before this pass's backward.
            mean, matrix = (buffer.to(dtype, copy=True) for buffer in self.running_map(part))
            centred = columns(input, part.groups, mean)
            outputs.append(normalized(centred, matrix, *self.affine_of(part), input))
        return outputs

    def running_map(self, part: Part) -> tuple[Tensor, Tensor]:
        """Return the mean ``(G, D)`` and the matrices ``(G, D, D)`` that evaluation normalizes by."""
        assert self.running_mean is not None
        return self.running_mean[part.channels].view(-1, part.width), self._running_matrix(part)

    def affine_of(self, part: Part) -> tuple[Tensor | None, Tensor | None]:
        """Return the weight and the bias of a part's channels."""
        weight, bias = self.weight, self.bias
        return None if weight is None else weight[part.channels], None if bias is None else bias[part.channels]

    def _follow(self, parts: list[Part], moments: list[BatchMoments], whitenings: list[Whitening]) -> None:
        """Update the buffers with this batch, unless one of its values is not finite."""
        batch = {}
        if self.track_running_stats and self.running_mean is not None:
            mean = torch.cat([one.mean.flatten() for one in moments])
            batch = {"running_mean": mean, **self._running(moments, whitenings)}
        values = [*batch.values(), *(one.matrix for one in whitenings)]
        valid = torch.stack([value.isfinite().all() for value in values]).all()
        for part, whitening in zip(parts, whitenings, strict=True):
            for name, value in whitening.learned.items():
                buffer = part.of(self.get_buffer(name))
                buffer.copy_(torch.where(valid, value, buffer))
        if not batch:
            return
        self.num_batches_tracked.add_(valid)
        self.num_batches_skipped.add_(~valid)
        for name, value in batch.items():
            running = self.get_buffer(name)
            weight: Any = self.momentum
            if weight is None:  # average over all batches
                weight = 1 / self.num_batches_tracked.clamp(min=1).to(running.dtype)
            average = torch.lerp(running, value.to(running.dtype), weight)
            running.copy_(torch.where(valid, average, running))

    def _check_input(self, input: Tensor) -> None:
        if input.dim() not in self.dims:
            expected = " or ".join(f"{dim}D" for dim in self.dims)
            raise ValueError(f"expected {expected} input (got {input.dim()}D input)")
        if input.shape[1] != self.num_features:
            raise ValueError(f"expected {self.num_features} channels in dimension 1 (got input size {input.shape})")
        if not input.is_floating_point():
            raise ValueError(f"expected an input of a floating-point type (got {input.dtype})")

    def extra_repr(self) -> str:
        return (
            f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.affine}, "
            f"bias={self.bias is not None}, track_running_stats={self.track_running_stats}, "
            f"group_size={self.group_size}"
        )


def is_repeating() -> bool:
    """Tell whether this forward pass repeats an earlier one: it runs in a backward pass. False in a compiled graph."""
    return not torch.compiler.is_compiling() and current_pass() is not None


def stacked(parts: list[Tensor]) -> Tensor:
    """Stack the matrices of all groups into one buffer, padding a smaller last group's with zeros."""
    if len(parts) == 1:
        return parts[0]
    whole, last = parts
    missing = whole.shape[-1] - last.shape[-1]
    return torch.cat([whole, F.pad(last, (0, missing, 0, missing))])


def unbiased(moments: BatchMoments) -> Tensor:
    """Return the covariance divided by n − 1, as batch normalization's running variance is."""
    return moments.covariance * (moments.rows / (moments.rows - 1).clamp(min=1))
