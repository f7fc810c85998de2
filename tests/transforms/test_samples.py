"""Of a small batch FeatureWhitening whitens the samples, and not the weight's gradient: the same map for less."""

import copy
import gc
import itertools
import weakref

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from whiten_layers import Chain, FeatureWhitening, PSIScaling, WhitenedConv2d, WhitenedLinear, layers

from ..cases import everywhere
from ..helpers import mostly_slow

TRANSFORMS = {
    "defaults": FeatureWhitening(update_interval=1),
    "kronecker": FeatureWhitening(update_interval=1, features="kronecker"),
    "one power, blocks": FeatureWhitening(update_interval=1, features="kronecker", power=1.0, block_size=2),
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
    has_samples = not (case.name.startswith("transposed") or about_the_mean)
    assert (ours.transform.samples_up_to > 0) <= has_samples
    can = has_samples and case.make_input().dim() == ours.weight.dim()  # otherwise the output may be a view
    for layer, limit in ((ours, 10**9 if has_samples else 0), (theirs, 0)):
        layer.transform.samples_up_to = limit
    inputs = [case.make_input(seed) for seed in range(3)]
    results = gradients(ours, inputs)
    assert len(taken) == (3 if can else 0)
    torch.testing.assert_close(results, gradients(theirs, inputs), rtol=1e-9, atol=1e-10)
    assert len(taken) == (3 if can else 0)


def pair(**options) -> tuple[WhitenedLinear, WhitenedLinear]:
    """Two equal layers that have seen some batches; the second takes the gradient of the weight."""
    torch.manual_seed(0)
    transform = FeatureWhitening(update_interval=1, bound=None)  # a bound would hide what is wrong
    ours = WhitenedLinear(64, 300, dtype=torch.float64, transform=transform, **options)
    for _ in range(3):
        ours(torch.randn(2, 64, dtype=torch.float64)).square().sum().backward()
    ours.zero_grad()
    ours.transform.update_interval = 10**6
    theirs = copy.deepcopy(ours)
    theirs.transform.samples_up_to = 0
    return ours, theirs


def penalty(layer, x):
    loss = layer(x).tanh().sum()
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    (loss + gradient.square().sum()).backward()


def changed_before(layer, x):
    """The gradient of the output has hooks on its way."""
    y = layer(x)
    y.register_hook(lambda gradient: 2 * gradient)
    y.grad_fn.register_prehook(lambda gradients: (gradients[0] + 1,))
    y.square().sum().backward()


def changed_behind(layer, x):
    y = layer(x)
    y.grad_fn.register_hook(lambda made, _: tuple(None if one is None else 2 * one for one in made))
    y.square().sum().backward()


def changed_in_place(layer, x):
    def double(made, _):
        for gradient in made:
            if gradient is not None:
                gradient.mul_(2)

    y = layer(x)
    y.grad_fn.register_hook(double)
    y.square().sum().backward()


def legacy_module_hook(layer, x):
    handle = layer.register_backward_hook(lambda module, made, _: tuple(None if g is None else 2 * g for g in made))
    layer(x).square().sum().backward()
    handle.remove()


def used_before_it_is_changed(layer, x):
    y = layer(x.unsqueeze(1))  # a view of the product's result
    skipped, activated = y + 1, y.relu_()
    (skipped.square() + 5 * activated).sum().backward()


def in_place(layer, x):
    torch.nn.functional.relu(layer(x), inplace=True).square().sum().backward()


def after_an_error(layer, x):
    y = layer(x)

    def fail(gradient):
        raise ValueError

    handle = x.register_hook(fail)
    with pytest.raises(ValueError):
        y.square().sum().backward(retain_graph=True)
    handle.remove()
    (gradient,) = torch.autograd.grad(y.sum(), layer.weight, create_graph=True)
    layer.weight.grad = gradient.detach()


def inside_another_pass(layer, x):
    y = layer(x)

    def differentiate(gradient):
        handle.remove()
        with torch.enable_grad():
            (one,) = torch.autograd.grad(y.sum(), layer.weight, create_graph=True)
        layer.weight.grad = one.detach()

    handle = x.register_hook(differentiate)
    y.square().sum().backward(retain_graph=True)


def twice(layer, x):
    y = layer(x).square().sum()
    y.backward(retain_graph=True)
    y.backward()


def shared(layer, x):
    (layer(x).square().sum() + layer(2 * x).tanh().sum()).backward()


def sparse(layer, x):
    torch.gather(layer(x), 1, torch.tensor([[1, 2], [3, 3]]), sparse_grad=True).sum().backward()


WAYS = [penalty, changed_behind, changed_in_place, legacy_module_hook, used_before_it_is_changed, inside_another_pass]
WAYS += [changed_before, in_place, after_an_error, twice, shared, sparse]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.filterwarnings("ignore:Using a non-full backward hook")
def test_however_a_layer_is_used_both_ways_give_one_gradient(way, taken):
    """What reaches the layer's weight is not always what the operation makes of the gradient of its output."""
    results = []
    for layer in pair(bias=way is not sparse):
        taken.clear()
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(2, 64, generator=generator, dtype=torch.float64).requires_grad_()
        way(layer, x)
        results.append((layer.weight.grad, x.grad))
        if layer.transform.samples_up_to:
            assert bool(taken) == (way in (changed_before, in_place, twice, shared))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-12)


def operations(layer: nn.Module, x: torch.Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        layer(x).sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    "block_size, bias", mostly_slow(itertools.product([None, 16], [True, False]), [(None, True), (16, False)])
)
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
    for number in (1, 16, 64, 512):
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
    assert node.kept == (None, [])
    torch.autograd.grad(y, layer.weight, create_graph=True)  # of a graph it would be a part
    assert node.kept == (None, [])
    y.backward()
    assert node.kept == (None, [])
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
