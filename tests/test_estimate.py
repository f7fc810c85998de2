"""What whitening costs is known beforehand, and too costly a layer is named."""

import warnings

import pytest
import torch
from torch import nn

from whiten_layers import FeatureWhitening, estimate, report, whiten


def network():
    convolution = nn.Sequential(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Flatten())
    return nn.Sequential(convolution, nn.Linear(9216, 32), nn.ReLU(), nn.Linear(32, 10))


@pytest.mark.parametrize(
    "options",
    [{}, {"output_power": 0.5, "power": 1.0}, {"features": "patch", "block_size": 64, "method": "recursive"}],
    ids=["default", "both", "patch"],
)
def test_the_memory_is_what_the_report_tells_and_the_model_is_left_alone(options):
    model = network()
    before = {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()}
    made = estimate(model, FeatureWhitening(**options))
    assert {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()} == before
    assert type(model[1]) is nn.Linear and all(p.device.type == "cpu" for p in model.parameters())
    rows = report(whiten(model, FeatureWhitening(**options))).rows
    assert [(c.layer, c.factor, c.matrices, c.size, c.bytes) for c in made.costs] == [
        (r.layer, r.factor, r.groups * r.blocks, r.size, r.bytes) for r in rows
    ]
    assert made.bytes == report(model).bytes and 0 < made.seconds < 100
    wide = max(made.costs, key=lambda cost: cost.seconds)
    assert wide.layer == "1" and "1  " in str(made) and "MiB" in str(made)
    assert estimate(model).bytes == made.bytes  # already whitened: as it is


def test_options_of_whiten():
    assert [cost.layer for cost in estimate(network(), include="0.0", features="kronecker").costs] == ["0.0"] * 2
    with pytest.raises(ValueError, match="nothing"):
        estimate(network(), skip="nothing")


@pytest.mark.parametrize(
    ("layer", "size"),
    [
        (lambda: nn.Linear(4096, 10), 256),
        (lambda: nn.Linear(9216, 10), 128),
        (lambda: nn.Linear(25088, 10), 64),
        (lambda: nn.Linear(10**6, 10), 16),
        (lambda: nn.Conv2d(6144, 10, 3), 128),
        (lambda: nn.Conv2d(6144, 8, 3, groups=8), 128),
        (lambda: nn.Conv2d(6144, 1024, 3, groups=1024), 54),
    ],
)
def test_a_layer_of_many_channels_has_smaller_blocks_by_default(layer, size):
    with torch.device("meta"):
        widest = estimate(layer()).costs[0]
    assert widest.size == size and widest.matrices * size**3 <= 2**28 and 0 < widest.seconds < 100


def test_a_layer_that_costs_too_much_is_named_once():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whiten(network())
        with torch.device("meta"):
            whiten(nn.Linear(25088, 4096))  # VGG's
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(9216, 4608), nn.Linear(4608, 10), nn.Linear(10, 10))
        with pytest.warns(UserWarning, match=r"0 \(9216 features, 9e\+12 operations\), 1 \(4608 .*block_size") as seen:
            whiten(model, FeatureWhitening(block_size=None))
        assert len(seen) == 1 and "2 (" not in str(seen[0].message) and seen[0].filename == __file__
        with pytest.warns(UserWarning, match="and 4 more: give"):
            whiten(nn.Sequential(*(nn.Linear(5000, 1) for _ in range(9))), FeatureWhitening(block_size=None))
