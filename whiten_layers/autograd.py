"""Custom autograd Functions: the identity in the forward pass, a gradient transform in the backward pass.

A whitened layer is the plain layer, applied to parameters that have passed through `TransformGradient`. The forward
pass, the gradient of the input, autocast and all further derivatives are PyTorch's own. The only addition is a linear
map between the plain gradient of the parameters and the parameters.

Autograd does not save the map's state, because later passes write to it in place, and two forward passes may precede a
backward pass. A compiled graph cannot hold a Python object, so there the map is one opaque operation that looks up the
transform by its handle. The handle is a tensor, so that one compiled graph serves all layers alike. Under `torch.func`
the map is differentiated and batched like any function. Statistics need plain tensors, so the batch is observed under
all function transforms.

The layer's weight is different. If a map depends on it, and only then, autograd saves it. Such a graph cannot be run
backward after its weight has been changed in place, for instance by an optimizer.

A pass that computes gradients of the inputs alone (an attack, a saliency map) does not train the layer: it neither
counts as a batch nor is observed. By itself it does not reach `TransformGradient`, but it does reach `ObserveOutput`,
and a compiled graph computes the gradients of the weights all the same. These ask the engine.
"""

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary, WeakSet, ref

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from ._torch import function_transforms
from ._torch.engine import version_of, wants_gradient, will_run
from ._torch.function_transforms import call_on_plain_tensors, sum_over_samples
from ._torch.modules import holds_parameter, own_parameter
from ._torch.operations import NOT_IN_CUDA_GRAPHS, keep_order
from ._torch.precision import autocast_dtype, without_autocast
from .transforms.base import GradientTransform, Samples
from .transforms.handles import TRANSFORMS

NO_VMAP_OVER_PARAMETERS = (
    "vmap over the parameters of a whitened layer in training mode is not possible, since its statistics are those of "
    "one layer: unwhiten the model, put it in evaluation mode, or loop over the parameters"
)

Subject = GradientTransform | Tensor  # the transform, or while compiling its handle

_layers: WeakKeyDictionary[GradientTransform, ref[nn.Module]] = WeakKeyDictionary()


def note_layer(layer: nn.Module, transform: GradientTransform) -> None:
    """Note, without keeping either alive, to which layer a transform belongs: a compiled graph knows no layer."""
    _layers[transform] = ref(layer)


def whitened_layers() -> list[Any]:
    """List the layers that have a transform, of all models."""
    pairs = ((transform, layer()) for transform, layer in list(_layers.items()))
    return [layer for own, layer in pairs if layer is not None and getattr(layer, "transform", None) is own]


def _trains_layer(transform: GradientTransform) -> bool:
    """Tell whether the running pass takes the gradients of a layer in a compiled graph, or cannot be said not to.

    It cannot where the layer's weight comes from elsewhere, as one that a network has made does.
    """
    layer: Any = _layers.get(transform, lambda: None)()
    if layer is None or getattr(layer, "transform", None) is not transform or function_transforms.are_active():
        return True
    name, other = layer.parameter_names
    is_own = holds_parameter(layer, name) or is_parametrized(layer, name)
    bypasses = None if transform.maps_bias else own_parameter(layer, other)
    return not is_own or wants_gradient(
        parameter for parameter in layer.trained_parameters() if parameter.requires_grad and parameter is not bypasses
    )


def _transform_of(handle: Tensor) -> GradientTransform:
    transform = TRANSFORMS.get(int(handle))
    if transform is None:
        raise RuntimeError("the layer of this backward pass is gone: keep a compiled model until it has ended")
    return transform


def keep_output_gradient(output: Tensor, input: Tensor, weight: Tensor) -> None:
    """Keep the gradient of a call's output, when the engine has it, until the weight's gradient is transformed.

    With it is kept the weight's gradient that the operation makes of it: what reaches `TransformGradient` may be
    another, for instance where a hook has changed it, or where a gradient penalty adds to it.

    Nothing is kept of an output that may be a view (one of other dimensions than a batch of the layer's own): an
    operation in place then takes another way through the graph than what has used the output before.

    Args:
        output: of the layer's operation, outside of a compiled graph.
        input: of the operation.
        weight: the one that `TransformGradient` returned.
    """
    if type(input) is not Tensor or input.dtype != weight.dtype or input.dtype not in (torch.float32, torch.float64):
        return
    if output.dim() != weight.dim() or output.grad_fn is None:
        return
    if function_transforms.are_active() or function_transforms.is_forward_mode():
        return
    node, size = ref(weight.grad_fn), weight.numel()  # weak: whoever holds the output's node holds it

    def keep(grad_inputs: tuple[Tensor | None, ...], grad_outputs: tuple[Tensor, ...]) -> None:
        transforming: Any = node()
        (grad_output,) = grad_outputs
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or not will_run(transforming):
            return
        if type(grad_output) is Tensor and grad_output.layout is torch.strided:
            made = [gradient for gradient in grad_inputs if gradient is not None and gradient.numel() == size]
            transforming.kept = grad_output, [(gradient, version_of(gradient)) for gradient in made]

    output.grad_fn.register_hook(keep)


def _take_output_gradient(ctx: Any, grad_weight: Tensor) -> Tensor | None:
    """Return the gradient of the output if this gradient of the weight is what was made of it, and forget it."""
    (grad_output, made), ctx.kept = ctx.kept, (None, [])
    place = grad_weight.data_ptr(), version_of(grad_weight)
    is_own = any((gradient.data_ptr(), version) == place for gradient, version in made)
    return grad_output if is_own and not torch.is_grad_enabled() else None


def _transform_gradient(
    gradients: list[Tensor],
    input: Tensor,
    weight: Tensor | None,
    transform: GradientTransform,
    grad_output: Tensor | None = None,
) -> list[Tensor]:
    """Map ``[weight gradient]`` or ``[weight gradient, bias gradient]``, then observe the batch."""
    if function_transforms.is_mapped_by_autograd(gradients[0]):
        raise RuntimeError(
            "is_grads_batched=True (or vectorize=True) is not possible through a whitened layer: use torch.func"
        )
    if autocast_dtype(input.device) is not None:
        with without_autocast(input.device):
            return _transform_gradient(gradients, input, weight, transform, grad_output)
    constant = None if weight is None else weight.detach()
    # Only a transform that sets `samples_up_to` need take them.
    samples = {} if grad_output is None else {"samples": Samples(input, grad_output)}
    grad_bias = gradients[1] if len(gradients) > 1 else None
    mapped = transform.transform(gradients[0], grad_bias, constant, **samples)
    _observe(transform, input, gradients[0])
    return [gradient for gradient in mapped if gradient is not None]


def _observe_output(grad_output: Tensor, transform: GradientTransform) -> None:
    with without_autocast(grad_output.device):
        call_on_plain_tensors(transform.observe_output, _dense(grad_output))


def _observe(transform: GradientTransform, input: Tensor, grad_weight: Tensor) -> None:
    input = _dense(input)
    if not function_transforms.are_active() and not torch.is_grad_enabled():  # as in most passes
        transform.observe(input, grad_weight)
        return
    dims = grad_weight.dim()

    def observe(input: Tensor, grad_weight: Tensor) -> None:
        transform.observe(input, sum_over_samples(grad_weight, dims))

    call_on_plain_tensors(observe, input, grad_weight)


def _dense(tensor: Tensor) -> Tensor:
    if tensor.is_nested:
        return tensor.values()  # the rows of a jagged tensor
    return tensor if tensor.layout == torch.strided else tensor.to_dense()


@torch.library.custom_op(
    "whiten_layers::transform_gradient",
    mutates_args=(),
    # torch 2.6 cannot infer this schema from list[Tensor]
    schema="(Tensor[] gradients, Tensor input, Tensor? weight, Tensor handle) -> Tensor[]",
    **NOT_IN_CUDA_GRAPHS,
)
def _transform_gradient_op(
    gradients: list[Tensor], input: Tensor, weight: Tensor | None, handle: Tensor
) -> list[Tensor]:
    transform, transformed = _transform_of(handle), gradients
    if _trains_layer(transform):
        transformed = _transform_gradient(gradients, input, weight, transform)
    # The graph expects new tensors with the gradients' strides.
    return [torch.empty_like(old).copy_(new) for old, new in zip(gradients, transformed, strict=True)]


@_transform_gradient_op.register_fake
def _(gradients: list[Tensor], input: Tensor, weight: Tensor | None, handle: Tensor) -> list[Tensor]:
    return [torch.empty_like(gradient) for gradient in gradients]


keep_order(_transform_gradient_op)


@torch.library.custom_op("whiten_layers::observe_output", mutates_args=(), **NOT_IN_CUDA_GRAPHS)
def _observe_output_op(grad_output: Tensor, handle: Tensor) -> Tensor:
    transform = _transform_of(handle)
    if _trains_layer(transform):
        _observe_output(grad_output, transform)
    return grad_output.clone()  # an operation must not return its argument, and is dropped if its result is unused


@_observe_output_op.register_fake
def _(grad_output: Tensor, handle: Tensor) -> Tensor:
    return torch.empty_like(grad_output)


keep_order(_observe_output_op)


class TransformGradient(torch.autograd.Function):
    """Identity ``(input, subject, reads_weight, weight[, bias]) -> (weight[, bias])`` with a transform in backward.

    Saves the input, and the weight if the transform reads it. The operation that follows saves the same input, unless
    it makes its own copy. The map treats the weight as a constant: a second derivative is the mapped derivative of the
    plain gradient, without the derivative of the map itself.
    """

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, subject: Subject, reads_weight: bool, *parameters: Tensor
    ) -> tuple[Tensor, ...]:
        _set_up(ctx, input, subject, reads_weight, parameters[0])
        return tuple(parameter.view_as(parameter) for parameter in parameters)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple:  # type: ignore[override]
        input, *saved = ctx.saved_tensors
        weight, saved = (saved[0], saved[1:]) if ctx.reads_weight else (None, saved)
        if torch.compiler.is_compiling():
            transformed = _transform_gradient_op(list(gradients), input, weight, _handle(ctx, saved))
        else:
            grad_output = None if ctx.kept[0] is None else _take_output_gradient(ctx, gradients[0])
            transformed = _transform_gradient(list(gradients), input, weight, ctx.transform, grad_output)
        return None, None, None, *transformed


def _set_up(ctx: Any, input: Tensor, subject: Subject, reads_weight: bool, weight: Tensor) -> None:
    ctx.reads_weight, ctx.kept = reads_weight, (None, [])  # see `keep_output_gradient`
    _keep(ctx, subject, input, *((weight,) if reads_weight else ()))


class TransformGradientFunctional(torch.autograd.Function):
    """`TransformGradient` for `torch.func`, whose Functions take some 75 µs more for each call."""

    @staticmethod
    def forward(input: Tensor, subject: Subject, reads_weight: bool, *parameters: Tensor) -> tuple[Tensor, ...]:
        return tuple(parameter.view_as(parameter) for parameter in parameters)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        _set_up(ctx, *inputs[:4])

    backward = TransformGradient.backward

    @staticmethod
    def vmap(  # type: ignore[override]
        info: Any, in_dims: tuple, input: Tensor, subject: Subject, reads_weight: bool, *parameters: Tensor
    ) -> tuple:
        if any(dim is not None for dim in in_dims[3:]):
            raise RuntimeError(NO_VMAP_OVER_PARAMETERS)
        input = input.movedim(in_dims[0], 0)  # PyTorch does not call this where nothing is mapped over
        parameters = TransformGradientFunctional.apply(input, subject, reads_weight, *parameters)
        return parameters, (None,) * len(parameters)


def transform_gradients(
    input: Tensor, subject: Subject, reads_weight: bool, parameters: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """Apply `TransformGradient`, or its functional form under a function transform."""
    function = TransformGradientFunctional if function_transforms.are_active() else TransformGradient
    # Detached: otherwise autograd would see a path to the input's gradient, and compute the weight's for it.
    return function.apply(input.detach(), subject, reads_weight, *parameters)


class ObserveOutput(torch.autograd.Function):
    """Identity ``(output, subject, nodes) -> output`` that shows the gradient of the output to a transform.

    The nodes are those of `TransformGradient`, whose output gave this one.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, subject: Subject, nodes: WeakSet | None) -> Tensor:
        # Not a view, so that an activation may modify the layer's output in place.
        ctx.mark_dirty(output)
        ctx.nodes = nodes
        _keep(ctx, subject)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple:  # type: ignore[override]
        if torch.compiler.is_compiling():
            return _observe_output_op(grad_output, _handle(ctx, ctx.saved_tensors)), None, None
        if any(map(will_run, ctx.nodes)):
            _observe_output(grad_output, ctx.transform)
        return grad_output, None, None


class ObserveOutputFunctional(torch.autograd.Function):
    """`ObserveOutput` for `torch.func` and forward mode, which do not support in-place Functions."""

    generate_vmap_rule = True

    @staticmethod
    def forward(output: Tensor, subject: Subject, nodes: WeakSet | None) -> Tensor:
        return output.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.nodes = inputs[2]
        _keep(ctx, inputs[1])

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple:  # type: ignore[override]
        if torch.compiler.is_compiling() or any(map(will_run, ctx.nodes)):
            _observe_output(grad_output, ctx.transform)
        return grad_output, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:  # type: ignore[override]
        return tangent.clone()


def observe_output(output: Tensor, subject: Subject, weight: Tensor) -> Tensor:
    """Apply `ObserveOutput`, or its functional form where in-place Functions are not supported.

    The weight is the one that `TransformGradient` returned. Its nodes are known weakly: the node of one function
    transform need not live as long as the graph of another. A compiled graph has none.
    """
    nodes = None if torch.compiler.is_compiling() else WeakSet(function_transforms.nodes_of(weight))
    if function_transforms.are_active() or function_transforms.is_forward_mode():
        return ObserveOutputFunctional.apply(output, subject, nodes)
    return ObserveOutput.apply(output, subject, nodes)


def _keep(ctx: Any, subject: Subject, *tensors: Tensor) -> None:
    """Save tensors, and the transform's handle; or keep the transform itself, which then outlives its model."""
    if isinstance(subject, Tensor):
        ctx.save_for_backward(*tensors, subject)
    else:
        ctx.save_for_backward(*tensors)
        ctx.transform = subject


def _handle(ctx: Any, saved: Sequence[Tensor]) -> Tensor:
    """Return the handle that a compiled forward pass saved, or the transform's if only backward is compiled."""
    return saved[0] if saved else ctx.transform.handle
