"""Drop-in layers: plain PyTorch layers whose parameter gradients pass through a transform.

In evaluation mode, with gradients off, or with a frozen weight, a layer here *is* the plain layer: it runs the same
operations, saves nothing and observes nothing.
"""

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy

from . import optimizers  # noqa: F401 - warns of LBFGS, also where layers are unpickled
from ._torch import function_transforms
from ._torch.convolutions import AnyConvolution, AnyTransposedConvolution, output_padding_of, padding_of
from ._torch.modules import StatefulModule, own_parameter
from ._torch.operations import is_exporting
from ._torch.precision import autocast_dtype
from .autograd import NO_VMAP_OVER_PARAMETERS, keep_output_gradient, note_layer, observe_output, transform_gradients
from .statistics.patches import Geometry
from .transforms import Chain, GradientTransform
from .transforms.named import make_transform

logger = logging.getLogger("whiten_layers")

TWINS: dict[type[nn.Module], Any] = {}  # by the plain layer's class
PLAIN: dict[type[nn.Module], type[nn.Module]] = {}  # by the twin's class

NO_EXPORT = (
    "torch.export in training mode takes the plain layer in place of a whitened one: what it exports trains with plain "
    "gradients. Export model.eval(), or whiten what was exported from the plain model"
)
NO_TRACE = (
    "torch.jit.trace takes the plain layer in place of a whitened one: what it traces trains with plain gradients. "
    "Trace model.eval(), or a copy: unwhiten(copy.deepcopy(model))"
)


def attach(layer: Any, transform: GradientTransform | str | None) -> None:
    """Give a layer, a twin or the plain one that becomes it, its own copy of a transform.

    The transform's state is on the weight's device and in its precision.
    """
    twin = twin_of(layer)
    weight, bias = (getattr(layer, name) for name in twin.parameter_names)
    if weight.is_complex():
        raise ValueError(f"dtype={weight.dtype} is not possible: give a real floating-point type")
    if weight.numel() == 0:
        raise ValueError(f"a weight of shape {tuple(weight.shape)} is not possible: give at least one feature")
    geometry = twin.geometry(layer)
    bound = make_transform(transform).bind(geometry, device=weight.device, dtype=weight.dtype)
    for part in bound.parts():
        part.reset_counters()  # one that was taken from another layer has counted there
    layer.transform = bound.train(layer.training)
    layer.bound_to = twin.follows_from(layer, weight, bias)
    note_layer(layer, bound)


def register(plain: type[nn.Module], twin: "type[Whitened]") -> None:
    """Make a class the one that `whiten` turns a plain layer of exactly this class into."""
    TWINS[plain], PLAIN[twin] = twin, plain


def twin_of(layer: nn.Module) -> "type[Whitened]":
    """Return the class that a plain layer is turned into, or that a twin has."""
    return TWINS.get(type(layer)) or type(layer)  # type: ignore[return-value]


def why_not(layer: nn.Module) -> str | None:
    """Tell why a layer that there is a twin of has nothing that can be whitened; None if it has."""
    if "forward" in vars(layer) and type(layer) not in PLAIN:  # which a change of its class does not reach
        return "whose forward was replaced, by a hook of accelerate for instance: whiten it before"
    return twin_of(layer).why_not(layer)


def for_each_axis(value: int | Sequence[int], axes: int) -> tuple[int, ...]:
    """Spell out an attribute of a convolution that a script has set to a single number, which its operation takes."""
    return (value,) * axes if isinstance(value, int) else tuple(value)


def weights_shape(layer: Any, declared: Sequence[int]) -> Sequence[int]:
    """Return the shape of a layer's weight; the declared one where a wrapper shows the weight flat."""
    shape: Sequence[int] = layer.weight.shape
    return shape if len(shape) == len(declared) else declared


def zero_padding(layer: Any, kernel_size: Sequence[int]) -> tuple[int, ...]:
    """Work out a convolution's padding by zeros as `F.pad` takes it: last dimension first, both sides."""
    axes = len(kernel_size)
    if layer.padding == "same":
        whole = [step * (size - 1) for step, size in zip(for_each_axis(layer.dilation, axes), kernel_size, strict=True)]
        sides = [(width // 2, width - width // 2) for width in whole]
    else:
        sides = [(width, width) for width in for_each_axis(0 if layer.padding == "valid" else layer.padding, axes)]
    return tuple(width for pair in reversed(sides) for width in pair)


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, torch.Size) else value


def _cast(input: Tensor) -> Tensor:
    """Cast the input as autocast will, so that the tensor saved for statistics is the one the operation saves."""
    dtype = autocast_dtype(input.device)
    if dtype is None or not input.is_floating_point() or input.dtype == torch.float64:
        return input
    return input.to(dtype)


class Whitened(StatefulModule):
    """Base of all whitened layers: parameters whose gradients pass through a transform.

    A script may give the weight another shape, or change how a convolution reads its input: a vocabulary that grows, a
    stem for grey images, a stride that becomes a dilation. The plain layer then computes with what it has. So here the
    weight and the attributes that the operation takes are compared with those that the transform is bound to, before
    each pass that trains and before a load. If only the way of reading has changed, the statistics are kept.

    Attributes:
        bound_to: what `follows_from` gave when the transform was bound to it.
        parameter_names: of the weight and the bias whose gradients are transformed.
        in_evaluation: whether the layer is whitened in evaluation mode too, as far as its weight trains.
        is_inner: whether nothing calls the plain layer, whose parameters another reads. So only a twin of that one
            makes it worth a twin.
    """

    hidden_children = ("transform",)
    parameter_names: ClassVar[tuple[str, str]] = ("weight", "bias")
    is_inner: ClassVar[bool] = False
    in_evaluation: bool = False
    transform: GradientTransform
    bound_to: tuple[Any, ...]

    @staticmethod
    def geometry(layer: Any) -> Geometry:
        """Describe a layer, a twin or a plain one: its weight counts, whatever its attributes say of sizes."""
        raise NotImplementedError

    @staticmethod
    def follows_from(layer: Any, weight: Tensor, bias: Tensor | None) -> tuple[Any, ...]:
        """Return all that the geometry follows from, quickly."""
        return weight.shape, bias is None

    def _follow_changes(self, weight: Tensor, bias: Tensor | None) -> None:
        """Bind the transform to the layer as it is now: afresh, or with its statistics if their shapes are the same."""
        now = self.follows_from(self, weight, bias)
        if now == self.bound_to:
            return
        name = self.transform.name or "a whitened layer"
        pairs = [pair for pair in zip(self.bound_to, now, strict=True) if pair[0] != pair[1]]
        changes = ", ".join(f"{_plain(old)} became {_plain(new)}" for old, new in pairs)
        if torch.compiler.is_compiling():
            cure = "run one training pass that is not compiled"
            raise RuntimeError(f"{name} is no longer as it was whitened ({changes}): {cure}")
        geometry, self.bound_to = self.geometry(self), now
        parts: list[Any] = [part for part in self.transform.parts() if not isinstance(part, Chain)]
        if all(hasattr(part, "geometry") and geometry.has_shapes_of(part.geometry) for part in parts):
            for part in parts:
                part.geometry = geometry
            return
        logger.info("%s starts afresh: %s", name, changes)
        self.transform.bind(geometry, device=weight.device, dtype=weight.dtype).train(self.training)

    def __setstate__(self, state: dict[str, Any]) -> None:  # where deepcopy, copy and unpickling end
        super().__setstate__(state)
        note_layer(self, self.transform)
        if "bound_to" not in state:  # pickled by an earlier version
            self.bound_to = self.follows_from(self, *(getattr(self, name) for name in self.parameter_names))

    @classmethod
    def why_not(cls, layer: Any) -> str | None:
        """Tell why a plain layer, of the class that this one is the twin of, has nothing that can be whitened."""
        return None if getattr(layer, cls.parameter_names[0]).numel() else "without any feature"

    @staticmethod
    def inner_layers(layer: Any) -> list[nn.Module]:
        """List the layers within one, plain or twin, that only the twin calls: see `is_inner`."""
        return []

    def trained_parameters(self) -> Iterator[nn.Parameter]:
        """Iterate over the parameters whose gradients come through the transform, also of a parametrized weight."""
        return self.parameters()

    def is_plain(self) -> bool:
        """Tell whether the layer is to be the plain one in this pass."""
        if not ((self.training or self.in_evaluation) and torch.is_grad_enabled()):
            return True
        is_traced = not torch.compiler.is_compiling() and torch.jit.is_tracing()
        if is_traced:
            warnings.warn(NO_TRACE, stacklevel=3)
        return is_traced

    def transformed(self, operation: Callable[..., Tensor], input: Tensor, *options: Any) -> Tensor:
        """Run the layer's operation on parameters whose gradients pass through the transform.

        Each parameter is read once, as in the plain layer, since a parametrization recomputes it at every read.
        """
        name, other = self.parameter_names
        weight, bias = getattr(self, name), getattr(self, other)
        is_compiling = torch.compiler.is_compiling()
        if is_compiling:
            if is_exporting() and self.training:
                warnings.warn(NO_EXPORT, stacklevel=2)
        elif function_transforms.is_mapped(weight):
            raise RuntimeError(NO_VMAP_OVER_PARAMETERS)  # such a weight reports requires_grad=False
        if not weight.requires_grad:
            return operation(input, weight, bias, *options)
        is_whole = is_compiling or type(weight) is nn.Parameter or not hasattr(weight, "full_tensor")
        if not is_whole:  # with FSDP2 it is whole in forward
            name = self.transform.name or f"a {type(self).__name__}"
            cure = 'leave it out, by whiten(model, skip="…"), or unwhiten(model)'
            raise TypeError(f"{name} cannot train with tensor parallelism, which makes its weight a DTensor: {cure}")
        self._follow_changes(weight, bias)
        transform = self.transform
        if not is_compiling and not transform.is_watching:  # a guard on it would compile anew
            return operation(input, weight, bias, *options)
        input, subject = _cast(input), transform.handle if is_compiling else transform
        # Without a bias, or with a frozen one, nothing can absorb a shift of the inputs.
        given = (weight, bias) if transform.maps_bias and bias is not None and bias.requires_grad else (weight,)
        parameters = transform_gradients(input, subject, transform.reads_weight, given)
        output = operation(input, *(parameters if len(parameters) > 1 else (*parameters, bias)), *options)
        if not is_compiling and 0 < output.numel() <= transform.samples_up_to:
            keep_output_gradient(output, input, parameters[0])
        if transform.observes_output:
            output = observe_output(output, subject, parameters[0])
        return output

    def before_replicating(self) -> None:
        weight = own_parameter(self, self.parameter_names[0])
        if not self.is_plain() and (weight is None or weight.requires_grad):
            raise RuntimeError("nn.DataParallel cannot train whitened layers: replicas lose what they observe. Use DDP")

    def before_loading(self, state_dict: dict[str, Any], prefix: str) -> None:
        weight, bias = (own_parameter(self, name) for name in self.parameter_names)
        if weight is not None:
            self._follow_changes(weight, bias)

    def after_loading(self, assigned: bool) -> None:
        weight = own_parameter(self, self.parameter_names[0])
        # An assigned checkpoint brings its own device and dtype, and may move the layer off the meta device.
        if assigned and weight is not None and not weight.is_meta:
            self.transform.follow(weight)


class _WhitenedLayer(Whitened):
    """Base of the twins of PyTorch's own layers, which can be initialised anew."""

    def reset_parameters(self) -> None:
        """Initialise the parameters as the plain layer does, and reset the transform's state."""
        super().reset_parameters()  # type: ignore[misc]
        if hasattr(self, "transform"):  # not yet, when the plain layer's __init__ calls this
            self.transform.reset_state()


class WhitenedLinear(_WhitenedLayer, nn.Linear):
    """`nn.Linear` whose gradient is taken as if its inputs were whitened.

    Args:
        in_features, out_features, bias, device, dtype: as for `nn.Linear`.
        transform: a `GradientTransform` (copied), the name of an inverse method, "eigenbasis" for
            ``EigenbasisScaling()``, "optimal_gain" for ``OptimalInputGain()``, or None for ``FeatureWhitening()``.

    Shape: ``(..., in_features) -> (..., out_features)``.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        transform: GradientTransform | str | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        attach(self, transform)

    @staticmethod
    def geometry(layer: Any) -> Geometry:
        outputs, inputs = weights_shape(layer, (layer.out_features, layer.in_features))
        return Geometry(inputs, outputs, has_bias=layer.bias is not None)

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, Proxy) and self.is_traced(input):
            return self.note_call(input)
        return super().forward(input) if self.is_plain() else self.transformed(F.linear, input)


class _WhitenedConv(_WhitenedLayer, AnyConvolution):
    """Base of the whitened convolutions: the plain class's signature, plus `transform`."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: str | int | tuple[int, ...] = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        transform: GradientTransform | str | None = None,
    ) -> None:
        options: tuple[Any, ...] = (stride, padding, dilation, groups, bias, padding_mode, device, dtype)
        super().__init__(in_channels, out_channels, kernel_size, *options)  # type: ignore[arg-type]
        attach(self, transform)

    @staticmethod
    def geometry(layer: Any) -> Geometry:
        declared = (layer.out_channels, layer.in_channels // layer.groups, *layer.kernel_size)
        outputs, inputs, *kernel_size = weights_shape(layer, declared)
        return Geometry(
            inputs,
            outputs // layer.groups,
            layer.groups,
            tuple(kernel_size),
            for_each_axis(layer.stride, len(kernel_size)),
            for_each_axis(layer.dilation, len(kernel_size)),
            zero_padding(layer, kernel_size) if layer.padding_mode == "zeros" else (),
            has_bias=layer.bias is not None,
        )

    @staticmethod
    def follows_from(layer: Any, weight: Tensor, bias: Tensor | None) -> tuple[Any, ...]:
        reads = (layer.stride, layer.padding, layer.dilation, layer.groups, layer.padding_mode)
        return weight.shape, bias is None, *reads

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, Proxy) and self.is_traced(input):
            return self.note_call(input)
        if self.is_plain():
            return super().forward(input)
        plain: Any = self  # to the type checker, its attributes have the types of all convolutions at once
        operation, padding = (F.conv1d, F.conv2d, F.conv3d)[len(plain.kernel_size) - 1], plain.padding
        if plain.padding_mode != "zeros":
            # The padded tensor counts as the layer's input, and is what the operation saves.
            input, padding = F.pad(input, padding_of(plain), mode=plain.padding_mode), 0
        return self.transformed(operation, input, plain.stride, padding, plain.dilation, plain.groups)


class WhitenedConv1d(_WhitenedConv, nn.Conv1d):
    """`nn.Conv1d` whose gradient is taken as if its input patches were whitened.

    Args:
        in_channels, …, dtype: as for `nn.Conv1d`.
        transform: as for `WhitenedLinear`.

    Shape: ``(N, in_channels, L)`` or ``(in_channels, L)``, as for `nn.Conv1d`.
    """


class WhitenedConv2d(_WhitenedConv, nn.Conv2d):
    """`nn.Conv2d` whose gradient is taken as if its input patches were whitened.

    Args:
        in_channels, …, dtype: as for `nn.Conv2d`.
        transform: as for `WhitenedLinear`.

    Shape: ``(N, in_channels, H, W)`` or ``(in_channels, H, W)``, as for `nn.Conv2d`.
    """


class WhitenedConv3d(_WhitenedConv, nn.Conv3d):
    """`nn.Conv3d` whose gradient is taken as if its input patches were whitened.

    Args:
        in_channels, …, dtype: as for `nn.Conv3d`.
        transform: as for `WhitenedLinear`.

    Shape: ``(N, in_channels, D, H, W)`` or ``(in_channels, D, H, W)``, as for `nn.Conv3d`.
    """


class _WhitenedConvTranspose(_WhitenedLayer, AnyTransposedConvolution):
    """Base of the whitened transposed convolutions.

    A transposed convolution is a convolution with a flipped kernel, whose input has ``stride − 1`` zeros inserted
    between its positions. The patches that are whitened contain those zeros. Positions that `output_size` adds to the
    output do not enter the statistics.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] = 0,
        output_padding: int | tuple[int, ...] = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: int | tuple[int, ...] = 1,
        padding_mode: Literal["zeros"] = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        transform: GradientTransform | str | None = None,
    ) -> None:
        options: tuple[Any, ...] = (
            stride,
            padding,
            output_padding,
            groups,
            bias,
            dilation,
            padding_mode,
            device,
            dtype,
        )
        super().__init__(in_channels, out_channels, kernel_size, *options)  # type: ignore[arg-type]
        attach(self, transform)

    @staticmethod
    def geometry(layer: Any) -> Geometry:
        declared = (layer.in_channels, layer.out_channels // layer.groups, *layer.kernel_size)
        inputs, outputs, *kernel_size = weights_shape(layer, declared)
        axes, padding = len(kernel_size), list[int]()
        dilation, added = for_each_axis(layer.dilation, axes), for_each_axis(layer.output_padding, axes)
        for axis, cropped in enumerate(for_each_axis(layer.padding, axes)):
            side = dilation[axis] * (kernel_size[axis] - 1) - cropped
            padding = [side, side + added[axis], *padding]
        return Geometry(
            inputs // layer.groups,
            outputs,
            layer.groups,
            tuple(kernel_size),
            (1,) * axes,
            dilation,
            tuple(padding),
            has_bias=layer.bias is not None,
            upsampling=for_each_axis(layer.stride, axes),
            inputs_first=True,
        )

    @staticmethod
    def follows_from(layer: Any, weight: Tensor, bias: Tensor | None) -> tuple[Any, ...]:
        reads = (layer.stride, layer.padding, layer.output_padding, layer.dilation, layer.groups)
        return weight.shape, bias is None, *reads

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        if isinstance(input, Proxy) and self.is_traced(input):
            return self.note_call(input, output_size)
        if self.is_plain():
            return super().forward(input, output_size)
        plain: Any = self  # to the type checker, its attributes have the types of all convolutions at once
        sizes = output_padding_of(plain, input, output_size)
        operation = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[len(plain.kernel_size) - 1]
        return self.transformed(operation, input, plain.stride, plain.padding, sizes, plain.groups, plain.dilation)


class WhitenedConvTranspose1d(_WhitenedConvTranspose, nn.ConvTranspose1d):
    """`nn.ConvTranspose1d` whose gradient is taken as if its input patches were whitened.

    Args:
        in_channels, …, dtype: as for `nn.ConvTranspose1d`.
        transform: as for `WhitenedLinear`.

    Shape: ``(N, in_channels, L)`` or ``(in_channels, L)``, as for `nn.ConvTranspose1d`.
    """


class WhitenedConvTranspose2d(_WhitenedConvTranspose, nn.ConvTranspose2d):
    """`nn.ConvTranspose2d` whose gradient is taken as if its input patches were whitened.

    Args:
        in_channels, …, dtype: as for `nn.ConvTranspose2d`.
        transform: as for `WhitenedLinear`.

    Shape: ``(N, in_channels, H, W)`` or ``(in_channels, H, W)``, as for `nn.ConvTranspose2d`.
    """


class WhitenedConvTranspose3d(_WhitenedConvTranspose, nn.ConvTranspose3d):
    """`nn.ConvTranspose3d` whose gradient is taken as if its input patches were whitened.

    Args:
        in_channels, …, dtype: as for `nn.ConvTranspose3d`.
        transform: as for `WhitenedLinear`.

    Shape: ``(N, in_channels, D, H, W)`` or ``(in_channels, D, H, W)``, as for `nn.ConvTranspose3d`.
    """


register(nn.Linear, WhitenedLinear)
register(nn.Conv1d, WhitenedConv1d)
register(nn.Conv2d, WhitenedConv2d)
register(nn.Conv3d, WhitenedConv3d)
register(nn.ConvTranspose1d, WhitenedConvTranspose1d)
register(nn.ConvTranspose2d, WhitenedConvTranspose2d)
register(nn.ConvTranspose3d, WhitenedConvTranspose3d)


def layers_of(model: nn.Module) -> dict[str, Any]:
    """Return a model's whitened layers by name, parametrized ones among them; a shared one once."""
    return {name: module for name, module in model.named_modules() if isinstance(module, tuple(PLAIN))}
