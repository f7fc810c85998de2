"""What may happen to a layer's gradient in backward: the one extension point."""

import itertools
import threading
import weakref
from abc import ABC, abstractmethod
from typing import Self

import torch
from torch import Tensor, nn

from ..refresh import update as refresh
from ..refresh.schedule import Clock, current_pass, is_within_another, last_due
from ..statistics.covariance import FeatureCovariance, copied
from ..statistics.patches import Geometry
from ..statistics.whitening_factor import WhiteningFactor

_transforms: "weakref.WeakValueDictionary[int, GradientTransform]" = weakref.WeakValueDictionary()
_handles = itertools.count(1)
_arrival = threading.Lock()  # the layers of a model on several devices come in several threads


class GradientTransform(nn.Module, ABC):
    """A linear map of a layer's weight and bias gradients, and the statistics it follows from.

    A layer owns one transform, bound to its geometry. In the layer's backward pass the transform
    first maps the gradient with its state as it is, then observes the batch. It must change what
    `transform` computes only when a whole backward pass is over (see `whiten_layers.refresh`), so
    that a pass sees one linear map, whatever the number of layers that share a module.

    Subclasses implement `bind`, `transform`, `observe` and `reset_state`; one that also follows the gradient of
    the layer's output sets `observes_output` and implements `observe_output`, and one whose map follows from the
    layer's weight sets `reads_weight`. Child modules that are a `WhiteningFactor` or a `SettledCovariance` are
    refreshed together with those of other layers.

    Attributes:
        clock: the number of the backward pass, which `whiten` lets the layers of a model share.
        name: the layer's, in the model that was given to `whiten`; for messages.
        update_interval, statistics_interval: batches between refreshes, and between statistics.

    Buffer: ``num_batches_skipped``, the batches that were left out of the statistics because they held a NaN or
    Inf, in this process. The extra state of a checkpoint is the clock's batch, the last batch that
    came to this layer, and the last of which it was to take statistics.
    """

    update_interval: int = 10
    statistics_interval: int = 10
    num_batches_skipped: Tensor
    handle: Tensor
    _pass: int | None  # in which the last batch came

    def __init__(self) -> None:
        super().__init__()
        self.clock, self.name = Clock(), ""
        self._reset_counts()
        self._register()

    def _register(self) -> None:
        # A compiled graph can hold a number, not a Python object. The number is this object's own: a
        # copy that kept it would train the original's statistics. It is no buffer, which would be
        # saved, moved to a device, and broadcast to other processes.
        number = next(_handles)
        self.handle = torch.tensor(number, device="cpu")
        _transforms[number] = self
        self.clock.join([self])

    def __setstate__(self, state: dict) -> None:  # where deepcopy, copy and unpickling end
        super().__setstate__(state)
        self._forget_pass()  # another process numbers its passes anew
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

    @property
    def reads_weight(self) -> bool:
        """Whether `transform` is to be given the layer's weight."""
        return False

    @abstractmethod
    def bind(self, geometry: Geometry, *, device: torch.device, dtype: torch.dtype) -> Self:
        """Make the state for a layer of this geometry, on its device. Called once, by the layer."""

    @abstractmethod
    def transform(
        self, grad_weight: Tensor, grad_bias: Tensor | None, weight: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Map the gradients of a weight ``(S, C, *kernel)`` and a bias ``(S,)``; shapes and dtypes stay.

        `weight` is what the forward pass computed with, a constant; None unless the transform `reads_weight`. The map
        is linear in the gradients, not in the weight. Higher derivatives pass the map as it is: the
        derivative of the map itself, with respect to the weight, is not taken.
        """

    @abstractmethod
    def observe(self, input: Tensor, grad_weight: Tensor) -> None:
        """Take the batch into the statistics: the layer's input and its plain weight gradient."""

    def observe_output(self, grad_output: Tensor) -> None:
        """Take the gradient of the layer's output into the statistics. Called before `observe`."""

    def parts(self) -> "list[GradientTransform]":
        """The transform itself and those that it is made of."""
        return [module for module in self.modules() if isinstance(module, GradientTransform)]

    def factors(self) -> list[WhiteningFactor]:
        """The children that are refreshed by an inverse."""
        return [child for child in self.children() if isinstance(child, WhiteningFactor)]

    def averages(self) -> list[FeatureCovariance]:
        """The children that are refreshed every `update_interval` batches."""
        return [child for child in self.children() if isinstance(child, FeatureCovariance)]

    def _bind_counters(self, device: torch.device) -> None:
        self.register_buffer("num_batches_skipped", torch.zeros((), dtype=torch.long, device=device))
        self._reset_counters()

    @abstractmethod
    def reset_state(self) -> None:
        """Forget what was observed: the state as `bind` made it. Implementations call `_reset_counters`."""

    def _reset_counters(self) -> None:
        self.num_batches_skipped.zero_()
        self.clock.batch, self.clock.running = 0, None
        self._reset_counts()

    def _reset_counts(self) -> None:
        self._last_batch = self._last_observed = 0
        self._forget_pass()

    def _forget_pass(self) -> None:
        self._pass, self._is_announced = None, False

    def is_in(self, number: int) -> bool:
        """Whether the last batch that came to this layer came in the pass of this number."""
        return self._pass == number

    @property
    def num_batches_tracked(self) -> int:
        """The clock's number when a batch last came to this layer; 0 if none has come."""
        return self._last_batch

    def _arrive(self, announced: bool = False) -> int:
        """Note that a batch has come, and return its number. `announced` by the gradient of the layer's output."""
        clock, number = self.clock, current_pass()
        with _arrival:
            if self._is_announced or (number is not None and number in (self._pass, clock.running)):
                is_new = False
            elif number is not None and not is_within_another():
                is_new, clock.running = True, number
                refresh.at_end(number, clock)
            else:  # the pass around this one may be unknown to all of the clock's layers, or there is none
                is_new = clock.running is None and self._last_batch == clock.batch
            clock.batch += is_new
            self._last_batch, self._pass = clock.batch, number
            self._is_announced = announced and number is None
            return clock.batch

    def _observes(self, batch: int) -> bool:
        """Whether statistics are due at a batch, or have been since this layer last came to observe."""
        # Later than now: the clock was set back, by the reset or the checkpoint of a layer that shares it.
        if not last_due(batch, self.statistics_interval) <= self._last_observed <= batch:
            self._last_observed = batch
        return self._last_observed == batch  # also at every further call in the same pass

    def get_extra_state(self) -> Tensor:
        return torch.tensor([self.clock.batch, self._last_batch, self._last_observed], device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        self.clock.batch, self._last_batch, self._last_observed = state.tolist()
        self.clock.running = None
        self._forget_pass()

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
        was_meta = self.is_meta
        super()._apply(fn, recurse)
        if was_meta and not self.is_meta:  # `to_empty`: what it has made is not initialised
            self.reset_state()
        return self

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):  # type: ignore[no-untyped-def]
        if not any(key.startswith(prefix) for key in state_dict):
            # A plain layer's checkpoint knows no transform: ours stays as it is, and nothing is missing.
            state_dict.update(self.state_dict(prefix=prefix))
        super()._load_from_state_dict(state_dict, prefix, copied(local_metadata), *args)
