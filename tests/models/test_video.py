"""The multi-fibre networks against the paper's counts, plain and whitened."""

from functools import partial

import pytest
import torch
import whiten_layers.models as models
from torch import nn

from benchmarks.video import counted
from whiten_layers import FeatureWhitening, IterNorm3d, WhitenedConv3d, WhitenedLinear

# Chen et al., arXiv 1807.11195, table 5: millions of parameters, 10⁹ multiply-adds for 16 frames of 224×224.
PARAMETERS, MULTIPLY_ADDS = 8.0, 11.1
CLIP = (16, 224, 224)
# Units of the stages; a stem, four convolutions a unit, a projection a stage, and the linear layer.
UNITS = {"conv2": 3, "conv3": 4, "conv4": 6, "conv5": 3}
LAYERS = 1 + 4 * sum(UNITS.values()) + len(UNITS) + 1
NAMES = ["mfnet3d", "mfcd_net"]


def builder(name, whitened=False):
    return getattr(models, f"whitened_{name}" if whitened else name)


@pytest.mark.parametrize("whitened", [False, True])
def test_layers_parameters_and_operations_are_the_papers(whitened):
    with torch.device("meta"):
        network = builder("mfnet3d", whitened)()
    layers = [module for module in network.modules() if isinstance(module, (nn.Conv3d, nn.Linear))]
    assert len(layers) == LAYERS
    assert {name: len(getattr(network, name)) for name in UNITS} == UNITS
    assert {layer.groups for layer in layers[:-1]} == {1, 16}
    parameters, operations = counted(network, *CLIP)
    assert round(parameters, 1) == PARAMETERS and round(operations, 1) == MULTIPLY_ADDS


def test_the_shapes_of_the_stages_are_the_papers():
    with torch.device("meta"):
        network = models.mfnet3d()
    shapes = {}
    for name in ["conv1", "maxpool", *UNITS]:
        getattr(network, name).register_forward_hook(
            lambda module, inputs, output, name=name: shapes.update({name: tuple(output.shape[1:])})
        )
    network(torch.empty(1, 3, *CLIP, device="meta"))
    assert shapes == {
        "conv1": (16, 16, 112, 112),
        "maxpool": (16, 16, 56, 56),
        "conv2": (96, 8, 56, 56),
        "conv3": (192, 8, 28, 28),
        "conv4": (384, 8, 14, 14),
        "conv5": (768, 8, 7, 7),
    }


def test_the_slim_network_has_less_than_half_of_both():
    with torch.device("meta"):
        (parameters, operations), whole = counted(models.mfcd_net(), *CLIP), counted(models.mfnet3d(), *CLIP)
    assert f"{parameters:.1f} M parameters" in models.mfcd_net.__doc__
    assert parameters < whole[0] / 2 and operations < whole[1] / 2


@pytest.mark.parametrize("name", NAMES)
def test_whitened_is_plain_in_evaluation_and_trains(name):
    torch.manual_seed(0)
    plain = builder(name)(7).eval()
    network = builder(name, whitened=True)(7, transform=FeatureWhitening(power=1.0)).eval()
    network.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 4, 32, 32)
    with torch.no_grad():
        assert plain(x).shape == (2, 7)
        torch.testing.assert_close(network(x), plain(x), rtol=0, atol=0)
    network.train()(x).square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in network.parameters())
    layers = [module for module in network.modules() if isinstance(module, (nn.Conv3d, nn.Linear))]
    assert all(type(layer) in (WhitenedConv3d, WhitenedLinear) and layer.transform.power == 1.0 for layer in layers)


def test_signals_neither_grow_nor_vanish_in_a_new_network():
    torch.manual_seed(0)
    network = models.mfcd_net()
    deviations = []
    for module in network.modules():
        if isinstance(module, nn.Conv3d):
            module.register_forward_hook(lambda module, inputs, output: deviations.append(output.std().item()))
    network(torch.randn(2, 3, 8, 64, 64))
    assert len(deviations) == LAYERS - 1
    assert min(deviations) > 0.5 and max(deviations) < 2.5


def test_any_layer_can_stand_in():
    made = {"conv": 0, "linear": 0, "norm": 0}

    def counting(kind, layer):
        def make(*arguments, **options):
            made[kind] += 1
            return layer(*arguments, **options)

        return make

    models.mfcd_net(
        conv_layer=counting("conv", nn.Conv3d),
        linear_layer=counting("linear", nn.Linear),
        norm_layer=counting("norm", nn.BatchNorm3d),
    )
    # One normalization in front of each convolution but the stem's, one behind that, and one behind the last unit.
    assert made == {"conv": LAYERS - 1, "linear": 1, "norm": LAYERS - 2 + 2}


def test_any_normalization_beside_whitened_layers():
    network = models.whitened_mfcd_net(5, norm_layer=partial(IterNorm3d, group_size=16))
    plain = models.mfcd_net(5)
    names = {name for name, module in network.named_modules() if isinstance(module, IterNorm3d)}
    assert names == {name for name, module in plain.named_modules() if isinstance(module, nn.BatchNorm3d)}
    network(torch.randn(4, 3, 4, 32, 32)).square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in network.parameters())


def test_every_builder_is_exported():
    assert {builder(name, kind).__name__ for name in NAMES for kind in (False, True)} <= set(models.__all__)
