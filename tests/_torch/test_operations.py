"""Marks of custom operations, which not every version of PyTorch has."""

import torch

from whiten_layers import autograd
from whiten_layers._torch.operations import NOT_IN_CUDA_GRAPHS, keep_order


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
