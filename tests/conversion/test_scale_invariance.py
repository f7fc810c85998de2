"""whiten(psi=…): the layers that a normalization makes scale-invariant, and no others."""

import fnmatch
import logging

import pytest
import torch
from torch import nn

from whiten_layers import Chain, FeatureWhitening, PSIScaling, models, whiten
from whiten_layers.conversion.scale_invariance import SCALE_INVARIANT
from whiten_layers.layers import TWINS


def scaled(model):
    """The names of the layers whose gradients are scaled."""
    return {
        name
        for name, module in model.named_modules()
        if isinstance(module, tuple(TWINS))
        and any(isinstance(part, PSIScaling) for part in getattr(module, "transform", nn.Identity()).modules())
    }


def found(*modules):
    """What psi=True finds, of a sequence and a layer that it finds for certain."""
    certain = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
    return scaled(whiten(nn.Sequential(*modules, *certain), psi=True)) - {str(len(modules))}


PAIRS = {
    "linear": ((nn.Linear(3, 4), nn.BatchNorm1d(4)), True),
    "linear, synchronised": ((nn.Linear(3, 4), nn.SyncBatchNorm(4)), True),
    "linear, of sequences": ((nn.Linear(3, 4), nn.BatchNorm1d(7)), False),
    "linear, whose features are a dimension of space": ((nn.Linear(3, 4), nn.BatchNorm2d(4)), False),
    "linear, normalised along its features": ((nn.Linear(3, 4), nn.InstanceNorm1d(4)), False),
    "conv1d": ((nn.Conv1d(4, 6, 3, groups=2), nn.BatchNorm1d(6)), True),
    "conv2d": ((nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)), True),
    "conv2d, without running statistics": ((nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)), True),
    "conv2d, synchronised": ((nn.Conv2d(3, 4, 3), nn.SyncBatchNorm(4)), True),
    "conv2d, images": ((nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4)), True),
    "conv2d, other channels": ((nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(3)), False),
    "conv3d": ((nn.Conv3d(3, 4, 3), nn.InstanceNorm3d(4, track_running_stats=True)), True),
    "transposed": ((nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)), True),
    "layer norm": ((nn.Linear(3, 4), nn.LayerNorm(4)), False),
    "group norm": ((nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4)), False),
    "response norm": ((nn.Conv2d(3, 4, 3), nn.LocalResponseNorm(2)), False),
    "nothing": ((nn.Conv2d(3, 4, 3), nn.Identity()), False),
    "an activation between": ((nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4)), False),
    "the norm in front": ((nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3)), False),
    "an embedding": ((nn.Embedding(3, 4), nn.BatchNorm1d(4)), False),
}


@pytest.mark.parametrize("modules, qualifies", PAIRS.values(), ids=PAIRS.keys())
def test_what_qualifies(modules, qualifies):
    assert found(*modules) == ({"0"} if qualifies else set())


def test_every_norm_of_the_table_qualifies_after_a_convolution():
    for norm in SCALE_INVARIANT:
        assert found(nn.Conv2d(3, 4, 3), norm(4)) == {"0"}


def test_a_frozen_norm_does_not_normalise_by_the_batch():
    def pair(**options):
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, **options))

    frozen, without = pair(), pair(track_running_stats=False)
    frozen[1].eval()
    without[1].eval()
    images = nn.Sequential(nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4, track_running_stats=True))
    images[1].eval()
    assert found(frozen, without, images, pair().eval()) == {"1.0", "3.0"}  # the last is evaluated for the time being


class Forms(nn.Module):
    """One layer of each kind of use."""

    def __init__(self):
        super().__init__()
        names = "twice", "shared", "tied", "read", "skipped", "good"
        for name in names:
            setattr(self, name, nn.Linear(4, 4))
            setattr(self, f"{name}_norm", nn.BatchNorm1d(4))
        self.tied_with = nn.Linear(4, 4)
        self.tied_with.weight = self.tied.weight
        self.alias = self.shared
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x):
        x = self.twice_norm(self.twice(self.twice(x)))
        x = self.shared_norm(self.shared(x)) + self.norm(self.alias(x))
        x = self.tied_with(self.tied_norm(self.tied(x)))
        x = self.read_norm(self.read(x)) * self.read.weight.sum()
        y = self.skipped(x)
        return self.good_norm(self.good(self.skipped_norm(y) + y))


def test_every_disqualification():
    assert scaled(whiten(Forms(), psi=True)) == {"good"}


def test_a_residual_network():
    model = whiten(models.resnet20(), FeatureWhitening(power=1.0), psi=True)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, tuple(TWINS))}
    assert len(layers) == 20 and scaled(model) == layers.keys() - {"fc"}
    assert type(model.fc.transform) is FeatureWhitening
    transform = model.layer1[0].conv1.transform
    assert isinstance(transform, Chain) and [type(one) for one in transform.members()] == [FeatureWhitening, PSIScaling]
    assert next(transform.members()).power == model.fc.transform.power == 1.0
    assert len({module.transform.schedule for module in layers.values()}) == 1
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize(
    "psi, pattern", [("layer1.*", "layer1.*"), (["fc"], "fc"), (("*conv1", "fc"), "*c*1"), ([], "")]
)
def test_layers_can_be_named(psi, pattern):
    model = whiten(models.resnet20(), "recursive", psi=psi)
    layers = [name for name, module in model.named_modules() if isinstance(module, tuple(TWINS))]
    expected = set(fnmatch.filter(layers, pattern)) | ({"fc"} if "fc" in psi else set())
    assert scaled(model) == expected
    assert {module.method for module in model.modules() if isinstance(module, FeatureWhitening)} == {"recursive"}


def test_what_is_left_out_is_not_scaled_and_what_is_whitened_keeps_its_transform():
    model = whiten(models.resnet20(), psi=True, include=["layer1.*", "fc"], skip="*.conv2")
    assert scaled(model) == {f"layer1.{block}.conv1" for block in range(3)}
    before = {name: module for name, module in model.named_modules() if name.endswith(".transform")}
    whiten(model, psi=True)
    after = {name: module for name, module in model.named_modules() if name.endswith(".transform")}
    assert all(after[name] is transform for name, transform in before.items())
    assert len(scaled(model)) == 19


def test_it_is_off_unless_it_is_asked_for(caplog):
    with caplog.at_level(logging.INFO, logger="whiten_layers"):
        assert not scaled(whiten(models.resnet20()))
    assert [record.getMessage() for record in caplog.records] == [
        "whitened 20 of 20 layers, 99 % of the parameters that train"
    ]


class Dependent(nn.Sequential):
    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else x


def test_what_is_not_possible_leaves_the_model_as_it_was():
    reasons = {
        r"psi='layer9\.\*' matches no layer that can be whitened: there are 0$": (nn.Sequential, ["layer9.*"]),
        r"psi=True is not possible, since torch.fx cannot trace Dependent \(symbolically traced variables cannot be "
        r"used as inputs to control flow\): name the layers, as in psi=\['layer1\.\*'\]$": (Dependent, True),
        r"psi=True finds no layer whose output goes to a normalization per channel alone: name the layers, as in": (
            nn.Sequential,
            True,
        ),
    }
    for message, (kind, psi) in reasons.items():
        model = kind(nn.Linear(4, 4), nn.ReLU())
        with pytest.raises(ValueError, match=message):
            whiten(model, psi=psi)
        assert type(model[0]) is nn.Linear
    assert scaled(whiten(Dependent(nn.Linear(4, 4), nn.BatchNorm1d(4)), psi=["0"])) == {"0"}
    with pytest.raises(ValueError, match="psi=True finds no layer"):
        whiten(nn.Linear(4, 4), psi=True)
