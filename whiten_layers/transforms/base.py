"""What may happen to a layer's gradient in backward: the one extension point."""

import itertools
import weakref
from abc import ABC, abstractmethod
from typing import Self

import torch
from torch import Tensor, nn

from ..covariance import copied
from ..patches import Geometry

_transforms: "weakref.WeakValueDictionary[int, GradientTransform]" = weakref.WeakValueDictionary()
_handles = itertools.count(1)


class GradientTransform(nn.Module, ABC):
    """A linear map of a layer's weight and bias gradients, and the statistics it follows from.

    A layer owns one transform, bound to its geometry. In the layer's backward pass the transform
    first maps the gradient with its state as it is, then observes the batch. It must change what
    `transform` computes only when a whole backward pass is over (see `whiten_layers.refresh`), so
    that a pass sees one linear map, whatever the number of layers that share a module.

    Subclasses implement `bind`, `transform`, `observe` and `reset_state`; one that also follows the gradient of
    the layer's output sets `observes_output` and implements `observe_output`.

    Buffers: ``num_batches_tracked``, the batches seen, a scalar kept on the CPU, where reading it
    waits for no device; ``num_batches_skipped``, those left out of the statistics because they
    held a NaN or Inf.
    """

    num_batches_tracked: Tensor
    num_batches_skipped: Tensor
    handle: Tensor

    def __init__(self) -> None:
        super().__init__()
        self._register()

    def _register(self) -> None:
        # A compiled graph can hold a number, not a Python object. The number is this object's own: a
        # copy that kept it would train the original's statistics. It is no buffer, which would be
        # saved, moved to a device, and broadcast to other processes.
        number = next(_handles)
        self.handle = torch.tensor(number, device="cpu")
        _transforms[number] = self

    def __setstate__(self, state: dict) -> None:  # where deepcopy, copy and unpickling end
        super().__setstate__(state)
        counter = self._buffers.get("num_batches_tracked")
        if counter is not None and not counter.is_meta:
            self._buffers["num_batches_tracked"] = counter.cpu()  # wherever `torch.load` has put it
        self._register()

    @staticmethod
    def from_handle(handle: Tensor) -> "GradientTransform":
        transform = _transforms.get(int(handle))
        if transform is None:
            raise RuntimeError("the layer of this backward pass is gone: keep a compiled model until it has ended")
        return transform

    @property
    def observes_output(self) -> bool:
        """Whether `observe_output` is to be called."""
        return False

    @abstractmethod
    def bind(self, geometry: Geometry, *, device: torch.device, dtype: torch.dtype) -> Self:
        """Make the state for a layer of this geometry, on its device. Called once, by the layer."""

    @abstractmethod
    def transform(self, grad_weight: Tensor, grad_bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Map the gradients of a weight ``(S, C, *kernel)`` and a bias ``(S,)``; shapes and dtypes stay."""

    @abstractmethod
    def observe(self, input: Tensor, grad_weight: Tensor) -> None:
        """Take the batch into the statistics: the layer's input and its plain weight gradient."""

    def observe_output(self, grad_output: Tensor) -> None:
        """Take the gradient of the layer's output into the statistics. Called before `observe`."""

    def _bind_counters(self, device: torch.device) -> None:
        self.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.long, device="cpu"))
        self.register_buffer("num_batches_skipped", torch.zeros((), dtype=torch.long, device=device))

    @abstractmethod
    def reset_state(self) -> None:
        """Forget what was observed: the state as `bind` made it. Implementations call `_reset_counters`."""

    def _reset_counters(self) -> None:
        self.num_batches_tracked.zero_()
        self.num_batches_skipped.zero_()

    def follow(self, weight: Tensor) -> None:
        """Be where a weight is, as wide as it is: what a layer asks when a checkpoint has been assigned to it."""
        if self.is_meta:
            self.to_empty(device=weight.device)
        self.to(weight.device, weight.dtype)

    @property
    def is_meta(self) -> bool:
        """Whether the state has no storage yet, as on the meta device."""
        return any(buffer.is_meta for buffer in self.buffers())

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        counter, was_meta = self._buffers.get("num_batches_tracked"), self.is_meta
        super()._apply(fn, recurse)
        if counter is not None:
            self._buffers["num_batches_tracked"] = counter
        if was_meta and not self.is_meta:  # `to_empty`: what it has made is not initialised
            self.reset_state()
        return self

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):  # type: ignore[no-untyped-def]
        if not any(key.startswith(prefix) for key in state_dict):
            # A plain layer's checkpoint knows no transform: ours stays as it is, and nothing is missing.
            state_dict.update(self.state_dict(prefix=prefix))
        super()._load_from_state_dict(state_dict, prefix, copied(local_metadata), *args)
