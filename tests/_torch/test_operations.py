"""Custom operations' marks, which not every version of PyTorch has, and calls that are quicker."""

import torch

from whiten_layers import autograd
from whiten_layers._torch.operations import NOT_IN_CUDA_GRAPHS, copy_each, is_exporting, keep_order


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


def test_tensors_are_copied_each_into_its_own():
    targets = [torch.zeros(2, 3), torch.zeros(()), torch.zeros(4, dtype=torch.float64)]
    sources = [torch.randn(2, 3), torch.randn(()), torch.randn(4, dtype=torch.float64)]
    places = [target.data_ptr() for target in targets]
    copy_each(targets, sources)
    assert all(map(torch.equal, targets, sources)) and places == [target.data_ptr() for target in targets]


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
