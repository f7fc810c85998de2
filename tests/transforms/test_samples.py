"""Of a small batch FeatureWhitening whitens the samples, and not the weight's gradient: the same map for less."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from whiten_layers import Chain, FeatureWhitening, PSIScaling, WhitenedConv2d, WhitenedLinear, layers

from ..cases import everywhere

TRANSFORMS = {
    "defaults": FeatureWhitening(update_interval=1),
    "one power, blocks": FeatureWhitening(update_interval=1, power=1.0, block_size=2),
    "patch, both sides, blocks": FeatureWhitening(update_interval=1, features="patch", output_power=0.5, block_size=2),
    "about the mean": FeatureWhitening(update_interval=1, center=True),
    "chain": Chain(FeatureWhitening(update_interval=1), PSIScaling()),
}


@pytest.fixture
def taken(monkeypatch):
    """The shapes of the inputs whose samples were whitened."""
    shapes = []
    whitened = FeatureWhitening._from_samples

    def noted(self, samples, correction):
        shapes.append(tuple(samples.input.shape))
        return whitened(self, samples, correction)

    monkeypatch.setattr(FeatureWhitening, "_from_samples", noted)
    return shapes


def gradients(layer: nn.Module, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """The layer's gradients after each of some batches, and its buffers in the end."""
    found = []
    for x in inputs:
        layer.zero_grad()
        y = layer(x)
        (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).cos().view_as(y) + y.square()).sum().backward()
        found += [parameter.grad.clone() for parameter in layer.parameters()]
    return found + [buffer for buffer in layer.buffers() if buffer.is_floating_point()]


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@everywhere
def test_both_ways_give_one_gradient(case, transform, taken):
    """They differ in the order of sums, so by rounding alone."""
    _, ours = case.make_pair(transform)
    theirs = copy.deepcopy(ours)
    # A shift of the mean that a bias absorbs is not one of the samples; a transposed convolution has another weight.
    about_the_mean = transform is TRANSFORMS["about the mean"] and ours.bias is not None
    can = not (case.name.startswith("transposed") or about_the_mean)
    assert (ours.transform.samples_up_to > 0) <= can
    for layer, limit in ((ours, 10**9 if can else 0), (theirs, 0)):
        layer.transform.samples_up_to = limit
    inputs = [case.make_input(seed) for seed in range(3)]
    results = gradients(ours, inputs)
    assert len(taken) == (3 if can else 0)
    torch.testing.assert_close(results, gradients(theirs, inputs), rtol=1e-9, atol=1e-10)
    assert len(taken) == (3 if can else 0)


def test_a_weight_gradient_from_two_graphs_is_transformed_as_one(taken):
    """A gradient penalty: the weight's gradient is not only that of the operation whose output's gradient is known."""
    torch.manual_seed(0)
    ours = WhitenedLinear(64, 300, dtype=torch.float64, transform=FeatureWhitening(update_interval=1))
    theirs = copy.deepcopy(ours)
    theirs.transform.samples_up_to = 0
    inputs = torch.randn(4, 2, 64, dtype=torch.float64)
    results = []
    for layer in (ours, theirs):
        for x in inputs:
            layer.zero_grad()
            x.requires_grad_()
            loss = layer(x).tanh().sum()
            (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
            (loss + gradient.square().sum()).backward()
        results.append(layer.weight.grad)
    assert not taken
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_the_gradient_of_the_output_is_what_hooks_have_made_of_it(taken):
    ours = WhitenedLinear(64, 300, dtype=torch.float64)
    x = torch.randn(2, 64, dtype=torch.float64)
    y = ours(x)
    y.register_hook(lambda gradient: 2 * gradient)
    y.grad_fn.register_prehook(lambda gradients: (gradients[0] + 1,))
    y.sum().backward()
    assert taken
    torch.testing.assert_close(ours.weight.grad, 3 * x.sum(0).expand(300, -1))


def operations(layer: nn.Module, x: torch.Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        layer(x).sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("block_size", [None, 16])
@pytest.mark.parametrize("outputs", [8, 64, 300])
@pytest.mark.parametrize("kind", ["linear", "conv", "strided", "grouped"])
def test_the_way_of_fewer_operations_is_taken(kind, outputs, block_size, bias, taken):
    """Within an eighth, since it is decided by the size of the output, and not by what padding adds to the input's."""
    transform = FeatureWhitening(block_size=block_size, statistics_interval=1000, update_interval=1000)
    make = {
        "linear": lambda: WhitenedLinear(64, outputs, bias, transform=transform),
        "conv": lambda: WhitenedConv2d(32, outputs, 3, padding=1, bias=bias, transform=transform),
        "strided": lambda: WhitenedConv2d(32, outputs, 3, stride=2, padding=1, bias=bias, transform=transform),
        "grouped": lambda: WhitenedConv2d(64, 4 * outputs, 3, groups=4, padding=1, bias=bias, transform=transform),
    }[kind]
    layer = make()
    x = torch.randn(1, 64) if kind == "linear" else torch.randn(1, 64 if kind == "grouped" else 32, 2, 2)
    chosen = set()
    for number in (1, 2, 4, 8, 16, 32, 64):
        batch = x.repeat(number, *[1] * (x.dim() - 1))
        taken.clear()
        counts = {}
        for way, limit in (("chosen", layer.transform.samples_up_to), ("samples", 10**9), ("gradient", 0)):
            other = copy.deepcopy(layer)
            other.transform.samples_up_to = limit
            counts[way] = operations(other, batch)
            if way == "chosen":
                chosen.add(bool(taken))
        assert counts["chosen"] <= 1.125 * min(counts.values())
    assert chosen == {True, False} or outputs < 300


def test_nothing_is_kept_longer_than_it_is_needed(monkeypatch):
    nodes = []
    keep = layers.keep_output_gradient

    def noted(output, input, weight):
        nodes.append(weight.grad_fn)
        keep(output, input, weight)

    monkeypatch.setattr(layers, "keep_output_gradient", noted)
    layer = WhitenedLinear(64, 300)
    x = torch.randn(2, 64, requires_grad=True)
    y = layer(x).square().sum()
    (node,) = nodes
    torch.autograd.grad(y, x, retain_graph=True)  # does not train the layer
    assert node.grad_output is None
    torch.autograd.grad(y, layer.weight, create_graph=True)  # of a graph it would be a part
    assert node.grad_output is None
    y.backward()
    assert node.grad_output is None
    with torch.no_grad():
        layer(x)
    layer.eval()(x)
    layer.train()(torch.randn(500, 64))  # too many samples
    assert nodes == [node]
    graph = weakref.ref(node)
    del node, y
    nodes.clear()
    gc.collect()
    assert graph() is None


@pytest.mark.parametrize("autocast", [True, False])
def test_a_narrower_type_takes_the_gradient(autocast, taken):
    """Its rounding would be that of the type, and not that of the sums' order."""
    transform = FeatureWhitening(update_interval=1)
    layer = WhitenedLinear(64, 300, dtype=torch.float32 if autocast else torch.bfloat16, transform=transform)
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            layer(torch.randn(2, 64, dtype=layer.weight.dtype)).square().mean().backward()
    assert not taken and layer.transform.inputs.num_refreshes == 3
    layer.float()(torch.randn(2, 64)).square().mean().backward()
    assert taken
