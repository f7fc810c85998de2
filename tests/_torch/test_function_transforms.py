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
