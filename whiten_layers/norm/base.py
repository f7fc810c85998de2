"""What the whitening normalizations have in common: batch normalization's signature, checks and bookkeeping."""

import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ..clock import current_pass
from ..numerics import WideBuffers, exact
from ..options import check, is_count
from .samples import BatchMoments, Whitening, batch_moments, normalize_by_batch, normalized

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Part(NamedTuple):
    """Groups of equal width: the channels that they are, and which of all groups."""

    channels: slice
    first: int
    groups: int
    width: int

    def of(self, buffer: Tensor) -> Tensor:
        """These groups' matrices of a buffer ``(groups, D, D)``, a view."""
        return buffer[self.first : self.first + self.groups, : self.width, : self.width]


class WhiteningNorm(WideBuffers, ABC):
    """A drop-in for `nn.BatchNorm1d`, `2d` or `3d` that also decorrelates the channels, a group at a time.

    In training, and in evaluation without running statistics, it takes the mean and covariance of the batch, and
    elsewhere running ones; the computation is in float32 at least, whatever the input's type and autocast
    say. Where `torch.distributed` runs, statistics in training are those of all processes' batches together, as
    they are of `nn.SyncBatchNorm`.

    A forward pass inside a backward pass, which is what activation checkpointing repeats, changes no
    buffer. Neither does a batch whose statistics hold a NaN or Inf: it is counted, and the output is what it is.

    Subclasses give the whitening that follows from a covariance, and what of it runs along; their ``__init__`` ends
    with `reset_parameters`.

    Buffers, where running statistics are tracked: ``running_mean`` (C,), ``num_batches_tracked``,
    ``num_batches_skipped``, and those of the subclass; matrices are ``(groups, D, D)``, of a smaller last group in the
    upper left corner.
    """

    dims: ClassVar[tuple[int, ...]]  # that an input may have

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
        process_group: "ProcessGroup | None",
    ) -> None:
        super().__init__()
        check("num_features", num_features, is_count(num_features), "an integer of at least 1")
        check("group_size", group_size, group_size is None or is_count(group_size), "an integer of at least 1, or None")
        self.num_features, self.eps, self.momentum = num_features, eps, momentum
        self.affine, self.track_running_stats = affine, track_running_stats
        self.group_size, self.synchronize, self.process_group = group_size, synchronize, process_group
        for name, has in [("weight", affine), ("bias", affine and bias)]:
            parameter = nn.Parameter(torch.empty(num_features, device=device, dtype=dtype)) if has else None
            self.register_parameter(name, parameter)
        self._register_running("running_mean", (num_features,), device, dtype)
        for name in ("num_batches_tracked", "num_batches_skipped"):
            count = torch.empty((), device=device, dtype=torch.long) if track_running_stats else None
            self.register_buffer(name, count)

    def _register_running(
        self, name: str, shape: tuple[int, ...], device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        """Register a buffer of float32 at least, or None where running statistics are not tracked."""
        dtype = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
        tracked = self.track_running_stats
        self.register_buffer(name, torch.empty(shape, device=device, dtype=dtype) if tracked else None)

    @abstractmethod
    def _reset_buffers(self) -> None:
        """Fill the subclass's buffers as a layer that has seen nothing has them."""

    @abstractmethod
    def _take_variance(self, variance: Tensor) -> None:
        """Fill the subclass's buffers for channels ``(C,)`` of this variance that are not correlated."""

    @abstractmethod
    def _whitening(self, covariance: Tensor, part: Part, learns: bool) -> Whitening:
        """What the covariance ``(G, D, D)`` of a batch comes to. `learns`: whether state of its own may follow it."""

    @abstractmethod
    def _running(self, moments: list[BatchMoments], whitenings: list[Whitening]) -> dict[str, Tensor]:
        """What the subclass's running buffers are averages of, for this batch, by the buffer's name."""

    @abstractmethod
    def _running_matrix(self, part: Part) -> Tensor:
        """The whitening matrices ``(G, D, D)`` of the running statistics."""

    @classmethod
    @torch.no_grad()
    def take_over(cls, layer: Any, **options: Any) -> None:
        """Turn a batch normalization into a layer of this class, which evaluates as it does, in place.

        Args:
            layer: a `nn.BatchNorm1d`, 2d or 3d; it stays the same object with the same parameters.
            options: of this class, beyond those of the batch normalization.
        """
        settings = (layer.num_features, layer.eps, layer.momentum, layer.affine, layer.track_running_stats)
        tensors = [*layer.parameters(), *layer.buffers()]
        device, dtype = (tensors[0].device, tensors[0].dtype) if tensors else (None, None)
        ours: Any = cls(*settings, device, dtype, bias=layer.bias is not None, **options)
        if layer.running_mean is not None:
            ours.running_mean.copy_(layer.running_mean)
            ours.num_batches_tracked.copy_(layer.num_batches_tracked)
            ours._take_variance(layer.running_var)
        own = {name: value for name, value in vars(ours).items() if name not in vars(layer)}
        vars(layer).update(own, _buffers=ours._buffers)
        layer.__class__ = cls

    def reset_running_stats(self) -> None:
        """Forget what was observed."""
        if self.running_mean is not None:
            self.running_mean.zero_()
            self.num_batches_tracked.zero_()
            self.num_batches_skipped.zero_()
        self._reset_buffers()

    def reset_parameters(self) -> None:
        """Weight 1, bias 0, nothing observed."""
        self.reset_running_stats()
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @property
    def groups(self) -> int:
        """How many groups there are; the last may be smaller."""
        return math.ceil(self.num_features / self.width)

    @property
    def width(self) -> int:
        """Channels of a group."""
        return min(self.group_size or self.num_features, self.num_features)

    def parts(self) -> list[Part]:
        """The groups, those of one width together."""
        whole, rest = divmod(self.num_features, self.width)
        end = whole * self.width
        parts = [Part(slice(0, end), 0, whole, self.width)]
        return [*parts, Part(slice(end, None), whole, 1, rest)] if rest else parts

    def _fill_diagonal(self, buffer: Tensor, values: Tensor | float) -> None:
        """Make a buffer of all groups diagonal, with a value for each channel or one for all."""
        buffer.zero_()
        values = torch.as_tensor(values, device=buffer.device).expand(self.num_features)
        for part in self.parts():
            part.of(buffer).diagonal(dim1=-2, dim2=-1).copy_(values[part.channels].view(part.groups, part.width))

    def forward(self, input: Tensor) -> Tensor:
        self._check_input(input)
        parts = self.parts()
        inputs = [input] if len(parts) == 1 else [input[:, part.channels] for part in parts]
        with exact(input.device):
            by_batch = self.training or self.running_mean is None
            outputs = self._by_batch(inputs, parts) if by_batch else self._by_running(inputs, parts)
        return outputs[0] if len(parts) == 1 else torch.cat(outputs, 1)

    def _by_batch(self, inputs: list[Tensor], parts: list[Part]) -> list[Tensor]:
        group = self._group() if self.training else None
        size = inputs[0].shape
        if group is None and size[0] * math.prod(size[2:]) == 1:
            size = torch.Size([size[0], self.num_features, *size[2:]])
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {size}")
        learns = self.training and not is_repeating()
        with torch.no_grad():
            moments = [batch_moments(input, part.groups, group) for input, part in zip(inputs, parts, strict=True)]
            whitenings = [
                self._whitening(one.covariance, part, learns) for one, part in zip(moments, parts, strict=True)
            ]
            if learns and self.track_running_stats:
                self._track(moments, whitenings)
        return [
            normalize_by_batch(input, *self.affine_of(part), one, whitening, group)
            for input, part, one, whitening in zip(inputs, parts, moments, whitenings, strict=True)
        ]

    def _by_running(self, inputs: list[Tensor], parts: list[Part]) -> list[Tensor]:
        pairs = zip(inputs, parts, strict=True)
        return [normalized(input, *self.running_map(part), *self.affine_of(part)) for input, part in pairs]

    def running_map(self, part: Part) -> tuple[Tensor, Tensor]:
        """The mean ``(G, D)`` and the matrices ``(G, D, D)`` that evaluation normalizes by."""
        assert self.running_mean is not None
        return self.running_mean[part.channels].view(-1, part.width), self._running_matrix(part)

    def affine_of(self, part: Part) -> tuple[Tensor | None, Tensor | None]:
        """The weight and the bias of a part's channels."""
        weight, bias = self.weight, self.bias
        return None if weight is None else weight[part.channels], None if bias is None else bias[part.channels]

    def _group(self) -> "ProcessGroup | None":
        """The processes that this one shares a batch with."""
        if not (self.synchronize and dist.is_available() and dist.is_initialized()):
            return None
        group = self.process_group or dist.group.WORLD
        return group if dist.get_world_size(group) > 1 else None

    def _track(self, moments: list[BatchMoments], whitenings: list[Whitening]) -> None:
        """Average this batch into the running buffers, unless something in it is not finite."""
        batch = {"running_mean": torch.cat([one.mean.flatten() for one in moments])}
        batch |= self._running(moments, whitenings)
        valid = torch.stack([whitening.matrix.isfinite().all() for whitening in whitenings]).all()
        for value in batch.values():
            valid = valid & value.isfinite().all()
        self.num_batches_tracked.add_(valid)
        self.num_batches_skipped.add_(~valid)
        weight = 1 / self.num_batches_tracked.clamp(min=1) if self.momentum is None else self.momentum
        for name, value in batch.items():
            running = self._buffers[name]
            assert running is not None
            value = value.to(running.dtype)
            running.copy_(torch.where(valid, torch.lerp(running, value, weight), running))

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
    """Whether this forward pass repeats an earlier one: a backward pass is running. A graph repeats no effects."""
    return not torch.compiler.is_compiling() and current_pass() is not None


def stacked(parts: list[Tensor]) -> Tensor:
    """Matrices of all groups as one buffer, those of a smaller last group with zeros around."""
    if len(parts) == 1:
        return parts[0]
    whole, last = parts
    missing = whole.shape[-1] - last.shape[-1]
    return torch.cat([whole, F.pad(last, (0, missing, 0, missing))])


def unbiased(moments: BatchMoments) -> Tensor:
    """The covariance divided by n − 1, which is what runs along, as in batch normalization."""
    return moments.covariance * (moments.rows / (moments.rows - 1).clamp(min=1))
