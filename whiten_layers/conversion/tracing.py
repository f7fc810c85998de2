"""Data flow between the modules of a model, which the model's structure alone does not show."""

import copy
import inspect
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import fx, nn

# The tracer does not enter classes defined in _WHOLE, or subclasses of them. It does enter those of _CONTAINERS.
_LIBRARY = str(__package__).rpartition(".")[0]
_WHOLE = ("torch.nn.", f"{_LIBRARY}.layers", f"{_LIBRARY}.norm")
_CONTAINERS = ("torch.nn.modules.module", "torch.nn.modules.container")


def sole_consumers(
    model: nn.Module, layers: tuple[type[nn.Module], ...], followers: tuple[type[nn.Module], ...]
) -> dict[str, str]:
    """Map the name of each layer whose output goes to one follower, and nowhere else, to the follower's name.

    `torch.fx` traces the forward pass in the model's current mode, with the optional arguments at their defaults. No
    tensor is computed, and the model is not changed. A shared module appears under the first of its names. Layers and
    followers that the pass calls several times, under any name, are left out. So are layers with a parameter that
    another module has too, or that the model reads as an attribute outside of the layer. Hooks are ignored, and so is
    any use through ``parameters()`` or ``state_dict()``.

    Args:
        model: any module. For a single layer the result is empty.
        layers: the layers' types. Subclasses, which may compute something else, do not count.
        followers: the followers' types, likewise.

    Raises:
        ValueError: the model cannot be traced. The message says why, in one line.
    """
    tracer = _Tracer({*layers, *followers})
    if tracer.is_leaf_module(model, ""):
        return {}
    try:
        copied = _copied(model)
        nodes = list(tracer.trace(copied, _defaults(copied)).nodes)
    except Exception as error:  # a forward pass without tensors may raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"torch.fx cannot trace {type(model).__name__} ({reason})") from error
    modules = dict(copied.named_modules())
    calls = Counter(_called(nodes, modules))
    owners = Counter(_parameters_used(nodes, copied))
    pairs = {}
    for node in nodes:
        follower = _only_user(node)
        if follower is None:
            continue
        layer, taker = modules[str(node.target)], modules[str(follower.target)]
        if type(layer) not in layers or type(taker) not in followers or calls[layer] > 1 or calls[taker] > 1:
            continue
        if all(owners[parameter] == 1 for parameter in layer.parameters(recurse=False)):
            pairs[str(node.target)] = str(follower.target)
    return pairs


class _Tracer(fx.Tracer):
    """Tracer that enters no torch.nn module but containers, no layer or norm of this library, and no given type.

    It does not enter subclasses of these either: tracing would fail inside a user's own norm.
    """

    proxy_buffer_attributes = True  # otherwise a forward pass that counts its calls in a buffer would count the trace

    def __init__(self, leaves: set[type[nn.Module]]) -> None:
        super().__init__()
        self.leaves = leaves

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        made_in = [base.__module__ for base in type(m).__mro__]
        is_whole = any(place.startswith(_WHOLE) and place not in _CONTAINERS for place in made_in)
        return is_whole or isinstance(m, tuple(self.leaves))


def _copied(model: nn.Module) -> nn.Module:
    """Copy a model, so that its forward pass may set attributes. The copy shares the model's tensors."""
    kept: list[Any] = [*model.parameters(), *model.buffers()]
    uncopied = (torch.Tensor, dist.ProcessGroup) if dist.is_available() else (torch.Tensor,)
    for module in model.modules():
        kept += [value for value in vars(module).values() if isinstance(value, uncopied)]
    return copy.deepcopy(model, {id(one): one for one in kept})


def _defaults(model: nn.Module) -> dict[str, Any]:
    """Return the defaults of a forward pass's arguments that are switches, not tensors or containers of them."""
    parameters = inspect.signature(model.forward).parameters
    switches = (type(None), bool, int, float, str)
    return {name: one.default for name, one in parameters.items() if isinstance(one.default, switches)}


def _called(nodes: list[fx.Node], modules: dict[str, nn.Module]) -> Iterator[nn.Module]:
    """Yield, for each call of a module, that module and every module inside it."""
    for node in nodes:
        if node.op == "call_module":
            yield from modules[str(node.target)].modules()


def _parameters_used(nodes: list[fx.Node], model: nn.Module) -> Iterator[nn.Parameter]:
    """Yield every parameter once for each module that has it, and once for each read outside of its module."""
    for module in model.modules():
        yield from module.parameters(recurse=False)
    named = dict(model.named_parameters(remove_duplicate=False))
    yield from (named[str(node.target)] for node in nodes if node.op == "get_attr" and str(node.target) in named)


def _only_user(node: fx.Node) -> fx.Node | None:
    """Return the module call that takes a module call's output as its one argument, if nothing else uses it."""
    if node.op != "call_module" or len(node.users) != 1:
        return None
    (user,) = node.users
    is_taken = [*user.args, *user.kwargs.values()] == [node]
    return user if user.op == "call_module" and is_taken else None
