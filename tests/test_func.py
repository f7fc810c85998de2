"""`torch.func` and whitened layers: the right gradient, or an error that says what to do."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacrev, jvp, stack_module_state, vmap

from whiten_layers import FeatureWhitening, unwhiten, whiten

from .helpers import buffers, each_transform

# PyTorch itself does that in forward mode.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")


def network(transform):
    """A trained network, whose map is not the identity."""
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 4, 3, stride=2), nn.Flatten(), nn.Linear(36, 5)
    model = whiten(nn.Sequential(*layers).double(), transform)
    for seed in range(3):
        loss(dict(model.named_parameters()), model, *batch(seed)).backward()
    model.zero_grad()
    return model


def batch(seed):
    return torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(seed)).double(), torch.arange(6) % 5


def loss(parameters, model, x, y):
    return F.cross_entropy(functional_call(model, parameters, (x,)), y)


def detached(model):
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@each_transform
def test_grad_is_backward_and_observes_as_it_does(transform):
    model = network(transform)
    twin, (x, y) = copy.deepcopy(model), batch(9)
    for _ in range(2):
        twin.zero_grad()
        F.cross_entropy(twin(x), y).backward()
        result = grad(loss)(detached(model), model, x, y)
        expected = {name: parameter.grad for name, parameter in twin.named_parameters()}
        torch.testing.assert_close(result, expected, rtol=0, atol=0)
        torch.testing.assert_close(buffers(model), buffers(twin), rtol=0, atol=0)


@each_transform
def test_gradients_of_single_samples(transform):
    """Each is the sample's plain gradient, mapped, without a bound; the samples are one batch of statistics."""
    model = network(transform)
    for module in model.modules():
        if isinstance(module, FeatureWhitening):
            module.bound = None
    twin, plain, (x, y) = copy.deepcopy(model), unwhiten(copy.deepcopy(model)), batch(9)

    def of_sample(model):
        def sample(parameters, x, y):
            return loss(parameters, model, x[None], y[None])

        return vmap(grad(sample), in_dims=(None, 0, 0))

    plains = of_sample(plain)(detached(model), x, y)
    expected = {}
    for i in (0, 2, 4):
        weight, bias = f"{i}.weight", f"{i}.bias"
        samples = zip(plains[weight], plains[bias], strict=True)
        pairs = [model[i].transform.transform(*pair, detached(model)[weight]) for pair in samples]
        expected[weight], expected[bias] = map(torch.stack, zip(*pairs, strict=True))
    result = of_sample(model)(detached(model), x, y)
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)
    F.cross_entropy(twin(x), y, reduction="sum").backward()
    torch.testing.assert_close(buffers(model), buffers(twin), rtol=1e-10, atol=1e-10)
    assert model[0].transform.num_batches_tracked == 4


@each_transform
def test_a_batch_that_vmap_maps_over_trains_as_a_whole_one(transform):
    model = network(transform)
    twin, (x, y) = copy.deepcopy(model), batch(9)
    F.cross_entropy(vmap(lambda x: model(x[None])[0])(x), y).backward()
    F.cross_entropy(twin(x), y).backward()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(buffers(model), buffers(twin), rtol=1e-10, atol=1e-10)


@each_transform
def test_a_jacobian_over_the_parameters_is_each_rows_gradient(transform):
    model = network(transform)
    twin, (x, _) = copy.deepcopy(model), batch(9)
    result = jacrev(lambda p: functional_call(model, p, (x,)).sum(0))(detached(model))
    for row in range(5):
        twin.load_state_dict(network(transform).state_dict())
        twin.zero_grad()
        twin(x).sum(0)[row].backward()
        for name, parameter in twin.named_parameters():
            torch.testing.assert_close(result[name][row], parameter.grad, rtol=1e-10, atol=1e-10)
    assert model[0].transform.num_batches_tracked == 4


@each_transform
def test_what_does_not_ask_for_the_weight_is_plain_and_leaves_no_trace(transform):
    model = network(transform)
    plain, (x, _) = unwhiten(copy.deepcopy(model)), batch(9)
    before = buffers(model)

    def results(model):
        with forward_ad.dual_level():
            dual = forward_ad.unpack_dual(model(forward_ad.make_dual(x, x.cos())))
        yield dual.tangent
        yield jacrev(model)(x[:2])
        yield jvp(model, (x,), (x.cos(),))[1]
        yield hessian(lambda x: model(x).sum())(x[:1])
        yield grad(lambda x: grad(lambda x: model(x).sum())(x).square().sum())(x)

    for ours, theirs in zip(results(model), results(plain), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(buffers(model), before, rtol=0, atol=0)


@each_transform
def test_a_gradient_penalty_is_the_one_of_autograd(transform):
    model = network(transform)
    twin, (x, _) = copy.deepcopy(model), batch(9)

    def penalty(parameters):
        return grad(lambda x: functional_call(model, parameters, (x,)).sum())(x).square().sum()

    result = grad(penalty)(detached(model))
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(twin(x).sum(), x, create_graph=True)
    gradient.square().sum().backward()
    # Where autograd has no gradient for a bias, `torch.func` has zeros.
    expected = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in twin.named_parameters()}
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


def ensemble(model, x):
    parameters, states = stack_module_state([copy.deepcopy(model), model])
    return vmap(lambda p, s: functional_call(model, (p, s), (x,)))(parameters, states)


@each_transform
@pytest.mark.parametrize("differentiated", [False, True])
def test_an_ensemble_can_evaluate_and_not_train(transform, differentiated):
    model = network(transform)
    x, y = batch(9)
    with pytest.raises(RuntimeError, match="vmap over the parameters of a whitened layer in training mode"):
        if differentiated:
            parameters, _ = stack_module_state([model, copy.deepcopy(model)])
            vmap(grad(loss), (0, None, None, None))(parameters, model, x, y)
        else:
            ensemble(model, x)
    torch.testing.assert_close(ensemble(model.eval(), x)[1], model(x))
    with torch.no_grad():
        torch.testing.assert_close(ensemble(model.train(), x)[1], model(x))


def test_what_the_map_has_no_rule_for_is_an_error():
    model = network(FeatureWhitening())
    parameters, (x, y) = detached(model), batch(9)
    with pytest.raises(NotImplementedError, match="jvp"):  # forward mode over the parameters' gradient
        jvp(lambda p: grad(loss)(p, model, x, y), (parameters,), (parameters,))
    # Forward mode over the parameters alone is the plain Jacobian: nothing is transformed where nothing goes backward.
    plain = unwhiten(copy.deepcopy(model))
    results = [jvp(lambda p, net=net: loss(p, net, x, y), (parameters,), (parameters,))[1] for net in (model, plain)]
    torch.testing.assert_close(*results)
    with pytest.raises(RuntimeError, match=r"through a whitened layer: use torch\.func"):
        each = torch.eye(5).double()[:, None].expand(5, 6, 5)
        torch.autograd.grad(model(x), model[0].weight, each, is_grads_batched=True)
