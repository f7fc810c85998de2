"""Advice: what it says of layers of every kind, and that it leaves no trace."""

import copy
import importlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from whiten_layers import FeatureWhitening, advise, whiten


def loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def batches(number=8, rows=64, scale=None):
    generator = torch.Generator().manual_seed(0)
    scale = torch.ones(12) if scale is None else scale
    for _ in range(number):
        yield torch.randn(rows, 12, generator=generator) * scale, torch.randint(3, (rows,), generator=generator)


SCALE = torch.logspace(0, 2, 12)


def network(width=12):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, width), nn.ReLU(), nn.Dropout(0.1), nn.BatchNorm1d(width), nn.Linear(width, 3))


def test_correlated_inputs_are_worth_it_and_white_ones_are_not():
    worth, not_worth = (advise(network(), batches(scale=scale), loss) for scale in (SCALE, None))
    assert worth.layers["0"].startswith("worth it: condition number ")
    assert not_worth.layers["0"].startswith("nearly white already") and not_worth.layers["0"].endswith(
        "nothing to gain"
    )
    assert worth.gain > not_worth.gain
    assert worth.bytes == worth.report.bytes > 0 and worth.step > 1
    lines = str(worth).splitlines()
    assert lines[0] == worth.verdict and len(lines) == 3 and lines[1].split()[0] == "0"


def test_too_few_rows_are_named():
    advice = advise(network(600), batches(2, rows=4), loss)
    assert "rows a batch for " in advice.layers["4"]


def test_a_layer_that_no_batch_reaches_is_named():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(12, 3), nn.Linear(50, 50)

        def forward(self, x):
            return self.used(x)

    advice = advise(Model(), batches(scale=SCALE), loss)
    assert advice.layers["unused"] == "no batch came to it: nothing is whitened"
    assert advice.gain < 0.25 and advice.verdict.startswith("Little to gain")


@pytest.mark.parametrize("is_whitened", [False, True])
def test_it_leaves_no_trace(is_whitened):
    model = whiten(network()) if is_whitened else network()
    loss(model, next(batches())).backward()
    before = copy.deepcopy(model.state_dict())
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    kinds = [type(module) for module in model.modules()]
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    given = batches(30)
    advise(model, given, loss, passes=5)
    torch.testing.assert_close(torch.rand(3), expected, rtol=0, atol=0)
    torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)
    torch.testing.assert_close([p.grad for p in model.parameters()], gradients, rtol=0, atol=0)
    assert [type(module) for module in model.modules()] == kinds
    assert len(list(given)) == 25  # no more were taken than asked for


def test_a_loaders_seed_leaves_no_trace():
    data = DataLoader(TensorDataset(torch.randn(96, 12), torch.randint(3, (96,))), 16, shuffle=True)
    model = network()
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    advise(model, data, loss)
    torch.testing.assert_close(torch.rand(3), expected, rtol=0, atol=0)


def test_batches_that_are_not_finite_are_named():
    advice = advise(network(), [(torch.full((8, 12), float("nan")), torch.zeros(8).long())] * 3, loss)
    assert set(advice.layers.values()) == {"its batches were constant, or held NaN or Inf: nothing is whitened"}


def test_scaling_at_steps_is_judged_by_steps():
    advice = advise(network(), batches(9, scale=SCALE), loss, "eigenbasis", interval=5)
    assert {row.refreshes for row in advice.report.rows} == {4}  # at steps 1, 2, 4 and one of five
    assert all(row.spectrum for row in advice.report.rows)


def test_options_and_selections_are_those_of_whiten():
    model = network()
    advice = advise(model, batches(scale=SCALE), loss, FeatureWhitening(power=1.0), skip=model[4])
    assert advice.layers.keys() == {"0"} and advice.report.left["4"] == "Linear, not asked for"
    advice = advise(model, batches(scale=SCALE), loss, power=1, include="4")
    assert advice.layers.keys() == {"4"}


@pytest.mark.parametrize(
    "gain, step, expected",
    [
        (
            0.2,
            1.0,
            "Little to gain: 20 % of the parameters that train have inputs worth whitening. A step takes about 1 times",
        ),
        (
            0.9,
            1.2,
            "Whiten it: 90 % of the parameters that train have inputs worth whitening. A step takes about 1.2 times",
        ),
        (0.9, 1.6, "Whiten it, if it saves 38 % of the steps: 90 % of the parameters that train"),
        (0.9, 4.0, "It pays in steps, hardly in seconds: 90 % of the parameters that train"),
    ],
)
def test_the_verdict_depends_on_gain_and_cost(gain, step, expected):
    verdict = importlib.import_module("whiten_layers.advise").verdict_of
    assert verdict(gain, step, 2**20).startswith(expected) and "1.0 MiB are kept" in verdict(gain, step, 2**20)


def test_bad_input_is_an_error_that_says_so():
    with pytest.raises(ValueError, match=r"batches='1 of them' is not possible: give at least 2"):
        advise(network(), batches(1), loss)
    with pytest.raises(ValueError, match=r"passes=1 is not possible: give an integer of at least 2"):
        advise(network(), batches(), loss, passes=1)
    with pytest.raises(ValueError, match="no batch came to a whitened layer: is the model in training mode"):
        advise(network().eval(), batches(), loss)
    mine = network()
    with pytest.raises(ValueError, match="and does loss call it"):
        advise(network(), batches(), lambda model, batch: loss(mine, batch))
    with pytest.raises(ValueError, match="this transform keeps no covariance"):
        advise(network(), batches(), loss, "optimal_gain")
    with pytest.raises(ValueError, match="no layer of the model can be whitened"):
        advise(nn.BatchNorm1d(12), batches(), lambda model, batch: model(batch[0]).square().mean())
    with pytest.raises(TypeError) as caught:
        advise(network(), batches(), F.cross_entropy)
    assert "loss was called with the model and a batch: give a function of a model" in caught.value.__notes__[0]
    with pytest.raises(TypeError, match="loss is of type list: give a function of a model and a batch"):
        advise(network(), loss, list(batches()))
    with pytest.raises(TypeError, match=r"loss returned \(64, 3\): give a function of a model and a batch"):
        advise(network(), batches(), lambda model, batch: model(batch[0]))
    with pytest.raises(TypeError, match="loss returned float"):
        advise(network(), batches(), lambda model, batch: loss(model, batch).item())
    with pytest.raises(TypeError, match="pwoer: there is no such option; did you mean 'power'"):
        advise(network(), batches(), loss, pwoer=1)
