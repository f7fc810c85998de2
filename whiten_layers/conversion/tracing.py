"""Which module's output goes to which: what a model's structure alone does not tell."""

import copy
import inspect
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import fx, nn

# Where the classes are made that are not looked into, nor are what is made from them; and the classes that are.
_LIBRARY = __name__.split(".")[0]
_WHOLE = ("torch.nn.", f"{_LIBRARY}.layers", f"{_LIBRARY}.norm")
_CONTAINERS = ("torch.nn.modules.module", "torch.nn.modules.container")


def sole_consumers(
    model: nn.Module, layers: tuple[type[nn.Module], ...], followers: tuple[type[nn.Module], ...]
) -> dict[str, str]:
    """The layers whose output goes to one follower and nowhere else: the layer's name, then the follower's.

    The forward pass is traced by `torch.fx`, in the mode that the model is in, with the optional arguments at their
    defaults; no tensor is computed, and the model is not changed. A shared module has the first of its names. Left
    out are a layer and a follower that the pass calls several times, under whatever names; and a layer one of whose
    parameters another module has too, or the model uses, as an attribute, outside of the layer. Hooks are not looked
    at, nor is what goes through ``parameters()`` or ``state_dict()``.

    Args:
        model: any module. In a single layer nothing follows.
        layers: the layers' types. Subclasses of them, which may compute otherwise, do not count.
        followers: the types of what is to follow, likewise.

    Raises:
        ValueError: the model cannot be traced. The message says why, in one line.
    """
    tracer = _Tracer({*layers, *followers})
    if tracer.is_leaf_module(model, ""):
        return {}
    try:
        copied = _copied(model)
        nodes = list(tracer.trace(copied, _defaults(copied)).nodes)
    except Exception as error:  # whatever a forward pass raises that is given no tensors
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
    """Looks into no module of torch.nn but containers, of this library's layers and norms, or of the types asked about.

    Nor into a module of a subclass of theirs: of a norm of one's own it would not come to the end.
    """

    proxy_buffer_attributes = True  # else a forward pass that counts its calls in a buffer would count this one

    def __init__(self, leaves: set[type[nn.Module]]) -> None:
        super().__init__()
        self.leaves = leaves

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        made_in = [base.__module__ for base in type(m).__mro__]
        is_whole = any(place.startswith(_WHOLE) and place not in _CONTAINERS for place in made_in)
        return is_whole or isinstance(m, tuple(self.leaves))


def _copied(model: nn.Module) -> nn.Module:
    """A copy whose forward pass may set attributes. The tensors are the model's own."""
    kept: list[Any] = [*model.parameters(), *model.buffers()]
    uncopied = (torch.Tensor, dist.ProcessGroup) if dist.is_available() else (torch.Tensor,)
    for module in model.modules():
        kept += [value for value in vars(module).values() if isinstance(value, uncopied)]
    return copy.deepcopy(model, {id(one): one for one in kept})


def _defaults(model: nn.Module) -> dict[str, Any]:
    """The optional arguments of a forward pass that are switches, not tensors or containers of them."""
    parameters = inspect.signature(model.forward).parameters
    switches = (type(None), bool, int, float, str)
    return {name: one.default for name, one in parameters.items() if isinstance(one.default, switches)}


def _called(nodes: list[fx.Node], modules: dict[str, nn.Module]) -> Iterator[nn.Module]:
    """Every module once for each call, and for each call of a module that has it within."""
    for node in nodes:
        if node.op == "call_module":
            yield from modules[str(node.target)].modules()


def _parameters_used(nodes: list[fx.Node], model: nn.Module) -> Iterator[nn.Parameter]:
    """Every parameter once for each module that has it, and for each time it is read outside of its module."""
    for module in model.modules():
        yield from module.parameters(recurse=False)
    named = dict(model.named_parameters(remove_duplicate=False))
    yield from (named[str(node.target)] for node in nodes if node.op == "get_attr" and str(node.target) in named)


def _only_user(node: fx.Node) -> fx.Node | None:
    """The module's call that takes the output of a module's call as its one argument, if nothing else takes it."""
    if node.op != "call_module" or len(node.users) != 1:
        return None
    (user,) = node.users
    is_taken = [*user.args, *user.kwargs.values()] == [node]
    return user if user.op == "call_module" and is_taken else None
