"""PyTorch's own samples of each layer, with the whitened twin in the plain one's place."""

import copy

import pytest
import torch
from torch import nn
from torch.testing._internal.common_modules import module_db
from torch.utils._pytree import tree_leaves

from whiten_layers import whiten
from whiten_layers.layers import TWINS


def samples():
    for info in module_db:
        if info.module_cls not in TWINS:
            continue
        inputs = info.module_inputs_func(info, device="cpu", dtype=torch.float64, requires_grad=False, training=True)
        for number, sample in enumerate(inputs):
            if sample.forward_input is not None:
                yield pytest.param(info.module_cls, sample, id=f"{info.name}-{number}-{sample.desc}")


@pytest.mark.parametrize("kind, sample", list(samples()))
def test_a_sample_passes_with_the_twin_in_the_plain_layers_place(kind, sample):
    torch.manual_seed(0)
    plain = kind(*sample.constructor_input.args, **sample.constructor_input.kwargs).double()
    twin = whiten(copy.deepcopy(plain))
    if getattr(plain, "in_proj_weight", ...) is None:  # an attention without a weight for query, key and value in one
        assert type(twin) is kind
        return
    assert type(twin) is TWINS[kind]
    results = []
    for layer in (plain, twin):
        tensors = [a.clone().requires_grad_() for a in sample.forward_input.args]
        output = layer(*tensors, **sample.forward_input.kwargs)
        outputs = [leaf for leaf in tree_leaves(output) if leaf is not None]
        torch.autograd.backward([leaf.square().sum() for leaf in outputs])
        results.append([*(leaf.detach() for leaf in outputs), *(tensor.grad for tensor in tensors)])
        if sample.reference_fn is not None:
            expected = sample.reference_fn(layer, *sample.forward_input.args, **sample.forward_input.kwargs)
            torch.testing.assert_close(output, expected)
    torch.testing.assert_close(*results, rtol=0, atol=0)
    # Until the first refresh a whitened gradient is the plain one.
    for ours, theirs in zip(twin.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-12)
    called = twin.out_proj if kind is nn.MultiheadAttention else twin  # with a query, key and value that differ
    assert called.transform.num_batches_tracked == 1


def test_there_are_samples_of_every_layer():
    own = {kind for kind in TWINS if kind.__module__.startswith("torch.") and not TWINS[kind].is_inner}
    assert {parameters.values[0] for parameters in samples()} == own and len(own) == 8
