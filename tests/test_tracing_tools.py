"""Tools that trace a model: `torch.fx`, torchvision's feature extractors, `torch.export`."""

import copy

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

from whiten_layers import (
    FeatureWhitening,
    IterNorm2d,
    StochasticWhiteningBatchNorm2d,
    WhitenedConvTranspose2d,
    WhitenedLinear,
    unwhiten,
    whiten,
)


def network(norm=nn.BatchNorm2d):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3, bias=False), norm(4), nn.ReLU(), nn.ConvTranspose2d(4, 4, 2), nn.Flatten()]
    return whiten(nn.Sequential(*layers, nn.Linear(196, 5)), FeatureWhitening(output_power=0.5))


def train(model, steps=12):
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for step in range(steps):
        x = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        F.cross_entropy(model(x), torch.arange(8) % 5).backward()
        optimizer.step()


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, IterNorm2d, StochasticWhiteningBatchNorm2d])
@pytest.mark.parametrize("traced_in_training", [True, False])
def test_a_traced_model_trains_as_the_model_does(norm, traced_in_training):
    model, twin = network(norm), network(norm)
    graph = torch.fx.symbolic_trace(twin.train(traced_in_training)).train()
    targets = {node.target for node in graph.graph.nodes if node.op == "call_module"}
    assert {"0", "1", "3", "5"} <= targets
    train(model)
    train(graph)
    torch.testing.assert_close(dict(twin.state_dict()), dict(model.state_dict()), rtol=0, atol=0)
    assert twin[0].transform.num_batches_tracked == 12
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(graph.eval()(x), model.eval()(x), rtol=0, atol=0)


def test_the_output_size_of_a_transposed_convolution_is_traced():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = WhitenedConvTranspose2d(3, 4, 2, stride=2)

        def forward(self, input):
            return self.up(input, [9, 9])

    model = Model()
    graph = torch.fx.symbolic_trace(model)
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(graph(x), model(x), rtol=0, atol=0)


def test_features_of_a_network_train_whitened():
    model = whiten(torchvision.models.resnet18())
    features = create_feature_extractor(model, {"layer4": "features", "layer1.0.conv1": "early"})
    found = features(torch.randn(4, 3, 64, 64))
    assert found["features"].shape == (4, 512, 2, 2) and found["early"].shape == (4, 64, 16, 16)
    found["features"].square().mean().backward()
    assert model.layer4[1].conv2.transform.num_batches_tracked == 1
    plain = create_feature_extractor(torchvision.models.resnet18(), {"layer4": "features", "layer1.0.conv1": "early"})
    assert {name for name, _ in plain.named_parameters()} == {name for name, _ in features.named_parameters()}


def test_what_cannot_be_traced_is_an_error_that_says_so():
    model = network()
    model[0].register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],))
    with pytest.raises(RuntimeError, match="WhitenedConv2d that has forward hooks in training"):
        torch.fx.symbolic_trace(model)
    graph, x = torch.fx.symbolic_trace(model.eval()), torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(graph(x), model(x), rtol=0, atol=0)
    layer = WhitenedLinear(3, 2)
    with pytest.raises(RuntimeError, match="cannot trace a WhitenedLinear alone in training mode"):
        torch.fx.symbolic_trace(layer)
    x = torch.randn(4, 3)
    torch.testing.assert_close(torch.fx.symbolic_trace(layer.eval())(x), layer(x), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:.*(torch.jit|Trace|trace).*")
def test_torchs_older_tracing_in_training_mode_warns_that_it_is_plain(tmp_path):
    model, x = network(nn.Identity), torch.randn(8, 3, 8, 8)
    train(model)
    model.zero_grad()
    with pytest.warns(UserWarning, match="torch.jit.trace takes the plain layer"):
        traced = torch.jit.trace(model, x)
    torch.jit.save(traced, tmp_path / "traced.pt")
    F.cross_entropy(traced(x), torch.arange(8) % 5).backward()
    found = [parameter.grad.clone() for parameter in model.parameters()]
    plain = unwhiten(model)
    plain.zero_grad()
    F.cross_entropy(plain(x), torch.arange(8) % 5).backward()
    torch.testing.assert_close(found, [parameter.grad for parameter in plain.parameters()])


@pytest.mark.skipif(not hasattr(torch.compiler, "is_exporting"), reason="this torch does not tell that it exports")
def test_an_export_in_training_mode_warns_that_it_is_plain():
    model = network(nn.InstanceNorm2d)
    with pytest.warns(UserWarning, match="trains with plain gradients"):
        exported = torch.export.export(model, (torch.randn(8, 3, 8, 8),)).module()
    plain = copy.deepcopy(model)
    for one in (exported, plain.eval()):
        one.zero_grad()
        F.cross_entropy(one(torch.ones(8, 3, 8, 8)), torch.arange(8) % 5).backward()
    expected = {name: parameter.grad for name, parameter in plain.named_parameters()}
    torch.testing.assert_close({name: parameter.grad for name, parameter in exported.named_parameters()}, expected)
