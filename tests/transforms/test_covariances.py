"""What is whitened together, and how many rows tell enough of it, where the user does not say."""

import pytest
from torch import nn

from whiten_layers.layers import TWINS
from whiten_layers.transforms.covariances import CUBES, default_block_size, default_rows, has_small_patches


@pytest.mark.parametrize(
    "channels, size",
    [(1, 256), (4096, 256), (4097, 128), (16_384, 128), (16_385, 64), (65_536, 64), (CUBES, 1), (CUBES + 1, 1)],
)
def test_blocks_are_small_where_there_are_many_channels(channels, size):
    assert default_block_size(channels) == size


@pytest.mark.parametrize(
    "plain, small",
    [
        (nn.Conv2d(33, 8, 3), True),  # 297 features
        (nn.Conv2d(34, 8, 3), False),
        (nn.Conv2d(150, 8, (1, 2)), True),  # 300
        (nn.Conv2d(33 * 10, 10, 3, groups=10), True),  # 10 times 297³ are 2.6e8
        (nn.Conv2d(33 * 11, 11, 3, groups=11), False),
    ],
)
def test_patches_are_small_by_their_features_and_their_number(plain, small):
    assert has_small_patches(TWINS[type(plain)].geometry(plain)) == small


@pytest.mark.parametrize(
    "batch, features, decay, interval, rows",
    [
        (1, 8, 0.95, 10, 512),
        (20, 8, 0.95, 10, 512),
        (21, 4, 0.75, 1, 64),  # 32 would do
        (21, 16, 0.75, 1, 128),
        (21, 16, 0.75, 3, 384),
        (21, 300, 0.75, 1, 512),
    ],
)
def test_rows_are_as_many_as_a_memory_needs_after_a_start_with_many(batch, features, decay, interval, rows):
    assert default_rows(batch, features, decay, interval) == rows
