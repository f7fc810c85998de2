"""The engine of autograd, as far as the library relies on what it does not document."""

import gc
import weakref

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from whiten_layers._torch.engine import (
    call_at_end_of_pass,
    current_pass,
    is_nested_pass,
    version_of,
    wants_gradient,
    will_run,
)


def test_a_pass_has_a_number():
    seen = []
    x = torch.ones(3, requires_grad=True)
    for _ in range(2):
        y = (2 * x).sum()
        y.register_hook(lambda grad: seen.append(current_pass()))
        y.backward()
    hint = "torch._C._current_graph_task_id is to give each backward pass a number of its own, and -1 outside"
    assert current_pass() is None and None not in seen and seen[0] != seen[1], hint


def test_a_compiled_autograd_has_no_pass(monkeypatch):
    compiled = pytest.importorskip("torch._dynamo.compiled_autograd")
    hint = "torch._dynamo.compiled_autograd.in_compiled_autograd_region is to tell whether one is running"
    assert getattr(compiled, "in_compiled_autograd_region", None) is False, hint
    monkeypatch.setattr(compiled, "in_compiled_autograd_region", True)
    seen = []
    x = torch.ones(3, requires_grad=True)
    x.register_hook(lambda grad: seen.append(current_pass()))
    x.sum().backward()
    assert seen == [None]


class AskInBackward(torch.autograd.Function):
    seen: list = []  # noqa: RUF012

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        AskInBackward.seen.append(is_nested_pass())
        return grad


def test_a_reentrant_checkpoint_runs_a_pass_inside_a_pass():
    AskInBackward.seen.clear()
    x = torch.ones(3, requires_grad=True)
    inside = checkpoint(lambda x: AskInBackward.apply(2 * x), x, use_reentrant=True)
    AskInBackward.apply(inside).sum().backward()
    hint = "the engine is to call torch.autograd.function.BackwardCFunction.apply for a Function: see is_nested_pass"
    assert AskInBackward.seen == [False, True], hint


# By what a pass is asked for, with x, w and their product: whether it goes on to w.
ASKED = {
    "backward": (lambda x, w, y: y.backward(), True),
    "backward for w": (lambda x, w, y: y.backward(inputs=[w]), True),
    "backward for x": (lambda x, w, y: y.backward(inputs=[x]), False),
    "grad of w": (lambda x, w, y: torch.autograd.grad(y, w), True),
    "grad of x": (lambda x, w, y: torch.autograd.grad(y, x), False),
    "grad of both": (lambda x, w, y: torch.autograd.grad(y, [x, w]), True),
}
each_pass = pytest.mark.parametrize("ask, expected", ASKED.values(), ids=ASKED.keys())


@each_pass
def test_whether_a_node_will_run(ask, expected):
    seen = []
    x, w = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    inner = 2 * w
    product = x * inner
    leaf = inner.grad_fn.next_functions[0][0]
    product.register_hook(lambda grad: seen.extend([will_run(inner.grad_fn), will_run(leaf)]))
    ask(x, w, product.sum())
    hint = "torch._C._will_engine_execute_node is to tell whether a pass comes to a node, and to raise for a leaf's own"
    assert seen == [expected, expected], hint
    assert will_run(inner.grad_fn), "outside of a pass it cannot be said, and torch is to raise"


class AskForLeaves(torch.autograd.Function):
    """As the node of a compiled graph: it has the gradients of all its leaves."""

    seen: list = []  # noqa: RUF012

    @staticmethod
    def forward(ctx, leaves, x, w):
        ctx.leaves = leaves
        return x * w

    @staticmethod
    def backward(ctx, grad):
        AskForLeaves.seen.append([wants_gradient(leaves) for leaves in ctx.leaves])
        return None, grad, grad


@each_pass
def test_which_leaves_of_a_node_get_a_gradient(ask, expected):
    AskForLeaves.seen.clear()
    x, w, other = (torch.ones(3, requires_grad=True) for _ in range(3))
    ask(x, w, AskForLeaves.apply([[w], iter([w]), [w, x], [other], []], 2 * x, w).sum())
    hint = "torch._C._current_autograd_node is to be the node that runs, and its next_functions its leaves"
    # x is not behind this node, but behind another; nor is the third leaf. Both cannot be told from wanted ones.
    assert AskForLeaves.seen == [[expected, expected, True, True, True]], hint
    assert wants_gradient([w]), "outside of a pass it cannot be said"


def test_leaves_are_asked_about_anew_in_every_pass():
    AskForLeaves.seen.clear()
    x, w = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    y = AskForLeaves.apply([[w], [x]], x, w).sum()
    torch.autograd.grad(y, x, retain_graph=True)
    torch.autograd.grad(y, w, retain_graph=True)
    y.backward()
    assert AskForLeaves.seen == [[False, True], [True, False], [True, True]]


def test_it_cannot_be_said_in_a_node_that_is_no_functions():
    seen = []
    x, w = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    y = x * w
    y.register_hook(lambda grad: seen.append(wants_gradient([w])))
    torch.autograd.grad(y.sum(), x)
    assert seen == [True]


def test_a_node_that_has_been_asked_is_not_kept_alive():
    x, w = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    y = AskForLeaves.apply([[w]], x, w)
    node = weakref.ref(y.grad_fn)
    y.sum().backward()
    del y
    gc.collect()
    assert node() is None


def test_a_function_is_called_once_at_the_end_behind_other_callbacks():
    order = []
    queue = torch.autograd.Variable._execution_engine.queue_callback

    def hook(grad):
        for _ in range(2):
            call_at_end_of_pass(current_pass(), lambda number: order.append(("ours", number is not None)))
        # As DDP with a static graph: a callback that queues another.
        queue(lambda: (order.append("first"), queue(lambda: order.append("second"))))

    x = torch.ones(3, requires_grad=True)
    y = 2 * x
    y.register_hook(hook)
    x.register_hook(lambda grad: order.append("gradient"))
    for _ in range(2):
        order.clear()
        y.sum().backward(retain_graph=True)
        hint = "torch.autograd.Variable._execution_engine.queue_callback is to call when a pass has ended"
        assert order == ["gradient", "first", "second", ("ours", True)], hint


def test_a_pass_that_fails_leaves_the_next_one_its_call():
    calls = []

    def fail(grad):
        call_at_end_of_pass(current_pass(), calls.append)
        raise RuntimeError("from a hook")

    x = torch.ones(3, requires_grad=True)
    failing, fine = 2 * x, 3 * x
    failing.register_hook(fail)
    fine.register_hook(lambda grad: call_at_end_of_pass(current_pass(), calls.append))
    with pytest.raises(RuntimeError, match="from a hook"):
        failing.sum().backward()
    fine.sum().backward()
    assert len(calls) == 1


def test_a_version_counts_what_is_written():
    tensor = torch.zeros(2, 3)
    view, before = tensor.t(), version_of(tensor)
    assert version_of(view) == before
    view.add_(1)
    assert version_of(tensor) == version_of(view) == before + 1, "is `Tensor._version` still counted?"
