"""Loops as people write them: small batches, turns, two passes an iteration, wide layers. One line must not hurt."""

import itertools

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from whiten_layers import FeatureWhitening, report, whiten

from .helpers import mostly_slow

bce = F.binary_cross_entropy_with_logits


@pytest.mark.parametrize("power, batch", mostly_slow(itertools.product([0.5, 1.0], [8, 16]), [(0.5, 16), (1.0, 8)]))
def test_a_resnet_at_a_small_batch_does_not_explode(batch, power):
    patterns = torch.randn(10, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    losses = {}
    for transform in (None, FeatureWhitening(power=power)):
        torch.manual_seed(1)
        model = torchvision.models.resnet18(num_classes=10)
        if transform is not None:
            whiten(model, transform)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        generator, found = torch.Generator().manual_seed(2), []
        for _ in range(14):
            y = torch.randint(0, 10, (batch,), generator=generator)
            x = F.interpolate(patterns[y], size=32, mode="bilinear")
            x = x + 0.7 * torch.randn(x.shape, generator=generator)
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        losses[transform is None] = found
    assert max(losses[False]) < 1.2 * max(losses[True])


@pytest.mark.parametrize("interval", [None, 9, 10, 11])
@pytest.mark.parametrize("period", [2, 5])
def test_domains_that_take_turns_are_all_seen(interval, period):
    options = {} if interval is None else {"update_interval": interval, "statistics_interval": interval}
    torch.manual_seed(0)
    model = whiten(nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4)), FeatureWhitening(**options))
    places = torch.linspace(-1, 1, period)
    for step in range(600):
        model(torch.randn(64, 8) + places[step % period]).square().sum().backward()
    # Of ten windows or more, each of one domain, whose places have deviations of 1 and 0.7; seen apart it would be 1.
    assert abs(model[0].transform.inputs.running_mean.mean().item()) < 0.5


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("options", [{}, {"update_interval": 10, "statistics_interval": 10}], ids=["default", "tenth"])
def test_domains_that_take_turns_are_learnt_no_worse(options, seed):
    final = {}
    for whitened in (False, True):
        torch.manual_seed(seed)
        model, target = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4)), torch.randn(8, 4)
        if whitened:
            whiten(model, FeatureWhitening(**options))
        optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.1), []
        for step in range(300):
            x = torch.randn(64, 8) + (1 if step % 2 == 0 else -1)
            loss = F.mse_loss(model(x), x.tanh() @ target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        final[whitened] = sum(losses[-20:]) / 20
    assert final[True] <= final[False]


def test_both_passes_of_a_gan_are_seen():
    torch.manual_seed(0)
    critic = whiten(nn.Sequential(nn.Linear(2, 16), nn.LeakyReLU(0.2), nn.Linear(16, 1)))
    generator = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 2))
    for _ in range(200):
        real, fake = torch.randn(64, 2) + 5, generator(torch.randn(64, 2))
        (bce(critic(real), torch.ones(64, 1)) + bce(critic(fake.detach()), torch.zeros(64, 1))).backward()
        bce(critic(fake), torch.ones(64, 1)).backward()
    # Real samples lie at 5, fake ones near 0. Of three rows one is real: the generator's pass reaches the critic, too.
    assert 1.2 < critic[0].transform.inputs.running_mean.mean() < 2.8


@pytest.mark.parametrize(("features", "block"), [(1152, 256), (4608, 128), (9216, 128), (25088, 64)])
def test_a_wide_layer_is_whitened_in_blocks_whose_cost_is_linear_in_its_width(features, block):
    model = whiten(nn.Sequential(nn.Linear(features, 4)))
    factor = model[0].transform.inputs
    assert factor.precision.shape == (-(-features // block), *[-(-features // factor.blocks)] * 2)
    model(torch.randn(8, features)).sum().backward()
    assert factor.num_refreshes == 1
    # C and P; the factor's counts and means are small beside
    assert report(model).bytes < 2.1 * 4 * features * block
