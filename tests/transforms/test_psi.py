"""PSIScaling: the function that is learned does not depend on the rows' scale."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.utils.checkpoint import checkpoint

from whiten_layers import Chain, FeatureWhitening, PSIScaling, WhitenedLinear, unwhiten, whiten

from ..cases import everywhere

EPS = 1e-100  # PyTorch takes no 0, and in float64 that is one
EVERY_BATCH = {"update_interval": 1, "statistics_interval": 1}
NETWORKS = {
    "linear": lambda: [
        *(nn.Linear(5, 6), nn.BatchNorm1d(6, eps=EPS), nn.Tanh()),
        *(nn.Linear(6, 4, bias=False), nn.BatchNorm1d(4, eps=EPS), nn.Tanh()),
        nn.Linear(4, 3),
    ],
    "convolution": lambda: [
        *(nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6, eps=EPS), nn.Tanh()),
        *(nn.Conv2d(6, 4, 2, bias=False), nn.InstanceNorm2d(4, eps=EPS), nn.Tanh()),
        *(nn.Flatten(), nn.Linear(36, 3)),
    ],
    "transposed": lambda: [
        *(nn.ConvTranspose1d(4, 6, 3, groups=2), nn.BatchNorm1d(6, eps=EPS), nn.Tanh()),
        *(nn.ConvTranspose1d(6, 4, 2, stride=2), nn.BatchNorm1d(4, eps=EPS), nn.Tanh()),
        *(nn.Flatten(), nn.Linear(64, 3)),
    ],
}
SHAPES = {"linear": (5,), "convolution": (4, 6, 6), "transposed": (4, 6)}
each_network = pytest.mark.parametrize("kind", NETWORKS)


def network(kind):
    torch.manual_seed(0)
    return nn.Sequential(*NETWORKS[kind]()).double()


def batch(kind, seed):
    x = torch.randn(8, *SHAPES[kind], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x + x.cumsum(1) + 0.3


def rows(layer, weight):
    """Views of what each output is computed with."""
    if not isinstance(layer, nn.modules.conv._ConvTransposeNd):
        return list(weight)
    return [row for group in weight.chunk(layer.groups) for row in group.unbind(1)]


@torch.no_grad()
def scaled(model):
    """The same function: every row in front of a norm times a factor of its own."""
    model = copy.deepcopy(model)
    for number in (0, 3):
        outputs = rows(model[number], model[number].weight)
        for row, exponent in zip(outputs, torch.linspace(-3, 3, len(outputs)), strict=True):
            row.mul_(10**exponent)
    return model


def function_after(model, kind, steps, **options):
    """Outputs on another batch, after so many steps of SGD."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1, **options)
    for seed in range(steps):
        optimizer.zero_grad()
        model(batch(kind, seed)).sin().mean().backward()
        optimizer.step()
    return model(batch(kind, 99)).detach()


@each_network
@pytest.mark.parametrize(
    "transform", [PSIScaling(), Chain(FeatureWhitening(power=0.0), PSIScaling())], ids=["alone", "in a chain"]
)
def test_a_step_does_not_depend_on_the_rows_scale(kind, transform):
    model = whiten(network(kind), transform, include=["0", "3"])
    torch.testing.assert_close(function_after(scaled(model), kind, 0), function_after(model, kind, 0))
    after = [function_after(net, kind, 1) for net in (scaled(model), model)]
    torch.testing.assert_close(*after, rtol=1e-9, atol=1e-9)
    assert (after[1] - network(kind)(batch(kind, 99))).abs().max() > 0.01  # it was a step


@each_network
def test_nor_do_steps_with_momentum_and_weight_decay(kind):
    model = whiten(network(kind), PSIScaling(), include=["0", "3"])
    options = {"momentum": 0.9, "weight_decay": 0.1, "nesterov": True}
    after = [function_after(net, kind, 4, **options) for net in (scaled(model), model)]
    torch.testing.assert_close(*after, rtol=1e-8, atol=1e-8)


@each_network
@pytest.mark.parametrize("options", [{"power": 1.0}, {"power": 0.5, "features": "patch"}], ids=str)
def test_nor_do_steps_on_whitened_inputs(kind, options):
    # With `rescale` the norm that is kept is the whole gradient's, in which rows weigh by their scale.
    whitening = FeatureWhitening(**options, **(EVERY_BATCH | {"rescale": False, "bound": None}))
    model = whiten(network(kind), Chain(whitening, PSIScaling()), include=["0", "3"])
    whiten(model, whitening)
    twin = scaled(model)
    after = [function_after(net, kind, 4) for net in (twin, model)]
    torch.testing.assert_close(*after, rtol=1e-8, atol=1e-8)
    for number in (0, 3):
        (whitens, _), (expected, _) = (net[number].transform.members() for net in (twin, model))
        moved = []
        for factor, other in zip(whitens.factors(), expected.factors(), strict=True):
            torch.testing.assert_close(factor.precision, other.precision, rtol=1e-8, atol=1e-8)
            moved.append((factor.precision - torch.eye(factor.precision.shape[-1])).abs().max())
        assert max(moved) > 0.1


@each_network
@pytest.mark.parametrize("transform", [None, FeatureWhitening(power=0.0), FeatureWhitening(**EVERY_BATCH)], ids=str)
def test_without_the_scaling_they_do(kind, transform):
    model = network(kind) if transform is None else whiten(network(kind), transform)
    after = [function_after(net, kind, 2) for net in (scaled(model), model)]
    assert (after[0] - after[1]).abs().max() > 0.01


@everywhere
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_gradient_is_the_plain_one_times_the_rows_squared_norm(case, dtype):
    plain, layer = case.make_pair(PSIScaling(), dtype)
    for module in (plain, layer):
        y = module(case.make_input(dtype=dtype))
        y.backward(torch.linspace(-1, 2, y.numel()).view(y.shape).to(dtype))
    for row, grad_row in zip(rows(plain, plain.weight.detach()), rows(plain, plain.weight.grad), strict=True):
        grad_row.copy_(grad_row.double() * row.double().square().sum())
    torch.testing.assert_close(layer.weight.grad, plain.weight.grad, rtol=torch.finfo(dtype).eps * 8, atol=1e-12)
    assert layer.weight.grad.dtype == dtype
    if plain.bias is not None:
        torch.testing.assert_close(layer.bias.grad, plain.bias.grad, rtol=0, atol=0)


def test_gradients_of_single_samples_under_checkpoints_and_autocast():
    layer = WhitenedLinear(4, 3, dtype=torch.float64, transform=PSIScaling())
    plain, x = unwhiten(copy.deepcopy(layer)), torch.randn(9, 4, dtype=torch.float64)
    squares = layer.weight.detach().square().sum(1, keepdim=True)
    parameters = {name: parameter.detach() for name, parameter in layer.named_parameters()}
    results = []
    for model in (layer, plain):
        of_sample = grad(lambda p, x, model=model: functional_call(model, p, (x[None],)).sin().sum())
        results.append(vmap(of_sample, in_dims=(None, 0))(parameters, x)["weight"])
    torch.testing.assert_close(results[0], squares * results[1], rtol=1e-12, atol=1e-12)
    for use_reentrant in (False, True):
        layer.zero_grad()
        checkpoint(layer, x.requires_grad_(), use_reentrant=use_reentrant).sin().sum().backward()
        torch.testing.assert_close(layer.weight.grad, squares * results[1].sum(0), rtol=1e-12, atol=1e-12)
    layer, plain, x = layer.float(), plain.float(), x.detach().float()
    for model in (layer, plain):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            model(x).sin().sum().backward()
    torch.testing.assert_close(layer.weight.grad, squares.float() * plain.weight.grad)


def test_second_derivatives_take_the_weight_in_the_map_for_a_constant():
    layer = WhitenedLinear(4, 3, dtype=torch.float64, transform=PSIScaling())
    plain = unwhiten(copy.deepcopy(layer))
    x, squares = torch.randn(9, 4, dtype=torch.float64), layer.weight.detach().square().sum(1, keepdim=True)

    def loss(parameters, model):
        return functional_call(model, parameters, (x,)).tanh().square().sum()

    parameters = {name: parameter.detach() for name, parameter in layer.named_parameters()}
    result = grad(lambda p: grad(loss)(p, layer)["weight"].sin().sum())(parameters)["weight"]
    (gradient,) = torch.autograd.grad(layer(x).tanh().square().sum(), layer.weight, create_graph=True)
    (second,) = torch.autograd.grad(gradient.sin().sum(), layer.weight)
    expected = grad(lambda p: (squares * grad(loss)(p, plain)["weight"]).sin().sum())(parameters)["weight"]
    torch.testing.assert_close(second, squares * expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(result, second, rtol=0, atol=0)


def test_only_a_transform_that_reads_the_weight_forbids_a_backward_pass_after_a_step():
    for transform in (FeatureWhitening(), PSIScaling()):
        layer = WhitenedLinear(4, 3, transform=transform)
        loss = layer(torch.randn(9, 4)).sum()
        loss.backward(retain_graph=True)
        torch.optim.SGD(layer.parameters(), 0.1).step()
        if transform.reads_weight:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()
        else:
            loss.backward()


def test_a_row_that_is_zero_stays_zero():
    layer = WhitenedLinear(4, 3, transform=PSIScaling())
    nn.init.zeros_(layer.weight)
    layer(torch.randn(9, 4)).sum().backward()
    assert not layer.weight.grad.any() and layer.bias.grad.all()
