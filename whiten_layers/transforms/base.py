"""Interface of a gradient transform: a linear map of a layer's gradients in backward."""

import dataclasses
import math
from abc import ABC, abstractmethod
from collections import defaultdict
from typing import Any, ClassVar, Literal, NamedTuple, Self

import torch
from torch import Tensor

from .._torch.modules import WideBuffers
from ..refresh.schedule import LONG, Attendance, Schedule, refresh_interval
from ..state import COUNT, warn_of_loading
from ..statistics.covariance import FeatureCovariance
from ..statistics.patches import Geometry
from ..statistics.whitening_factor import WhiteningFactor
from .handles import new_handle


class Samples(NamedTuple):
    """Input of one call of a layer, and the gradient of its output, whose product is the weight's gradient.

    Neither has a graph, and both have the weight's dtype, float32 or float64.
    """

    input: Tensor
    grad_output: Tensor


def _is_like(value: Any, own: Any) -> bool:
    """Tell whether what a checkpoint holds can be copied into a tensor: numbers of its shape, and real ones."""
    return isinstance(value, Tensor) and value.shape == own.shape and not value.is_complex()


class GradientTransform(WideBuffers, ABC):
    """Linear map of a layer's weight and bias gradients, and the statistics it is computed from.

    A layer owns one transform, bound to its geometry. In the layer's backward pass the transform
    first maps the gradient with its state as it is, then observes the batch. It must change what
    `transform` computes only when a whole backward pass is over (see `whiten_layers.refresh`), so
    that a pass sees one linear map, however many layers share a module.

    Subclasses implement `bind`, `transform`, `observe` and `reset_state`. One that also observes the gradient of
    the layer's output sets `observes_output` and implements `observe_output`; one whose map depends on the
    layer's weight sets `reads_weight`. An implementation of `observe` asks the schedule three things:
    ``schedule.begin_batch(self)`` for the number of the batch, ``schedule.statistics_are_due(self)``, and at its end
    ``schedule.end_batch(self)``. Child modules that are a `FeatureCovariance` are refreshed together with those of
    other layers.

    Attributes:
        schedule: counts backward passes and knows what is due; `whiten` lets the layers of a model share one.
        name: the layer's, in the model that was given to `whiten`; for messages.
        update_interval, statistics_interval: batches between refreshes, and between statistics.
        newer_state: how the names of state begin that checkpoints of earlier versions lack.
        samples_up_to: numbers in the output of a call up to which `transform` is given its `Samples`, where they can be
            had; 0 for never. Only a transform that sets it need take them.
        observes_output, reads_weight, maps_bias: whether `observe_output` is to be called, and whether `transform` is
            to be given the layer's weight, and the bias's gradient. Known when `bind` has returned.
        scales_at_step: whether `scale_at_step` is to be called.
        is_watching: False while nothing is to be observed or transformed: a layer is then the plain one.

    Buffer: ``num_batches_skipped``, the batches that were left out of the statistics because they held a NaN or
    Inf, in this process. The extra state of a checkpoint is the schedule's batch, the last batch that
    came to this layer, and the last one that it observed or should have observed. Counts are floating-point numbers,
    like all state: scripts average, scale and halve whole state dicts.
    """

    update_interval: int | Literal["auto"] = 10
    statistics_interval: int | Literal["auto"] = 10
    observes_output: bool = False
    reads_weight: bool = False
    maps_bias: bool = True
    scales_at_step: bool = False
    any_scales: ClassVar[bool] = False  # whether a transform that scales at steps has ever been made
    is_watching: bool = True
    samples_up_to: int = 0
    newer_state: tuple[str, ...] = ()
    keeps_its_tensors = True
    num_batches_skipped: Tensor
    handle: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.name = ""
        self.schedule, self.attendance = Schedule(), Attendance()
        self._register()

    def _register(self) -> None:
        # The handle is this object's own: a copy that kept it would train the original's statistics. It is no buffer,
        # which would be saved, moved to a device, and broadcast to other processes.
        self.handle = new_handle(self)
        GradientTransform.any_scales |= self.scales_at_step
        self.schedule.join([self])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, **self.pending()}

    def __setstate__(self, state: dict) -> None:  # where deepcopy, copy and unpickling end
        super().__setstate__(state)
        self.attendance = dataclasses.replace(self.attendance)  # a shallow copy has the original's
        self.attendance.leave_pass()
        self._register()

    def pending(self) -> dict[str, Any]:
        """Return the attributes that a batch leaves behind while it is observed, each with the value for none.

        A copy takes these values: the batch is the original's.
        """
        return {}

    @abstractmethod
    def bind(self, geometry: Geometry, *, device: torch.device, dtype: torch.dtype) -> Self:
        """Make the state for a layer of this geometry, on its device. Called by the layer.

        Called again, if the layer becomes another, it starts afresh.
        """

    @abstractmethod
    def transform(
        self, grad_weight: Tensor, grad_bias: Tensor | None, weight: Tensor | None, samples: Samples | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Map the gradients of a weight ``(S, C, *kernel)`` and a bias ``(S,)``; shapes and dtypes stay.

        `grad_bias` is None where there is no bias, or one that does not train, and unless the transform `maps_bias`.
        `weight` is what the forward pass computed with, a constant; None unless the transform `reads_weight`. The map
        is linear in the gradients, not in the weight. Higher derivatives pass the map as it is: the
        derivative of the map itself, with respect to the weight, is not taken.

        `samples` are what the weight's gradient is made of: where they are few, the same result may cost less from
        them. They are None wherever that is not known; see `samples_up_to`.
        """

    @abstractmethod
    def observe(self, input: Tensor, grad_weight: Tensor) -> None:
        """Take the batch into the statistics: the layer's input and its plain weight gradient."""

    def observe_output(self, grad_output: Tensor) -> None:
        """Take the gradient of the layer's output into the statistics. Called before `observe`."""

    def scale_at_step(self, grad_weight: Tensor) -> Tensor:
        """Return what an optimizer is to step by instead of a weight's gradient, which is whole by then.

        Called once a step, for what is no linear map that stays between two refreshes, and so cannot be done to parts.
        """
        return grad_weight

    @abstractmethod
    def reset_state(self) -> None:
        """Set the state to what `bind` made, forgetting every batch. Implementations call `reset_counters`."""

    @property
    def batches_between_refreshes(self) -> int:
        """The batches from one refresh to the next, when training has gone on for a while."""
        return refresh_interval(LONG, self.update_interval)

    def parts(self) -> "list[GradientTransform]":
        """List the transform itself and those that it is made of."""
        return [module for module in self.modules() if isinstance(module, GradientTransform)]

    def named_factors(self) -> list[tuple[str, WhiteningFactor]]:
        """List the children that are refreshed by an inverse, with their names."""
        return [(name, child) for name, child in self.named_children() if isinstance(child, WhiteningFactor)]

    def factors(self) -> list[WhiteningFactor]:
        """List the children that are refreshed by an inverse."""
        return [factor for _, factor in self.named_factors()]

    def bytes_of(self, factor: WhiteningFactor) -> int:
        """Count the bytes of a factor's state, and for the last factor of what the transform keeps beside them."""
        beside = self.kept_beside() if factor is self.factors()[-1] else []
        return sum(tensor.nbytes for tensor in [*factor.buffers(), *beside])

    def kept_beside(self) -> list[Tensor]:
        """List what is as large as the layer's weight, beside the factors."""
        return []

    def bind_counters(self, device: torch.device) -> None:
        """Register the buffer that counts skipped batches. No batch has come to this layer yet."""
        self.register_buffer("num_batches_skipped", torch.zeros((), device=device, dtype=COUNT))
        self.attendance = Attendance()

    def reset_counters(self) -> None:
        """Count batches, and those that are skipped, from the start again."""
        self.num_batches_skipped.zero_()
        self.schedule.reset(self)

    @property
    def num_batches_tracked(self) -> int:
        """The schedule's number when a batch last came to this layer; 0 if none has come."""
        return self.attendance.batch

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.schedule.state(self), device="cpu", dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        numbers = state.tolist()
        if all(map(math.isfinite, numbers)):  # a large one is not in half precision
            self.schedule.restore(self, [max(0, round(number)) for number in numbers])

    def follow(self, weight: Tensor) -> None:
        """Move to a weight's device and precision, as a layer asks when a checkpoint has been assigned to it."""
        if any(buffer.is_meta for buffer in self.buffers()):
            self.to_empty(device=weight.device)
        self.to(weight.device, weight.dtype)

    def after_moving(self, before: dict[str, Tensor | None]) -> None:
        super().after_moving(before)
        was_meta = any(buffer is not None and buffer.is_meta for buffer in before.values())
        if was_meta and not any(buffer.is_meta for buffer in self.buffers()):
            self.reset_state()  # what `to_empty` has made is not initialised

    def before_loading(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Fill in, from the present state, what a checkpoint does not have, or has for other options.

        A plain layer's checkpoint knows no transform, and one of an earlier version not all of it. Of a transform with
        other options, those parts (a factor, the norms) are taken whose tensors all have the shapes of this one's. A
        part that cannot be the state of any features is not taken either.
        """
        given = {key.removeprefix(prefix): state_dict.pop(key) for key in list(state_dict) if key.startswith(prefix)}
        own = self.state_dict()
        parts: dict[str, dict[str, Any]] = defaultdict(dict)
        for key, value in own.items():
            parts[key.rpartition(".")[0]][key] = value
        taken, spoilt = dict[str, Any](), False
        others = {key.rpartition(".")[0] for key in given if key not in own}
        for name, part in parts.items():
            shared = {key: given[key] for key in part if key in given}
            fits = bool(shared) and all(_is_like(value, part[key]) for key, value in shared.items())
            if given and not fits and not all(key.startswith(self.newer_state) for key in part):
                others.add(name)
            statistics = self.get_submodule(name)
            if fits and isinstance(statistics, FeatureCovariance):
                fits = statistics.is_sound({key.rpartition(".")[2]: value for key, value in shared.items()})
                spoilt |= not fits
            fresh = {key: value for key, value in part.items() if not fits or key.startswith(self.newer_state)}
            taken |= fresh | (shared if fits else {})
        # Members of a chain that the checkpoint does not have are at the batch of those that it has.
        numbers = "_extra_state"
        if numbers in given:
            members = [key for key in own if key.endswith(f".{numbers}") and key not in given]
            taken |= dict.fromkeys(members, given[numbers])
        state_dict |= {prefix + key: value for key, value in taken.items()}
        if spoilt:
            warn_of_loading("numbers of it are not finite or have the wrong sign: such statistics start afresh")
        if others:
            names = ", ".join(sorted(filter(None, others))) or "its counts"
            warn_of_loading(f"it was made with other options: what does not fit starts afresh ({names})")
