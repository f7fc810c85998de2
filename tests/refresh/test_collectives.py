"""Windows of several processes become one. Here the group is of one process; `tests/distributed` has real ones."""

import pytest
import torch
import torch.distributed as dist

from whiten_layers.refresh.collectives import _listed, merge_windows, share
from whiten_layers.statistics.covariance import FeatureCovariance


@pytest.fixture
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_a_window_without_rows_stays_one_of_zeros(group):
    empty, full = (FeatureCovariance(2, 3, decay=0.9, dtype=torch.float64) for _ in range(2))
    rows = torch.randn(2, 8, 3, dtype=torch.float64)
    full.observe_rows(rows)
    before = full.window
    merge_windows([empty, full], group)
    for part in empty.window:
        assert torch.equal(part, torch.zeros_like(part))
    torch.testing.assert_close(tuple(full.window), tuple(before), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("number, end", [(0, "nothing"), (12, "11"), (13, "11, and 1 more"), (40, "11, and 28 more")])
def test_a_message_lists_twelve_layers(number, end):
    listed = _listed([str(label) for label in range(number)])
    assert listed.endswith(end) and listed.count(",") == max(0, min(number, 13) - 1)


@pytest.mark.parametrize(
    "costs, processes, owners",
    [([], 2, []), ([1, 1, 1], 1, [0, 0, 0]), ([5, 1, 4, 1], 2, [0, 1, 1, 0]), ([1, 2, 3], 4, [2, 1, 0])],
)
def test_work_is_dealt_out_evenly(costs, processes, owners):
    assert share(costs, processes) == owners
