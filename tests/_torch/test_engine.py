"""The engine of autograd, as far as the library relies on what it does not document."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from whiten_layers._torch.engine import call_at_end_of_pass, current_pass, is_nested_pass


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
