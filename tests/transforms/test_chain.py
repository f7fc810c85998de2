"""Chain: its members in order, each as it would be alone, in step with all others."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.utils import counters

from whiten_layers import (
    Chain,
    EigenbasisScaling,
    FeatureWhitening,
    GradientTransform,
    PSIScaling,
    WhitenedLinear,
    report,
    unwhiten,
    whiten,
)

from ..helpers import compilers_may_warn

EVERY_BATCH = {"update_interval": 1, "statistics_interval": 1}
BOTH_SIDES = FeatureWhitening(features="kronecker", output_power=0.5, update_interval=3, statistics_interval=2)


def plain():
    torch.manual_seed(0)
    head = nn.Flatten(), nn.Linear(4 * 16, 5)
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), *head).double()


def network(transform=None):
    return whiten(plain(), Chain(BOTH_SIDES, PSIScaling()) if transform is None else transform)


def train(model, steps, call=None):
    optimizer = torch.optim.SGD(model.parameters(), 0.02)
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(6, 3, 8, 8, generator=generator, dtype=torch.float64)
        optimizer.zero_grad()
        F.cross_entropy((call or model)(x), torch.arange(6) % 5).backward()
        optimizer.step()
    return model


def assert_equal(one, other):
    torch.testing.assert_close(one.state_dict(), other.state_dict(), rtol=0, atol=0)


class Recorded(GradientTransform):
    """Adds a number to its name's list, and halves the gradient."""

    def __init__(self, calls, reads=False):
        super().__init__()
        self.calls, self.reads = calls, reads

    def __deepcopy__(self, memo):
        return Recorded(self.calls, self.reads)

    @property
    def reads_weight(self):
        return self.reads

    def bind(self, geometry, *, device, dtype):
        self.bind_counters(device)
        return self

    def transform(self, grad_weight, grad_bias, weight):
        self.calls.append(("transform", grad_weight.clone(), weight))
        return grad_weight / 2, grad_bias

    def observe(self, input, grad_weight):
        self.schedule.begin_batch(self)
        self.calls.append(("observe", grad_weight.clone(), input))

    def reset_state(self):
        self.reset_counters()


def test_in_order_each_with_the_plain_gradient_to_observe_and_the_weight_if_it_reads_it():
    calls = []
    layer = WhitenedLinear(4, 3, transform=Chain(Recorded(calls), Recorded(calls, reads=True)))
    plain = unwhiten(copy.deepcopy(layer))
    x = torch.randn(9, 4)
    for module in (layer, plain):
        module(x).square().sum().backward()
    gradient = plain.weight.grad
    assert [name for name, *_ in calls] == ["transform", "transform", "observe", "observe"]
    expected = [gradient, gradient / 2, gradient, gradient]
    torch.testing.assert_close([seen for _, seen, _ in calls], expected, rtol=0, atol=0)
    assert calls[0][2] is None and torch.equal(calls[1][2], layer.weight)
    torch.testing.assert_close(layer.weight.grad, gradient / 4, rtol=0, atol=0)


@pytest.mark.parametrize("transform", [FeatureWhitening(**EVERY_BATCH), BOTH_SIDES], ids=["input", "both"])
def test_a_chain_of_one_is_that_one(transform):
    alone, chain = train(network(transform), range(30)), train(network(Chain(transform)), range(30))
    assert_equal(unwhiten(copy.deepcopy(chain)), unwhiten(copy.deepcopy(alone)))
    state = {name.replace("transform.0.", "transform."): value for name, value in chain[0].state_dict().items()}
    torch.testing.assert_close({name: state[name] for name in alone[0].state_dict()}, alone[0].state_dict())


def test_chains_of_chains():
    chains = Chain(PSIScaling(), BOTH_SIDES), Chain(Chain(PSIScaling()), Chain(Chain(BOTH_SIDES)))
    flat, nested = (train(network(chain), range(12)) for chain in chains)
    assert flat[0].transform.observes_output and nested[0].transform.observes_output
    assert {part.num_batches_tracked for part in nested[0].transform.parts()} == {12}
    assert_equal(unwhiten(flat), unwhiten(nested))
    assert flat[0].weight.isfinite().all()


def test_copies_pickles_and_checkpoints_go_on_bit_for_bit():
    model = train(network(), range(7))
    loaded = network()
    loaded.load_state_dict(model.state_dict(), strict=True)
    others = [loaded, copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    state = copy.deepcopy(model.state_dict())
    for other in others:
        train(other, range(7, 14))
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    train(model, range(7, 14))
    for other in others:
        assert_equal(other, model)
        parts = [part for layer in (other[0], other[5]) for part in layer.transform.parts()]
        assert len({part.schedule for part in parts}) == 1 and parts[0].schedule is not model[0].transform.schedule
    assert {"transform.0.channels.precision", "transform.0.outputs.mean", "transform.1._extra_state"} <= set(
        model[0].state_dict()
    )


def test_plain_checkpoints_load_and_the_plain_model_comes_back():
    model, before = train(network(), range(3)), plain()
    state = copy.deepcopy(model[0].transform.state_dict())
    model.load_state_dict(before.state_dict(), strict=True)
    torch.testing.assert_close(model[0].transform.state_dict(), state)
    assert_equal(unwhiten(model), before)


def test_meta_devices_and_resets():
    with torch.device("meta"):
        model = whiten(plain(), Chain(BOTH_SIDES, PSIScaling()))
    model.to_empty(device="cpu")
    fresh = network()
    torch.testing.assert_close(model[0].transform.state_dict(), fresh[0].transform.state_dict())
    model.load_state_dict(plain().state_dict())
    assert_equal(train(model, range(5)), train(network(), range(5)))
    for layer in (model[0], model[5]):
        layer.transform.reset_state()
        layer.load_state_dict(unwhiten(copy.deepcopy(fresh))[0 if layer is model[0] else 5].state_dict())
    torch.testing.assert_close(model[0].state_dict(), fresh[0].state_dict())


def test_all_parts_keep_step_with_the_model_and_have_the_layers_name():
    model = whiten(plain(), FeatureWhitening(), skip="0")
    whiten(model, Chain(FeatureWhitening(), PSIScaling()))
    parts = [*model[0].transform.parts(), *model[5].transform.parts()]
    assert [part.name for part in parts] == ["0", "0", "0", "5"]
    assert len({part.schedule for part in parts}) == 1
    train(model, range(3))
    model[5](torch.randn(2, 64).double()).sum().backward()  # a pass that does not reach the chain
    assert [part.num_batches_tracked for part in parts] == [3, 3, 3, 4]
    train(model, range(1))
    assert {part.num_batches_tracked for part in parts} == {5}


def test_a_layer_made_by_hand_counts_once():
    layer = WhitenedLinear(4, 3, transform=Chain(FeatureWhitening(**EVERY_BATCH, output_power=0.5), PSIScaling()))
    for _ in range(3):
        layer(torch.randn(9, 4)).sum().backward()
    assert {part.num_batches_tracked for part in layer.transform.parts()} == {3}
    assert next(layer.transform.members()).inputs.num_refreshes == 3


def test_the_report_has_a_row_for_each_factor_under_the_layers_name():
    model = train(network(), range(3))
    rows = [(row.layer, row.factor, row.batches) for row in report(model).rows]
    assert rows == [
        (layer, factor, 3)
        for layer, factors in [("0", ("channels", "taps", "outputs")), ("5", ("inputs", "outputs"))]
        for factor in factors
    ]
    assert report(model).left == {} and report(model[5]).rows[0].layer == "the model"


@compilers_may_warn
def test_compiled_is_eager_in_one_graph():
    torch._dynamo.reset()
    counters.clear()
    eager, compiled = network(), network()
    train(eager, range(6))
    train(compiled, range(6), torch.compile(compiled, backend="aot_eager", fullgraph=True))
    torch.testing.assert_close(compiled.state_dict(), eager.state_dict(), rtol=1e-10, atol=1e-12)
    assert not counters["graph_break"] and counters["stats"]["unique_graphs"] == 1


def test_what_is_no_chain():
    with pytest.raises(ValueError, match=r"transforms=\(\) is not possible: give at least one GradientTransform"):
        Chain()
    with pytest.raises(TypeError, match=r"transforms\[1\]='recursive' is not possible: give a GradientTransform"):
        Chain(FeatureWhitening(), "recursive")


def test_it_has_copies_of_its_own():
    given = PSIScaling()
    chain = Chain(given, given)
    first, second = chain.members()
    assert len({id(one) for one in (given, first, second)}) == 3


def test_a_chain_is_plain_while_no_member_watches():
    transform = Chain(EigenbasisScaling(interval=4), EigenbasisScaling(interval=4))
    layer = WhitenedLinear(3, 2, transform=transform)
    for watching in ([True, True], [False, True], [False, False]):
        for member, one in zip(layer.transform.members(), watching, strict=True):
            member.is_watching = one
        assert layer.transform.is_watching is any(watching)
        names = type(layer(torch.randn(4, 3)).grad_fn).__name__
        assert (names == "AddmmBackward0") is not any(watching)
