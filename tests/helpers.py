"""A small network, its batches and its state, for the tests that train one with each side whitened."""

from typing import Any

import pytest
import torch
from torch import nn

from whiten_layers import FeatureWhitening, whiten

EVERY_BATCH: dict[str, Any] = {"update_interval": 1, "statistics_interval": 1, "bound": None}  # a linear map
INPUT_SIDE = FeatureWhitening(**EVERY_BATCH)
BOTH_SIDES = FeatureWhitening(output_power=0.5, **EVERY_BATCH)
each_transform = pytest.mark.parametrize("transform", [INPUT_SIDE, BOTH_SIDES], ids=["input", "both"])

compilers_may_warn = pytest.mark.filterwarnings("ignore")  # those of some versions warn of themselves


def mostly_slow(every, quick):
    """Mark all of some parameters, or tuples of them, as slow but for those that are quick, or stand for the others."""
    marks = {True: [], False: [pytest.mark.slow]}
    return [pytest.param(*(one if isinstance(one, tuple) else (one,)), marks=marks[one in quick]) for one in every]


def network(transform, inplace=True):
    torch.manual_seed(0)
    return whiten(
        nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1),
            nn.ReLU(inplace=inplace),
            nn.Conv2d(4, 4, 3, stride=2, bias=False),
            nn.ReLU(inplace=inplace),
            nn.Flatten(),
            nn.Linear(36, 5),
        ),
        transform,
    )


def batch(seed):
    return torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def buffers(model):
    return {name: value.clone() for name, value in model.named_buffers()}
