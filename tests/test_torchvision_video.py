"""The twins of torchvision's 3-D convolutions, which are subclasses of `nn.Conv3d`."""

import pickle

import pytest
import torch
from torch import nn
from torchvision.models import video
from torchvision.models.video.resnet import Conv3DNoTemporal, Conv3DSimple

from whiten_layers import FeatureWhitening, WhitenedConv3d, unwhiten, whiten
from whiten_layers.torchvision_video import WhitenedConv3DNoTemporal, WhitenedConv3DSimple

TWINS = {Conv3DSimple: WhitenedConv3DSimple, Conv3DNoTemporal: WhitenedConv3DNoTemporal}


@pytest.mark.parametrize("plain", TWINS)
@pytest.mark.parametrize("stride", [1, 2])
def test_it_trains_as_the_convolution_does(plain, stride):
    torch.manual_seed(0)
    given = plain(3, 4, stride=stride)
    layer = nn.Conv3d(3, 4, given.kernel_size, given.stride, given.padding, bias=False)
    layer.load_state_dict(given.state_dict())
    built = TWINS[plain](3, 4, stride=stride, transform=FeatureWhitening(update_interval=1))
    built.load_state_dict(given.state_dict(), strict=False)
    layers = [whiten(part, update_interval=1) for part in (given, layer)] + [built]
    for step in range(3):
        x = torch.randn(4, 3, 4, 6, 6, generator=torch.Generator().manual_seed(step)).cumsum(-1)
        for part in layers:
            part.zero_grad()
            part(x).cumsum(-1).square().mean().backward()
        for part in (given, built):
            assert type(part) is TWINS[plain]
            torch.testing.assert_close(part.weight.grad, layer.weight.grad, rtol=0, atol=0)
    assert layer.transform.num_batches_tracked == 3


@pytest.mark.parametrize("name", ["r3d_18", "mc3_18", "r2plus1d_18"])
def test_a_residual_network_is_whitened_whole(name):
    with torch.device("meta"):
        plain = getattr(video, name)(num_classes=5)
        model = whiten(getattr(video, name)(num_classes=5))
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv3d)]
    assert len(convolutions) >= 20 and all(isinstance(module, WhitenedConv3d) for module in convolutions)
    assert [type(module) for module in unwhiten(model).modules()] == [type(module) for module in plain.modules()]


def test_a_pickled_layer_goes_on():
    layer = whiten(Conv3DSimple(3, 4))
    copied = pickle.loads(pickle.dumps(layer))
    copied(torch.randn(2, 3, 4, 4, 4)).square().sum().backward()
    assert type(copied) is WhitenedConv3DSimple and copied.transform.num_batches_tracked == 1
    assert layer.transform.num_batches_tracked == 0
