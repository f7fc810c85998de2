"""A pass that computes gradients of the inputs alone does not train the layers: it neither counts nor is observed."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, jacrev, vmap
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

from whiten_layers import FeatureWhitening, GradientTransform, WhitenedLinear, whiten

from .helpers import buffers

INTERVALS = {"update_interval": 3, "statistics_interval": 2}  # so that a pass too many moves what is due
each_power = pytest.mark.parametrize("output_power", [0.0, 0.5])
pytestmark = pytest.mark.filterwarnings("ignore")  # the compilers of some versions warn of themselves


def eager(function):
    return function


def compiled(function):
    return torch.compile(function, backend="aot_eager", fullgraph=True)


each_call = pytest.mark.parametrize("call", [eager, compiled])


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


def linear(bias):
    return nn.Sequential(nn.Linear(6, 8, bias), nn.Tanh(), nn.Linear(8, 4, bias)), (6,)


def convolutional(bias):
    layers = nn.Conv2d(3, 4, 3, bias=bias), nn.Tanh(), nn.Conv2d(4, 4, 3, stride=2, bias=bias), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(16, 4, bias)), (3, 7, 7)


def whitened(output_power, make=linear, bias=True):
    torch.manual_seed(0)
    model, shape = make(bias)
    return whiten(model, FeatureWhitening(output_power=output_power, **INTERVALS)), shape


def draw(seed, shape):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(8, *shape, generator=generator), torch.arange(8) % 4


def loss_of(call, x, y):
    return F.cross_entropy(call(x), y)


def by_grad(call, x, y):
    x = x.detach().requires_grad_()
    return torch.autograd.grad(loss_of(call, x, y), x)[0]


def by_backward(call, x, y):
    x = x.detach().requires_grad_()
    loss_of(call, x, y).backward(inputs=[x])
    return x.grad


def by_grad_of_an_inner_tensor(call, x, y):
    x = 1 * x.detach().requires_grad_()
    return torch.autograd.grad(loss_of(call, x, y), x)[0]


def by_grad_with_a_graph(call, x, y):
    x = x.detach().requires_grad_()
    return torch.autograd.grad(loss_of(call, x, y), x, create_graph=True)[0].detach()


PROBES = [by_grad, by_backward, by_grad_of_an_inner_tensor, by_grad_with_a_graph]


def train(model, call, shape, probe=None, steps=0, when="after", iterations=8):
    """Train, with so many passes by the probe before or after each iteration, each far from the batch."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.05)
    for seed in range(iterations):
        x, y = draw(seed, shape)

        def attack(x=x, y=y):
            probed = x + 5
            for _ in range(steps if probe else 0):
                probed = probed + 0.1 * probe(call, probed, y).sign()

        if when == "before":
            attack()
        optimizer.zero_grad()
        loss_of(call, x, y).backward()
        optimizer.step()
        if when == "after":
            attack()


def state(model):
    """All that training leaves behind: parameters, statistics, and the schedule's numbers."""
    transforms = [module for module in model.modules() if isinstance(module, GradientTransform)]
    return {
        **{name: parameter.detach() for name, parameter in model.named_parameters()},
        **buffers(model),
        **{f"numbers of {i}": transform.get_extra_state() for i, transform in enumerate(transforms)},
    }


def assert_same(one, other):
    torch.testing.assert_close(state(one), state(other), rtol=0, atol=0)


def tracked(model):
    return [module.num_batches_tracked for module in model.modules() if isinstance(module, GradientTransform)]


@each_power
@pytest.mark.parametrize("make, bias", [(linear, True), (convolutional, False)])
@pytest.mark.parametrize("probe", PROBES)
@pytest.mark.parametrize("steps, when", [(1, "before"), (1, "after"), (9, "after"), (10, "before")])
def test_attacks_change_nothing(output_power, make, bias, probe, steps, when):
    model, shape = whitened(output_power, make, bias)
    attacked = copy.deepcopy(model)
    train(model, model, shape)
    train(attacked, attacked, shape, probe, steps, when)
    assert_same(attacked, model)
    assert set(tracked(attacked)) == {8}


@each_power
@pytest.mark.parametrize("make, bias", [(linear, False), (convolutional, True)])
def test_attacks_change_nothing_in_a_compiled_model(output_power, make, bias):
    plain, shape = whitened(output_power, make, bias)
    model = copy.deepcopy(plain)
    runs = [(copy.deepcopy(plain), probe) for probe in PROBES if probe is not by_grad_with_a_graph]  # PyTorch refuses
    train(plain, plain, shape)
    train(model, compiled(model), shape)
    torch.testing.assert_close(state(model), state(plain), rtol=1e-4, atol=1e-5)
    for (attacked, probe), steps, when in zip(runs, (1, 9, 10), ("before", "after", "before"), strict=True):
        train(attacked, compiled(attacked), shape, probe, steps, when)
        assert_same(attacked, model)


@each_power
@each_call
def test_a_probe_and_a_training_pass_through_one_graph(output_power, call):
    """The graph's nodes are the same ones in both passes; only the second is a batch."""
    model, shape = whitened(output_power)
    probed = copy.deepcopy(model)
    for one in (model, probed):
        for seed in range(5):
            x, y = draw(seed, shape)
            x.requires_grad_()
            loss = loss_of(call(one), x, y)
            if one is probed:
                torch.autograd.grad(loss, x, retain_graph=True)
            loss.backward(retain_graph=True)
            if one is probed:
                torch.autograd.grad(loss, x)
    assert_same(probed, model)
    assert tracked(probed) == [5, 5]


@each_power
@each_call
@pytest.mark.parametrize("frozen", [0, 2])
def test_a_layer_beside_a_frozen_one(output_power, call, frozen):
    model, shape = whitened(output_power)
    model[frozen].requires_grad_(False)
    attacked = copy.deepcopy(model)
    train(model, call(model), shape)
    train(attacked, call(attacked), shape, by_grad, 3)
    assert_same(attacked, model)
    assert tracked(attacked) == ([0, 8] if frozen == 0 else [8, 0])


@each_power
@each_call
@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize("with_input", [False, True])
def test_the_layer_whose_gradient_is_asked_for_is_trained_and_no_other(output_power, call, name, with_input):
    model, shape = whitened(output_power)
    expected = {0: 0, 2: 0}
    for number, index in enumerate((2, 0, 0, 2, 2, 0), 1):
        x, y = draw(number, shape)
        x.requires_grad_()
        loss, asked = loss_of(call(model), x, y), [getattr(model[index], name), *[x] * with_input]
        if number % 2:
            torch.autograd.grad(loss, asked)
        else:
            loss.backward(inputs=asked)
        if name == "weight" or output_power > 0:  # otherwise a bias's gradient is the plain one, whatever was observed
            expected[index] = number
        assert tracked(model) == list(expected.values())


@each_power
@each_call
def test_a_hidden_gradient_trains_the_layers_behind_it_alone(output_power, call):
    """As where tasks are weighed by the gradients of the last layers' parameters."""
    model, shape = whitened(output_power)
    first, last = call(model[0]), call(model[2])
    x, y = draw(0, shape)
    hidden = first(x).tanh()
    loss = loss_of(last, hidden, y)
    torch.autograd.grad(loss, hidden, retain_graph=True)
    assert tracked(model) == [0, 0]
    torch.autograd.grad(loss, [hidden, *model[2].parameters()], retain_graph=True)
    assert tracked(model) == [0, 1]
    loss.backward()
    assert tracked(model) == [2, 2]


@each_power
@pytest.mark.parametrize("form", ["autograd", "func"])
def test_a_gradient_penalty_counts_once(output_power, form):
    """In the pass that trains, not in the one that computes the gradient of the inputs."""
    model, shape = whitened(output_power)
    plain = copy.deepcopy(model)
    for seed in range(6):
        x, y = draw(seed, shape)
        for one in (model, plain):
            loss = loss_of(one, x, y)
            if one is model and form == "autograd":
                probe = (x + 5).requires_grad_()
                (gradient,) = torch.autograd.grad(one(probe).tanh().sum(), probe, create_graph=True)
                loss = loss + gradient.square().sum()
            elif one is model:
                gradient = grad(lambda x: model(x).tanh().sum())(x + 5)
                loss = loss + gradient.square().sum()
            loss.backward()
    assert tracked(model) == tracked(plain) == [6, 6]
    refreshes = [[one[i].transform.inputs.num_refreshes for i in (0, 2)] for one in (model, plain)]
    assert refreshes[0] == refreshes[1]


@each_power
@pytest.mark.parametrize("use", ["grad", "jacrev", "gradients of single samples", "vectorized jacobian"])
def test_function_transforms_over_the_inputs(output_power, use):
    model, shape = whitened(output_power)
    before = state(model)
    x, y = draw(0, shape)
    if use == "grad":
        grad(lambda x: loss_of(model, x, y))(x)
    elif use == "jacrev":
        jacrev(model)(x)
    elif use == "vectorized jacobian":
        torch.autograd.functional.jacobian(model, x, vectorize=True)
    else:
        vmap(grad(lambda x, y: loss_of(model, x[None], y[None])))(x, y)
    torch.testing.assert_close(state(model), before, rtol=0, atol=0)
    grad(lambda parameters: loss_of(lambda x: functional_call(model, parameters, x), x, y))(
        dict(model.named_parameters())
    )
    assert tracked(model) == [1, 1]


@each_power
@pytest.mark.parametrize("inside", [False, True], ids=["outside", "inside"])
@each_call
def test_checkpointed_blocks(output_power, call, inside):
    """Around the compiled call, or inside of it."""
    model, shape = whitened(output_power)
    attacked = copy.deepcopy(model)
    for one, probe in ((model, None), (attacked, by_grad)):
        whole = one if inside else call(one)

        def segment(x, whole=whole):
            return checkpoint(whole, x, use_reentrant=False)

        train(one, call(segment) if inside else segment, shape, probe, 2)
    assert_same(attacked, model)
    assert tracked(attacked) == [8, 8]


@each_power
@each_call
def test_reentrant_checkpoints_count_as_ever(output_power, call):
    """PyTorch refuses them gradients of the inputs alone."""
    model, shape = whitened(output_power)
    twin, block = copy.deepcopy(model), call(model)
    for seed in range(4):
        x, y = draw(seed, shape)
        x.requires_grad_()
        loss_of(lambda x: checkpoint(block, x, use_reentrant=True), x, y).backward()
        loss_of(twin, x, y).backward()
    assert tracked(model) == tracked(twin) == [4, 4]


def shallow(model):
    return copy.copy(model)


def pickled(model):
    return pickle.loads(pickle.dumps(model))


@each_power
@pytest.mark.parametrize("make", [copy.deepcopy, shallow, pickled])
def test_a_copy_of_a_layer_is_known_by_its_own_weight(output_power, make):
    model, shape = whitened(output_power)
    copied = make(model)
    call = compiled(copied)
    by_grad(call, *draw(0, shape))
    assert tracked(copied) == [0, 0]
    loss_of(call, *draw(0, shape)).backward()
    assert tracked(copied) == [1, 1]


@each_power
@each_call
@pytest.mark.parametrize("change", ["parameter", "assign", "double"])
def test_a_layer_with_another_weight(output_power, call, change):
    model, shape = whitened(output_power)
    by_grad(call(model), *draw(0, shape))
    if change == "parameter":
        model[0].weight = nn.Parameter(model[0].weight.detach().clone())
    elif change == "assign":
        model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    else:
        model.double()
    x, y = draw(0, shape)
    x = x.to(model[0].weight.dtype)
    by_grad(call(model), x, y)
    assert tracked(model) == [0, 0]
    loss_of(call(model), x, y).backward()
    assert tracked(model) == [1, 1]


@each_power
@each_call
def test_two_layers_with_one_weight(output_power, call):
    torch.manual_seed(0)
    model = whiten(
        nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)), FeatureWhitening(output_power=output_power)
    )
    model[2].weight = model[0].weight
    by_grad(call(model), *draw(0, (6,)))
    assert tracked(model) == [0, 0]
    torch.autograd.grad(loss_of(call(model), *draw(0, (6,))), model[0].weight)
    assert tracked(model) == [1, 1]


@each_power
@each_call
def test_a_parametrized_weight(output_power, call):
    model, shape = whitened(output_power)
    parametrizations.spectral_norm(model[0])
    by_grad(call(model), *draw(0, shape))
    assert tracked(model) == [0, 0]
    original = model[0].parametrizations.weight.original
    torch.autograd.grad(loss_of(call(model), *draw(0, shape)), original)
    assert parametrize.is_parametrized(model[0]) and tracked(model) == [1, 0]


@each_power
@each_call
def test_weights_from_elsewhere_count(output_power, call):
    """Behind a compiled graph it cannot be said whose they are. Eager asks the graph itself."""
    model, shape = whitened(output_power)
    others = {name: (2 * parameter.detach()).requires_grad_() for name, parameter in model.named_parameters()}
    run = call(lambda parameters, x: functional_call(model, parameters, x))
    x, y = draw(0, shape)
    torch.autograd.grad(loss_of(lambda x: run(others, x), x, y), list(others.values()))
    assert tracked(model) == [1, 1]
    by_grad(lambda x: run(others, x), x, y)
    assert tracked(model) == ([2, 2] if call is compiled else [1, 1])


@each_power
def test_a_transform_that_has_gone_to_another_layer_counts_there(output_power):
    options = FeatureWhitening(output_power=output_power, **INTERVALS)
    old, new = WhitenedLinear(6, 4, transform=options), WhitenedLinear(6, 4, transform=options)
    new.transform, old.transform = old.transform, new.transform
    loss_of(compiled(new), *draw(0, (6,))).backward()
    assert new.transform.num_batches_tracked == 1


@each_power
def test_no_graph_is_kept_alive(output_power):
    model, shape = whitened(output_power)
    x, y = draw(0, shape)
    gc.collect()
    gc.disable()
    try:
        for probe in (False, True):
            leaf = x.clone().requires_grad_()
            loss = loss_of(model, leaf, y)
            seen, nodes = [], [loss.grad_fn]
            while nodes:
                node = nodes.pop()
                nodes += [next for next, _ in node.next_functions if next is not None]
                if isinstance(node, torch.autograd.function.BackwardCFunction):
                    seen.append(weakref.ref(node))
            del node
            if probe:
                torch.autograd.grad(loss, leaf)
            del loss
            assert len(seen) >= 2 and not any(ref() for ref in seen)
    finally:
        gc.enable()
