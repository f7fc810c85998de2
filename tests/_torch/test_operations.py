"""Marks of custom operations, which not every version of PyTorch has."""

import inspect

import torch

from whiten_layers import autograd
from whiten_layers._torch.operations import NOT_IN_CUDA_GRAPHS, is_exporting, keep_order, leave_unbound


def test_the_marks_are_known_or_left_out():
    if "tags" in NOT_IN_CUDA_GRAPHS:
        for operation in (torch.ops.whiten_layers.transform_gradient, torch.ops.whiten_layers.observe_output):
            hint = "custom_op(tags=[torch.Tag.cudagraph_unsafe]) is to keep an operation out of CUDA graphs"
            assert torch.Tag.cudagraph_unsafe in operation.default.tags, hint
    else:
        assert not hasattr(torch.Tag, "cudagraph_unsafe")
    keep_order(object())  # a version without `register_effect`
    known = hasattr(autograd._transform_gradient_op, "register_effect")
    hint = "CustomOpDef.register_effect and torch.library.EffectType are to come together: see keep_order"
    assert known == hasattr(torch.library, "EffectType"), hint


def test_a_function_is_applied_to_unbound_arguments():
    class Scale(torch.autograd.Function):
        @staticmethod
        def forward(x, factor, *others):
            return (x * factor, *others)

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.factor = inputs[1]

        @staticmethod
        def backward(ctx, gradient, *others):
            return gradient * ctx.factor, None, *others

    leave_unbound(Scale.forward)
    hint = "Function.apply is to read no more of inspect.signature(forward).bind(...) than args, kwargs, apply_defaults"
    x, y = (torch.ones(3, requires_grad=True) for _ in range(2))
    first, second = Scale.apply(x, 2.0, y.view_as(y))
    (first + 3 * second).sum().backward()
    assert x.grad.eq(2).all() and y.grad.eq(3).all(), hint
    assert list(inspect.signature(Scale.forward).parameters) == ["x", "factor", "others"], hint
    assert inspect.signature(Scale.forward).bind(x, factor=2.0).arguments["factor"] == 2.0


def test_whether_torch_export_is_at_work():
    seen = []

    class Model(torch.nn.Module):
        def forward(self, input):
            seen.append(is_exporting())
            return input + 1

    model = Model()
    model(torch.ones(2))
    torch.export.export(model, (torch.ones(2),), strict=False)
    assert seen[0] is False and (seen[-1] is True or not hasattr(torch.compiler, "is_exporting"))
