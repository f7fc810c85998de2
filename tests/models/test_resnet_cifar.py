"""The CIFAR ResNets against the paper's table, plain and whitened."""

from functools import partial

import pytest
import torch
import torchvision
import whiten_layers.models as models
from torch import nn

from whiten_layers import FeatureWhitening, IterNorm2d, StochasticWhiteningBatchNorm2d, WhitenedConv2d, WhitenedLinear

# He et al., arXiv 1512.03385, table 6: layers, and parameters in millions, of the CIFAR networks.
PAPER = {20: 0.27, 32: 0.46, 44: 0.66, 56: 0.85, 110: 1.7}
DEPTHS = [*PAPER, 18, 34, 50]


def builder(depth, whitened=False):
    """The ImageNet networks' names say that these are for CIFAR; the others exist for nothing else."""
    name = f"resnet{depth}" if depth in PAPER else f"cifar_resnet{depth}"
    return getattr(models, f"whitened_{name}" if whitened else name)


def weighted_layers(network):
    """Convolutions and linear layers, without the shortcuts' projections, which the paper's depth leaves out."""
    return [
        m for name, m in network.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear)) and "downsample" not in name
    ]


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("whitened", [False, True])
def test_depth_and_parameters_are_the_papers(depth, whitened):
    network = builder(depth, whitened)()
    assert len(weighted_layers(network)) == depth
    parameters = sum(parameter.numel() for parameter in network.parameters())
    if depth in PAPER:
        assert round(parameters / 1e6, 2 if depth < 100 else 1) == PAPER[depth]
    else:
        # torchvision's network, of 1000 classes and a 7×7 stem, differs in these two layers alone.
        imagenet = getattr(torchvision.models, f"resnet{depth}")()
        features = imagenet.fc.in_features
        assert parameters == sum(p.numel() for p in imagenet.parameters()) - 3 * 64 * (49 - 9) - 990 * (features + 1)


@pytest.mark.parametrize("depth", [18, 34, 50])
def test_names_are_torchvisions(depth):
    ours = {name: value.shape for name, value in builder(depth)(1000).state_dict().items()}
    theirs = {name: value.shape for name, value in getattr(torchvision.models, f"resnet{depth}")().state_dict().items()}
    assert ours.keys() == theirs.keys()
    assert {name for name in ours if ours[name] != theirs[name]} == {"conv1.weight"}


@pytest.mark.parametrize("depth", DEPTHS)
def test_whitened_is_plain_in_evaluation_and_trains(depth):
    torch.manual_seed(0)
    plain = builder(depth)(7).eval()
    network = builder(depth, whitened=True)(7, transform=FeatureWhitening(power=1.0)).eval()
    network.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert plain(x).shape == (2, 7)
        torch.testing.assert_close(network(x), plain(x), rtol=0, atol=0)
    network.train()(torch.randn(2, 3, 16, 16)).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in network.parameters())
    layers = [m for m in network.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert all(type(layer) in (WhitenedConv2d, WhitenedLinear) and layer.transform.power == 1.0 for layer in layers)


def test_the_first_networks_have_no_parameters_in_shortcuts():
    assert not [name for name, _ in models.resnet20().named_parameters() if "downsample" in name]


def test_any_layer_can_stand_in():
    class Counted(nn.Conv2d):
        made = 0

        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            Counted.made += 1

    models.cifar_resnet50(conv_layer=Counted)
    assert Counted.made == 49 + 4  # and four projections


def test_every_builder_is_exported():
    assert {builder(depth, kind).__name__ for depth in DEPTHS for kind in (False, True)} <= set(models.__all__)


def test_an_evaluating_network_exports_as_plain_operations():
    program = torch.export.export(models.whitened_resnet20().eval(), (torch.randn(2, 3, 32, 32),))
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert called and all(name.startswith("aten.") for name in called)


@pytest.mark.parametrize("depth, whitened", [(20, False), (18, True)])
@pytest.mark.parametrize("norm_layer", [IterNorm2d, partial(StochasticWhiteningBatchNorm2d, criterion="frobenius")])
def test_any_normalization_beside_any_layers(depth, whitened, norm_layer):
    network = builder(depth, whitened)(norm_layer=norm_layer)
    plain = builder(depth)()
    kind = getattr(norm_layer, "func", norm_layer)
    names = {name for name, module in network.named_modules() if isinstance(module, kind)}
    assert names == {name for name, module in plain.named_modules() if isinstance(module, nn.BatchNorm2d)}
    assert any(isinstance(module, WhitenedConv2d) for module in network.modules()) == whitened
    network(torch.randn(4, 3, 16, 16)).square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in network.parameters())
