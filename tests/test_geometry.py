"""A layer that a script changes after it was whitened: another weight, another stride. It goes on as one made so."""

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from whiten_layers import Chain, FeatureWhitening, OptimalInputGain, plain_state_dict, unwhiten, whiten

from .helpers import compilers_may_warn

TRANSFORMS = {
    "default": FeatureWhitening(),
    "both sides, patches": FeatureWhitening(output_power=0.5, features="patch"),
    "chain": Chain(FeatureWhitening(update_interval=3), OptimalInputGain(update_interval=3)),
}


def give(layer, **values):
    for name, value in values.items():
        setattr(layer, name, value)


def new_weight(layer, *shape):
    return nn.Parameter(torch.randn(*shape, generator=torch.Generator().manual_seed(1)) / 4)


CHANGES = {
    "more outputs": (nn.Linear(6, 4), (9, 6), lambda one: give(one, weight=new_weight(one, 7, 6), bias=None)),
    "fewer inputs": (nn.Linear(6, 4), (9, 3), lambda one: give(one, weight=new_weight(one, 4, 3), in_features=3)),
    "grey images": (nn.Conv2d(3, 4, 3), (9, 1, 7, 7), lambda one: give(one, weight=new_weight(one, 4, 1, 3, 3))),
    "a larger kernel": (nn.Conv1d(3, 4, 3), (9, 3, 12), lambda one: give(one, weight=new_weight(one, 4, 3, 5))),
    "groups": (nn.Conv2d(4, 4, 3), (9, 4, 8, 8), lambda one: give(one, weight=new_weight(one, 4, 2, 3, 3), groups=2)),
    "no bias": (nn.Conv2d(3, 4, 3), (9, 3, 8, 8), lambda one: give(one, bias=None)),
    "a transposed convolution's stride": (
        nn.ConvTranspose2d(3, 4, 3),
        (9, 3, 5, 5),
        lambda one: give(one, stride=(2, 2)),
    ),
}

# Other ways to read the same channels with the same taps
READINGS = {
    "a stride that becomes a dilation": (
        nn.Conv2d(3, 4, 3, stride=2, padding=1),
        (9, 3, 8, 8),
        lambda one: give(one, stride=(1, 1), dilation=(2, 2), padding=(2, 2)),
    ),
    "padding": (nn.Conv2d(3, 4, 3, bias=False), (9, 3, 8, 8), lambda one: give(one, padding="same")),
    "padding by another mode": (
        nn.Conv2d(3, 4, 3, padding=1),
        (9, 3, 8, 8),
        lambda one: give(one, padding_mode="circular"),
    ),
    "a single number": (nn.Conv2d(3, 4, 3), (9, 3, 8, 8), lambda one: give(one, stride=2, padding=1, dilation=1)),
}


def train(layer, shape, seeds):
    optimizer = torch.optim.SGD(layer.parameters(), 0.05)
    for seed in seeds:
        x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) + 1
        optimizer.zero_grad()
        layer(x).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize(("plain", "shape", "change"), CHANGES.values(), ids=CHANGES)
def test_it_is_the_layer_that_was_changed_before_it_was_whitened(plain, shape, change, transform, caplog):
    whole = (9, *plain.weight.shape[1:2], *shape[2:])
    if isinstance(plain, nn.ConvTranspose2d):
        whole = (9, plain.weight.shape[0], *shape[2:])
    early = whiten(copy.deepcopy(plain), transform)
    train(early, whole, range(5))
    late = copy.deepcopy(plain)
    late.load_state_dict(plain_state_dict(early))
    change(early)
    change(late)
    whiten(late, transform)
    late.transform.set_extra_state(torch.tensor([5, 0, 0]))  # the model goes on counting
    with caplog.at_level(logging.INFO, "whiten_layers"):
        train(early, shape, range(5, 17))
    assert "starts afresh" in caplog.text and "became" in caplog.text
    train(late, shape, range(5, 17))
    torch.testing.assert_close(dict(early.state_dict()), dict(late.state_dict()), rtol=0, atol=0)
    assert early.transform.num_batches_tracked == 17


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize(("plain", "shape", "change"), READINGS.values(), ids=READINGS)
def test_another_way_to_read_the_same_channels_keeps_the_statistics(plain, shape, change, transform):
    """And patches are from then on those of a layer that was made so."""
    layer = whiten(copy.deepcopy(plain), transform)
    train(layer, shape, range(5))
    before = [(factor, factor.running_count.clone()) for part in layer.transform.parts() for factor in part.factors()]
    change(layer)
    train(layer, shape, range(5, 17))
    late = copy.deepcopy(plain)
    change(late)
    whiten(late, transform)
    geometries = [
        [part.geometry for part in one.transform.parts() if not isinstance(part, Chain)] for one in (layer, late)
    ]
    assert geometries[0] == geometries[1] and all(factor.running_count > count for factor, count in before)
    assert layer.transform.num_batches_tracked == 17
    x = torch.randn(*shape)
    late.load_state_dict(layer.state_dict(), strict=True)
    for one in (layer, late):
        one.zero_grad()
        one(x).square().mean().backward()
    torch.testing.assert_close(layer.weight.grad, late.weight.grad, rtol=0, atol=0)


def test_taking_turns_between_two_ways_to_read_refreshes_as_often_as_one():
    counts = []
    for strides in ((1, 1), (1, 2)):
        torch.manual_seed(0)
        model = whiten(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1)))
        for step in range(40):
            model[0].stride = strides[step % 2]
            train(model, (4, 3, 9, 9), [step])
        assert model[0].transform.num_batches_tracked == 40
        counts.append([[int(factor.num_refreshes) for factor in model[place].transform.factors()] for place in (0, 2)])
    assert counts[0] == counts[1]


def test_a_layer_that_was_changed_before_a_load_takes_the_state():
    def made():
        # No window is open between refreshes, which a state dict would not have
        model = whiten(nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.Conv2d(4, 4, 1)), statistics_interval=10)
        model[0].stride = (1, 1)
        model[1].weight, model[1].bias = nn.Parameter(torch.randn(5, 4, 1, 1)), nn.Parameter(torch.zeros(5))
        return model

    model, other = made(), made()
    train(model, (9, 3, 8, 8), range(6))
    other.load_state_dict(model.state_dict(), strict=True)
    for one in (model, other):
        train(one, (9, 3, 8, 8), range(6, 12))
    torch.testing.assert_close(dict(other.state_dict()), dict(model.state_dict()), rtol=0, atol=0)
    assert other[0].transform.num_batches_tracked == 12


def test_a_layer_that_an_earlier_version_pickled_trains_and_is_unwhitened():
    layer = whiten(nn.Linear(6, 4))
    state = {key: value for key, value in layer.__getstate__().items() if key != "bound_to"}
    old = type(layer).__new__(type(layer))
    old.__setstate__(state)
    train(old, (9, 6), range(3))
    assert type(unwhiten(old)) is nn.Linear


def test_evaluation_and_frozen_weights_change_nothing():
    layer = whiten(nn.Linear(6, 4))
    train(layer, (9, 6), range(3))
    before = {key: value.clone() for key, value in layer.transform.state_dict().items()}
    layer.weight = nn.Parameter(torch.zeros(4, 3), requires_grad=False)
    layer(torch.randn(9, 3)).sum().backward()
    layer.eval()(torch.randn(9, 3))
    torch.testing.assert_close(dict(layer.transform.state_dict()), before, rtol=0, atol=0)


def test_other_layers_go_on_counting():
    model = whiten(nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2)))
    train(model, (9, 6), range(20))
    rows = model[0].transform.inputs.running_count.clone()
    model[2].weight, model[2].bias = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.zeros(3))
    train(model, (9, 6), range(20, 50))
    assert model[0].transform.inputs.running_count > rows
    assert model[2].transform.num_batches_tracked == model[0].transform.num_batches_tracked == 50
    assert model[2].transform.inputs.running_count > 100


@compilers_may_warn
def test_a_compiled_layer_says_what_to_do():
    layer = whiten(nn.Linear(6, 4))
    layer.weight = nn.Parameter(torch.randn(4, 3))
    # The compiler of torch 2.6 hides the message of an error.
    message = r"\(4, 6\) became \(4, 3\)\): run one training pass that is not compiled"
    message = "Observed exception" if torch.__version__ < "2.7" else message
    with pytest.raises(Exception, match=message):
        torch.compile(layer, backend="eager", fullgraph=True)(torch.randn(9, 3))
    layer(torch.randn(9, 3)).sum().backward()
    torch.compile(layer, backend="eager", fullgraph=True)(torch.randn(9, 3)).sum().backward()


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize("kind", ["to_sparse", "to_sparse_csr"])
@pytest.mark.parametrize("output_power", [0.0, 0.5])
def test_a_sparse_input_of_a_linear_layer_is_as_a_dense_one(kind, output_power):
    torch.manual_seed(0)
    dense = whiten(nn.Linear(6, 4), FeatureWhitening(output_power=output_power))
    sparse = copy.deepcopy(dense)
    for seed in range(6):
        x = torch.randn(9, 6, generator=torch.Generator().manual_seed(seed)).relu()
        for layer, rows in ((dense, x), (sparse, getattr(x, kind)())):
            layer.zero_grad()
            F.cross_entropy(layer(rows), torch.arange(9) % 4).backward()
        torch.testing.assert_close(sparse.weight.grad, dense.weight.grad)
    torch.testing.assert_close(dict(sparse.state_dict()), dict(dense.state_dict()))
