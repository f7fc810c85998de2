"""sole_consumers: which modules alone take a layer's output, in models of every form, none of which it changes."""

import copy

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from whiten_layers import WhitenedConv2d, models, whiten
from whiten_layers.conversion.tracing import sole_consumers
from whiten_layers.layers import PLAIN, TWINS

LAYERS = (*TWINS, *PLAIN)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


def pairs(model):
    return sole_consumers(model, LAYERS, NORMS)


class Net(nn.Module):
    """Three layers and three norms for a forward pass to use in its way."""

    def __init__(self, forward):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))
        self.norm, self.other, self.third = (nn.BatchNorm1d(4) for _ in range(3))
        self.call = forward

    def forward(self, x):
        return self.call(self, x)


FORWARDS = {
    "one follows": (lambda m, x: m.norm(m.a(x)), {"a": "norm"}),
    "by keyword": (lambda m, x: m.norm(input=m.a(input=x)), {"a": "norm"}),
    "one after another": (lambda m, x: m.other(m.b(m.norm(m.a(x)))), {"a": "norm", "b": "other"}),
    "something between": (lambda m, x: m.norm(m.a(x).relu()), {}),
    "in place between": (lambda m, x: m.norm(F.relu(m.a(x), inplace=True)), {}),
    "a second user": (lambda m, x: (y := m.a(x), m.norm(y) + y)[1], {}),
    "also returned": (lambda m, x: (y := m.a(x), (m.norm(y), y))[1], {}),
    "two followers": (lambda m, x: (y := m.a(x), m.norm(y) + m.other(y))[1], {}),
    "its size is read": (lambda m, x: (y := m.a(x), m.norm(y) * y.shape[0])[1], {}),
    "a layer twice": (lambda m, x: m.norm(m.a(x)) + m.other(m.a(x + 1)), {}),
    "a layer twice, one for nothing": (lambda m, x: (m.a(x), m.norm(m.a(x)))[1], {}),
    "a norm twice": (lambda m, x: m.norm(m.a(x)) + m.norm(m.b(x)), {}),
    "the other way round": (lambda m, x: m.a(m.norm(x)), {}),
    "a weight as a function": (lambda m, x: F.linear(m.norm(m.a(x)), m.a.weight), {}),
    "another's weight as a function": (lambda m, x: F.linear(m.norm(m.a(x)), m.b.weight), {"a": "norm"}),
    "a layer that is not called": (lambda m, x: m.norm(F.linear(x, m.a.weight)), {}),
}


@pytest.mark.parametrize("forward, expected", FORWARDS.values(), ids=FORWARDS.keys())
@pytest.mark.parametrize("whitened", [False, True])
def test_what_follows(forward, expected, whitened):
    model = Net(forward)
    assert pairs(whiten(model) if whitened else model) == expected


def test_sequences_are_looked_into_and_a_single_layer_is_followed_by_nothing():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)))
    assert pairs(model) == {"0": "1", "2.0": "2.1"}
    for layer in (nn.Linear(3, 3), whiten(nn.Linear(3, 3)), nn.BatchNorm1d(3)):
        assert pairs(layer) == {}


def test_shared_modules_and_parameters():
    layer, norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
    model = nn.Sequential(layer, norm)
    model.again = layer  # which the sequence calls too
    assert pairs(model) == {}
    block = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    assert pairs(nn.Sequential(block, nn.ReLU(), block)) == {}
    tied = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    tied[4].weight = tied[0].weight
    assert pairs(tied) == {"2": "3"}

    class Alias(Net):
        def __init__(self):
            super().__init__(lambda m, x: m.norm(m.alias(x)))
            self.alias = self.a

    assert pairs(Alias()) == {"a": "norm"}  # two names, one call


def test_a_layer_within_a_module_of_torch_is_called_with_it():
    class Tied(Net):
        def __init__(self):
            super().__init__(lambda m, x: m.encoder(m.norm(m.a(x))))
            self.encoder = nn.TransformerEncoderLayer(4, 2, 4)
            self.encoder.linear1 = self.a

    assert pairs(Tied()) == {}


def test_a_subclass_is_neither_layer_nor_norm():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    class Shifted(nn.BatchNorm1d):
        def forward(self, x):
            return super().forward(x + 1)

    for model in (
        nn.Sequential(Doubled(4, 4), nn.BatchNorm1d(4)),
        nn.Sequential(nn.Linear(4, 4), Shifted(4)),
    ):
        assert pairs(model) == {}


def test_a_trace_changes_nothing():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
            self.calls, self.seen = 0, []
            self.register_buffer("steps", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            self.steps.add_(1)
            self.last = self.norm(self.layer(x))
            self.seen.append(self.last)
            return self.last

    model = Counting()
    pairs(whiten(model))
    state = copy.deepcopy(model.state_dict())
    tensors = {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items() if "extra" not in name}
    transform, handle = model.layer.transform, model.layer.transform.handle
    assert pairs(model) == {"layer": "norm"}
    assert (model.calls, model.seen, hasattr(model, "last")) == (0, [], False)
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    assert all(id(model.state_dict(keep_vars=True)[name]) == number for name, number in tensors.items())
    assert model.layer.transform is transform and transform.handle is handle
    assert transform.schedule.members() == [transform]


def test_optional_arguments_are_at_their_defaults():
    class Optional(Net):
        def forward(self, x, mask=None, *, features=False, scale=(1.0,)):
            y = self.a(x)
            x = self.norm(y)
            if mask is not None:
                x = x * mask + y
            return (x, y) if features else x

    assert pairs(Optional(None)) == {"a": "norm"}


def test_a_model_that_cannot_be_traced_says_why_in_one_line():
    class Dependent(Net):
        def forward(self, x):
            return self.norm(self.a(x)) if x.sum() > 0 else x

    with pytest.raises(
        ValueError, match=r"^torch.fx cannot trace Dependent \(symbolically traced variables cannot"
    ) as e:
        pairs(Dependent(None))
    assert "\n" not in str(e.value)


NETWORKS = {
    "resnet20": (models.resnet20, 20 - 1),
    "whitened resnet20": (models.whitened_resnet20, 20 - 1),
    "resnet18": (torchvision.models.resnet18, 21 - 1),
    # But for the two of each squeeze, of which there are nine, and the two of the classifier.
    "mobilenet": (torchvision.models.mobilenet_v3_small, 54 - 18 - 2),
    # The first of each of the eight layers; and the stem. The others' output goes to several.
    "densenet": (lambda: torchvision.models.DenseNet(8, (4, 4), 16), 8 + 1),
}


@pytest.mark.parametrize("build, expected", NETWORKS.values(), ids=NETWORKS.keys())
def test_networks(build, expected):
    model = build()
    found = pairs(model)
    modules = dict(model.named_modules())
    assert len(found) == len(set(found.values())) == expected
    for layer, norm in found.items():
        assert type(modules[layer]) in (nn.Conv2d, WhitenedConv2d) and type(modules[norm]) is nn.BatchNorm2d
        # They are neighbours by name, too.
        assert layer.rpartition(".")[0] == norm.rpartition(".")[0]
