"""The inside of PyTorch's attention, as far as the library relies on what it does not document."""

import torch
import torch.nn.functional as F
from torch import nn

from whiten_layers._torch.attention import OutProjection, attend, project_apart


def test_attention_projects_by_the_functions_that_stand_for_its_weights():
    torch.manual_seed(0)
    plain = nn.MultiheadAttention(6, 2)
    query, key = torch.randn(4, 3, 6), torch.randn(5, 3, 6)
    called = []

    def project_in(query, key, value):
        called.append("in")
        return project_apart(query, key, value, plain.in_proj_weight, plain.in_proj_bias)

    def project_out(rows):
        called.append("out")
        return F.linear(rows, plain.out_proj.weight, plain.out_proj.bias)

    hint = "F.multi_head_attention_forward is to call _in_projection_packed and linear once each for its projections"
    for need_weights in (True, False):
        called.clear()
        arguments = (6, 2, project_in, None, None, None, False, 0.0, project_out, None)
        output = attend(query, key, key, *arguments, need_weights=need_weights)
        assert called == ["in", "out"], hint
        expected = plain(query, key, key, need_weights=need_weights)
        torch.testing.assert_close(output, expected, rtol=0, atol=0, msg=hint)


def test_an_attention_ends_with_a_linear_layer_of_its_own_class():
    hint = "torch.nn.modules.linear.NonDynamicallyQuantizableLinear is to be the class of an attention's out_proj"
    assert type(nn.MultiheadAttention(6, 2).out_proj) is OutProjection, hint
    assert issubclass(OutProjection, nn.Linear) and OutProjection.forward is nn.Linear.forward, hint
