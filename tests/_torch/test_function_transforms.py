"""Function transforms, as far as the library relies on what PyTorch does not document."""

import pytest
import torch
from torch.autograd import forward_ad

from whiten_layers._torch import function_transforms
from whiten_layers._torch.function_transforms import call_on_plain_tensors


def test_whether_a_function_transform_is_active():
    seen = []

    def square(x):
        seen.append(function_transforms.are_active())
        return x.square()

    torch.func.grad(square)(torch.tensor(1.0))
    square(torch.tensor(1.0))
    assert seen == [True, False], "torch._C._are_functorch_transforms_active is to tell of torch.func.grad"


def test_the_nodes_of_a_tensor_in_every_graph():
    """Each pass, that of a transform and one around it, comes to the node of its own graph."""
    w = torch.ones(3, requires_grad=True)
    nodes = function_transforms.nodes_of
    names = []

    def square(x, w):
        names.append([[node.name() for node in nodes(y)] for y in (w.square(), x * w.square())])
        return (x * w.square()).sum()

    torch.func.grad(square)(torch.ones(3), w)
    torch.func.grad(square, argnums=1)(torch.ones(3), w)
    torch.vmap(square, in_dims=(0, None))(torch.ones(2, 3), w)
    power, product = "PowBackward0", "MulBackward0"
    hint = "torch._C._functorch.get_unwrapped is to lead from one transform to the next"
    assert names[0] == [[power], [product, product]], hint  # of x the transform follows the product alone
    assert names[1] == [[power, power], [product, product]], hint
    assert names[2] == [[power], [product]], hint
    assert [node.name() for node in nodes(w.square())] == [power] and nodes(w) == []


def test_whether_vmap_maps_over_a_tensor():
    seen = []

    def two(x, y):
        seen.append((function_transforms.is_mapped(x), function_transforms.is_mapped(y)))
        return x + y

    torch.vmap(two, in_dims=(0, None))(torch.ones(3), torch.ones(2))
    hint = "torch._C._functorch.is_batchedtensor is to tell of torch.vmap: ensembles then get a clear error"
    assert seen == [(True, False)], hint


def test_whether_autograds_own_vmap_maps_over_a_tensor():
    seen = []
    x = torch.ones(3, requires_grad=True)
    y = 2 * x
    y.register_hook(lambda grad: seen.append(function_transforms.is_mapped_by_autograd(grad)))
    torch.autograd.grad(y, x, torch.eye(3), is_grads_batched=True)
    torch.autograd.grad(2 * x, x, torch.ones(3))
    hint = "torch._C._functorch.is_legacy_batchedtensor is to tell of is_grads_batched=True"
    assert seen == [True], hint


def test_whether_it_is_forward_mode():
    assert not function_transforms.is_forward_mode()
    with forward_ad.dual_level():
        hint = "torch.autograd.forward_ad._current_level is to be at least 0 inside dual_level()"
        assert function_transforms.is_forward_mode(), hint


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")  # by PyTorch itself, in jvp
def test_plain_tensors_under_every_transform():
    seen = []

    def record(x):
        seen.append((type(x), tuple(x.shape), torch.is_grad_enabled(), function_transforms.are_active()))

    def function(x):
        call_on_plain_tensors(record, x)
        return x.square().sum()

    batch = torch.randn(4, 3)
    for call in (function, torch.func.grad(function)):
        call(batch[0])
    torch.vmap(torch.func.grad(function), in_dims=1)(batch.T)
    torch.func.jvp(function, (batch[0],), (batch[1],))
    shapes = [shape for _, shape, _, _ in seen]
    assert shapes == [(3,), (3,), (4, 3), (3,)]  # the mapped dimension first
    assert {(kind, grad, active) for kind, _, grad, active in seen} == {(torch.Tensor, False, False)}
