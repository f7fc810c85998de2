"""Running statistics computed anew by a pass over a loader, of batch and whitening normalizations."""

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.optim.swa_utils import update_bn as update_batch_normalizations

from whiten_layers import convert_batchnorm, update_bn
from whiten_layers.norm.base import WhiteningNorm

from .cases import KINDS

BATCHES = torch.randn(3, 8, 4, generator=torch.Generator().manual_seed(0)).cumsum(-1)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4), nn.BatchNorm1d(4))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [True, False])
def test_statistics_are_the_averages_over_the_loaders_batches(kind, training):
    model = AveragedModel(convert_batchnorm(network(), kind))
    model(torch.randn(8, 4))  # to be forgotten
    model.train(training)
    update_bn([(batch, None) for batch in BATCHES], model)
    assert model.training == training
    norms = [module for module in model.modules() if isinstance(module, WhiteningNorm)]
    assert len(norms) == 2
    for norm in norms:
        assert norm.num_batches_tracked == 3 and norm.momentum == 0.1
    torch.testing.assert_close(norms[0].running_mean, BATCHES.mean((0, 1)))
    if kind == "decorrelated":
        covariance = torch.stack([batch.T.cov() for batch in BATCHES]).mean(0)
        torch.testing.assert_close(norms[0].running_covariance[0], covariance)


def test_for_batch_normalizations_it_is_pytorchs():
    ours, theirs = network(), network()
    update_bn(BATCHES, ours)
    update_batch_normalizations(BATCHES, theirs)
    torch.testing.assert_close(dict(ours.state_dict()), dict(theirs.state_dict()), rtol=0, atol=0)


def test_parts_keep_their_mode():
    model = convert_batchnorm(network(), "iter_norm", include="0")
    model[2].eval()
    update_bn(BATCHES, model)
    assert model.training and model[0].training and not model[2].training
    assert model[0].num_batches_tracked == model[2].num_batches_tracked == 3


@pytest.mark.parametrize("kind", KINDS)
def test_a_loader_that_fails_leaves_momentum_and_mode(kind):
    model = convert_batchnorm(network(), kind, include="0").eval()  # the other stays a batch normalization
    with pytest.raises(ValueError, match="expected 4 channels"):
        update_bn([torch.randn(8, 5)], model)
    assert not model.training and model[0].momentum == model[2].momentum == 0.1
