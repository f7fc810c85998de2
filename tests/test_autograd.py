"""The Functions in the situations that autograd allows: several passes, higher derivatives, compiled graphs."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from whiten_layers import FeatureWhitening, WhitenedConv2d, WhitenedLinear, whiten

from .helpers import batch, buffers, each_transform, network


@each_transform
def test_two_forward_passes_before_two_backward_passes(transform):
    model = network(transform)
    first, second = model(batch(0)).square().sum(), model(batch(1)).square().sum()
    first.backward()  # refreshes P in place
    second.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert model[0].transform.num_batches_tracked == 2


@each_transform
def test_a_module_used_twice_in_one_pass_meets_one_map_and_refreshes_once(transform):
    layer = WhitenedLinear(4, 4, transform=transform)
    layer(torch.randn(9, 4)).sum().backward()
    refreshed = layer.transform.inputs.num_refreshes.item()
    precision = layer.transform.inputs.precision.clone()
    layer.zero_grad()
    seen = []
    x = torch.randn(9, 4, requires_grad=True)
    y = layer(torch.tanh(layer(x)))
    y.register_hook(lambda grad: seen.append(layer.transform.inputs.precision.clone()))
    x.register_hook(lambda grad: seen.append(layer.transform.inputs.precision.clone()))
    y.sum().backward()
    assert all(torch.equal(p, precision) for p in seen) and len(seen) == 2
    assert not torch.equal(layer.transform.inputs.precision, precision)
    assert layer.transform.inputs.num_refreshes == refreshed + 1
    assert layer.transform.num_batches_tracked == 2


@each_transform
def test_two_forward_passes_before_one_backward_pass_sum_their_transformed_gradients(transform):
    """A Siamese network: one map for both, the one in force before the pass, and two batches observed."""
    layer = WhitenedConv2d(3, 4, 3, dtype=torch.float64, transform=transform)
    for seed in range(3):
        layer(batch(seed).double()).sin().sum().backward()
    apart, (a, b) = copy.deepcopy(layer), (batch(3).double(), batch(4).double())
    layer.zero_grad()
    (layer(a).sin() - layer(b).cos()).sum().backward()
    expected = []
    for x, head in ((a, torch.sin), (b, lambda y: -y.cos())):
        one = copy.deepcopy(apart)
        one.zero_grad()
        head(one(x)).sum().backward()
        expected.append(one.weight.grad)
    torch.testing.assert_close(layer.weight.grad, sum(expected), rtol=1e-12, atol=1e-12)
    assert layer.transform.num_batches_tracked == 4


@each_transform
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoints_keep_one_map_for_a_shared_layer(transform, use_reentrant):
    torch.manual_seed(0)
    whole = WhitenedLinear(4, 4, dtype=torch.float64, transform=transform)
    parts = copy.deepcopy(whole)
    for seed in range(3):
        x = torch.randn(9, 4, generator=torch.Generator().manual_seed(seed)).double().requires_grad_()
        for layer in (whole, parts):
            layer.zero_grad()

        def block(x):
            return torch.tanh(parts(x))

        whole(torch.tanh(whole(torch.tanh(whole(x))))).sum().backward()
        # The call outside comes first in the backward pass: a reentrant one is then known to be within it.
        inside = checkpoint(block, checkpoint(block, x, use_reentrant=use_reentrant), use_reentrant=use_reentrant)
        parts(inside).sum().backward()
    torch.testing.assert_close(whole.weight.grad, parts.weight.grad, rtol=0, atol=0)
    torch.testing.assert_close(buffers(whole), buffers(parts), rtol=0, atol=0)


@each_transform
def test_retain_graph(transform):
    model = network(transform)
    loss = model(batch(0)).square().sum()
    loss.backward(retain_graph=True)
    loss.backward()
    assert model[0].transform.num_batches_tracked == 2


def test_the_gradient_of_the_input_alone_asks_nothing_of_the_weight():
    layer = WhitenedLinear(4, 3)
    x = torch.randn(9, 4, requires_grad=True)
    torch.autograd.grad(layer(x).square().sum(), x)
    assert layer.transform.num_batches_tracked == 0


def test_only_the_bias_is_asked_for():
    layer = WhitenedLinear(4, 3, transform=FeatureWhitening(update_interval=1))
    layer(torch.randn(9, 4)).sum().backward()
    layer.zero_grad()
    loss = layer(torch.randn(9, 4) + 1).square().sum()
    before = copy.deepcopy(layer.transform.state_dict())
    (gradient,) = torch.autograd.grad(loss, [layer.bias], retain_graph=True)
    layer.transform.load_state_dict(before)
    loss.backward()
    torch.testing.assert_close(gradient, layer.bias.grad, rtol=0, atol=0)


def test_a_bias_whose_plain_gradient_is_zero_still_absorbs_the_shift():
    layer = WhitenedLinear(4, 3, dtype=torch.float64, transform=FeatureWhitening.exact())
    layer(torch.randn(20, 4, dtype=torch.float64) + 2).sum().backward()
    mean = layer.transform.inputs.mean[0].clone()
    x = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    layer.zero_grad()
    # The gradient of the input is W's alone: its derivative with respect to the bias is zero.
    (gradient,) = torch.autograd.grad(layer(x).sum(), x, create_graph=True)
    gradient.square().sum().backward()
    torch.testing.assert_close(layer.bias.grad, -layer.weight.grad @ mean)


def test_a_frozen_bias_stays_without_a_gradient():
    layer = WhitenedLinear(4, 3)
    layer.bias.requires_grad_(False)
    layer(torch.randn(9, 4)).sum().backward()
    assert layer.bias.grad is None and layer.weight.grad is not None


@each_transform
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_counts_a_batch_once(transform, reentrant):
    plain, recomputed = network(transform, inplace=False), network(transform, inplace=False)
    for seed in range(4):
        x = batch(seed).requires_grad_()
        for model in (plain, recomputed):
            model.zero_grad()
        plain(x).square().sum().backward()
        checkpoint(recomputed, x, use_reentrant=reentrant).square().sum().backward()
    torch.testing.assert_close(buffers(plain), buffers(recomputed), rtol=0, atol=0)
    for a, b in zip(plain.parameters(), recomputed.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=0)


@each_transform
def test_a_gradient_penalty_is_the_plain_one_transformed(transform):
    """The second derivative with respect to the input and then the weight is PyTorch's own, and passes the map."""
    model = network(transform, inplace=False).double()
    plain = copy.deepcopy(model).eval()
    x = batch(0).double().requires_grad_()
    penalties = []
    for net in (model, plain):
        (gradient,) = torch.autograd.grad(torch.tanh(net(x)).sum(), x, create_graph=True)
        penalties.append(gradient.square().sum())
        penalties[-1].backward()
    torch.testing.assert_close(*penalties, rtol=0, atol=0)
    # Nothing has been refreshed before this pass, so the map is the identity.
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-12, atol=1e-12)


@each_transform
def test_hessian_vector_products_outlive_a_refresh(transform):
    """The derivative of a transformed gradient is the transformed derivative: P as it was in that pass."""
    layer = WhitenedLinear(4, 3, dtype=torch.float64, transform=transform)
    x = torch.randn(9, 4, dtype=torch.float64)
    layer(x).tanh().sum().backward()
    state = copy.deepcopy(layer.transform.state_dict())
    layer.zero_grad()

    def gradients(scale):
        layer.transform.load_state_dict(state)
        loss = (layer(x) * scale).tanh().sum()
        return torch.autograd.grad(loss, [layer.weight, layer.bias], create_graph=True)

    scale = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    size = sum(gradient.square().sum() for gradient in gradients(scale))  # ends in a refresh
    (derivative,) = torch.autograd.grad(size, scale)
    step = 1e-5
    above, below = (sum(g.square().sum() for g in gradients(1.0 + sign * step)) for sign in (1, -1))
    # δ's trace is normalised, so neither side's map depends on the scale within the pass.
    torch.testing.assert_close(derivative, (above - below) / (2 * step), rtol=1e-6, atol=1e-6)


def test_a_loss_outlives_its_model():
    loss = WhitenedLinear(4, 3)(torch.randn(9, 4)).sum()
    loss.backward()


def test_an_error_in_backward_leaves_the_next_pass_whole():
    layer = WhitenedLinear(4, 3, transform=FeatureWhitening(update_interval=1))

    def fail(grad):
        raise RuntimeError("from a hook")

    x = torch.randn(9, 4, requires_grad=True)
    middle = torch.tanh(x)
    middle.register_hook(fail)
    with pytest.raises(RuntimeError, match="from a hook"):
        layer(middle).sum().backward()
    layer(torch.randn(9, 4)).sum().backward()
    assert layer.transform.inputs.num_refreshes >= 1


@each_transform
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_gradient_has_the_strides_of_the_plain_one(layout, transform):
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, 6, 3),
        nn.Conv2d(6, 8, 1),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.ConvTranspose2d(8, 4, 3, stride=2),
    ]
    plain = nn.Sequential(*layers, nn.Conv2d(4, 1, 1)).to(memory_format=layout)
    model, x = whiten(copy.deepcopy(plain), transform), torch.randn(2, 3, 8, 8).to(memory_format=layout)
    for _ in range(2):  # DDP warns of others, and fused optimizers refuse them
        strides = []
        for one in (plain, model):
            one.zero_grad()
            one(x).square().mean().backward()
            strides.append([parameter.grad.stride() for parameter in one.parameters()])
        assert strides[0] == strides[1]


@each_transform
def test_channels_last_and_strided_inputs(transform):
    layer = WhitenedConv2d(4, 3, 3, transform=transform)
    strided = copy.deepcopy(layer)
    twin = copy.deepcopy(layer).to(memory_format=torch.channels_last)
    for _ in range(3):
        x = torch.randn(5, 4, 6, 12)
        for module, given in [
            (layer, x[..., ::2].contiguous()),
            (twin, x[..., ::2].contiguous(memory_format=torch.channels_last)),
        ]:
            module.zero_grad()
            module(given).square().sum().backward()
        strided.zero_grad()
        strided(x[..., ::2]).square().sum().backward()
    torch.testing.assert_close(layer.weight.grad, twin.weight.grad, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(layer.weight.grad, strided.weight.grad, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("transform", [FeatureWhitening(), FeatureWhitening.exact()], ids=["default", "exact"])
def test_a_batch_counts_as_bad_by_the_weights_gradient_if_the_biass_is_finite(transform):
    layer = WhitenedLinear(4, 3, transform=transform)
    for scale in (1.0, 1e30):
        layer.zero_grad()
        layer(1e10 * torch.ones(5, 4)).backward(scale * torch.ones(5, 3))
        assert layer.weight.grad.isfinite().all() == (scale == 1)  # the plain bias's gradient is 5e30
    assert layer.transform.num_batches_skipped == 1
