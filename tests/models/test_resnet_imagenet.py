"""The whitened ImageNet networks against torchvision's."""

import pytest
import torch
import torchvision
import whiten_layers.models as models
from torch import nn
from torchvision.models import ResNet18_Weights, get_model_weights

from whiten_layers import FeatureWhitening, IterNorm2d, WhitenedConv2d, WhitenedLinear

from ..helpers import mostly_slow

# Convolutions and linear layers: the depth that a name tells, and a projection in each stage that changes the width.
LAYERS = {
    "resnet18": 18 + 3,
    "resnet34": 34 + 3,
    "resnet50": 50 + 4,
    "resnet101": 101 + 4,
    "resnet152": 152 + 4,
    "resnext50_32x4d": 50 + 4,
    "resnext101_32x8d": 101 + 4,
    "resnext101_64x4d": 101 + 4,
    "wide_resnet50_2": 50 + 4,
    "wide_resnet101_2": 101 + 4,
}

each_network = pytest.mark.parametrize("name", LAYERS)
some_networks = pytest.mark.parametrize("name", mostly_slow(LAYERS, ["resnet18", "resnet50"]))


def builder(name):
    return getattr(models, f"whitened_{name}")


@pytest.fixture
def downloads(monkeypatch):
    """What is to be had, by its address, once; nothing is downloaded."""
    there = {}
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda url, **_: there.pop(url))
    return there


@each_network
def test_the_plain_builder_is_torchvisions_own(name):
    assert getattr(models, name) is getattr(torchvision.models, name)
    assert {name, f"whitened_{name}"} <= set(models.__all__)


@each_network
def test_layers_and_parameters(name):
    with torch.device("meta"):
        network = builder(name)(transform=FeatureWhitening(power=1.0))
    parameters = sum(parameter.numel() for parameter in network.parameters())
    assert parameters == get_model_weights(name).DEFAULT.meta["num_params"]
    assert f"{parameters / 1e6:.1f} M parameters" in builder(name).__doc__
    layers = [module for module in network.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    assert len(layers) == LAYERS[name]
    assert all(type(layer) in (WhitenedConv2d, WhitenedLinear) and layer.transform.power == 1.0 for layer in layers)


@some_networks
def test_with_torchvisions_weights_it_evaluates_as_torchvisions(name, downloads):
    torch.manual_seed(0)
    plain = getattr(torchvision.models, name)().eval()
    for module in plain.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
    downloads[get_model_weights(name).DEFAULT.url] = plain.state_dict()
    network = builder(name)(weights="DEFAULT").eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = plain(x)
        assert expected.isfinite().all() and torch.equal(network(x), expected)
        for value in (*network.parameters(), *network.buffers()):
            value.zero_()
    assert not network.load_state_dict(plain.state_dict(), strict=True).missing_keys
    ours = network.state_dict()
    assert all(torch.equal(ours[key], value) for key, value in plain.state_dict().items())


@some_networks
def test_weights_are_an_enum_or_its_name(name, downloads):
    with torch.device("meta"):
        state = getattr(torchvision.models, name)().state_dict()
        for member, weights in get_model_weights(name).__members__.items():
            for given in (weights, member):
                downloads[weights.url] = state
                builder(name)(weights=given, progress=False)
                assert not downloads
    assert get_model_weights(builder(name)) is get_model_weights(name)


def test_weights_that_do_not_fit_are_torchvisions_error():
    with pytest.raises(TypeError, match="expected ResNet50_Weights but received ResNet18_Weights"):
        models.whitened_resnet50(weights=ResNet18_Weights.DEFAULT)
    with pytest.raises(ValueError, match="'num_classes' expected value 1000 but got 10"):
        models.whitened_resnet50(weights="DEFAULT", num_classes=10)
    with pytest.raises(TypeError, match="pretrained"):
        models.whitened_resnet18(pretrained=True)
    with pytest.raises(TypeError, match="positional"):
        models.whitened_resnet50("DEFAULT")


def test_options_are_torchvisions():
    with torch.device("meta"):
        network = models.whitened_resnet18(num_classes=7, norm_layer=IterNorm2d)
    assert network.fc.out_features == 7
    assert sum(isinstance(module, IterNorm2d) for module in network.modules()) == 20


@pytest.mark.parametrize("name", ["resnet18", "resnext50_32x4d"])
def test_a_training_step_gives_finite_gradients(name):
    torch.manual_seed(0)
    network = builder(name)(num_classes=7, transform=FeatureWhitening(block_size=128))  # small, and so quick, inverses
    network(torch.randn(2, 3, 64, 64)).square().sum().backward()
    assert all(parameter.grad.isfinite().all() and parameter.grad.any() for parameter in network.parameters())
