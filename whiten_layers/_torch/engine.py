"""Access to the backward pass that autograd's engine is running: its number, its nesting, which gradients it wants,
whether a gradient has changed on its way, and a call at its end.
"""

import sys
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from .function_transforms import call_on_plain_tensors

_FunctionNode = torch.autograd.function.BackwardCFunction  # the node of a custom Function; also of a compiled graph
_BACKWARD = _FunctionNode.apply.__code__  # what the engine calls of it
_called_at_end: set[int] = set()  # passes that have a callback
# Of nodes that have run: the number of the pass, and by their ids the leaves behind the node, with whether they are
# wanted in that pass. A node of a compiled graph is asked once for each layer, and has the leaves of all of them.
_wanted_leaves: WeakKeyDictionary[Any, tuple[int, dict[int, bool]]] = WeakKeyDictionary()


def current_pass() -> int | None:
    """Return the number of the running backward pass, or None where no pass runs that can call back at its end."""
    compiled = sys.modules.get("torch._dynamo.compiled_autograd")  # whoever uses it has imported it
    if compiled is not None and compiled.in_compiled_autograd_region:
        return None  # a compiled pass drops the callbacks that were not there when it was compiled
    number = torch._C._current_graph_task_id()
    return None if number == -1 else number


def is_nested_pass() -> bool:
    """Tell whether the running pass was started by a Function in another's backward, as a reentrant checkpoint does.

    To be called from a custom Function's backward, which is the first one on the stack.
    """
    frame, functions = sys._getframe(), 0
    while frame is not None and functions < 2:
        functions += frame.f_code is _BACKWARD
        frame = frame.f_back  # type: ignore[assignment]
    return functions == 2


def will_run(node: Any) -> bool:
    """Tell whether the running pass runs a node of the graph. True where the engine cannot say: there is no pass."""
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # also for a leaf whose gradient `torch.autograd.grad` was asked for
        return True


def wants_gradient(leaves: Iterable[Tensor]) -> bool:
    """Tell whether the running pass takes a gradient of any of these leaves from the node that it runs.

    A compiled graph is one node, which computes the gradients of all leaves behind it, also of those that nobody asked
    for. True where the engine cannot say: no such node runs, no leaf is given, or a leaf is not behind the node.
    """
    node, number = torch._C._current_autograd_node(), current_pass()
    if number is None or not isinstance(node, _FunctionNode):
        return True
    known, wanted = _wanted_leaves.get(node, (None, {}))
    if known != number:
        behind = [leaf for leaf, _ in node.next_functions if hasattr(leaf, "variable")]
        wanted = {id(leaf.variable): will_run(leaf) for leaf in behind}
        _wanted_leaves[node] = number, wanted
    answers = (wanted.get(id(leaf), True) for leaf in leaves)
    return next(answers, True) or any(answers)


def version_of(tensor: Tensor) -> int:
    """Return how often a tensor's memory was written to; views of one memory share the number."""
    return tensor._version


def call_at_end_of_pass(number: int, function: Callable[[int], None], after: int = 2) -> None:
    """Call a function with the running pass's number, once and on plain tensors, when the pass has ended.

    Further calls for the same pass do nothing. `after` is the length of a chain of callbacks, each queued by the one
    before, that come first. DDP's own send and await the gradients, and with a static graph the first of two queues
    the second: what is sent here then follows them on every process.
    """
    if number not in _called_at_end:  # a pass that ends in an error never calls back: its number just stays
        _called_at_end.add(number)
        _queue(number, function, after)


def _queue(number: int, function: Callable[[int], None], after: int) -> None:
    def callback() -> None:
        if after > 0:
            _queue(number, function, after - 1)
        else:
            _called_at_end.discard(number)
            call_on_plain_tensors(partial(function, number))

    torch.autograd.Variable._execution_engine.queue_callback(callback)
