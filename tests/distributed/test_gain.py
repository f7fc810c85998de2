"""OptimalInputGain in several processes: one map for all, from the rows of all."""

import copy

import torch
from torch.nn.parallel import DistributedDataParallel

from whiten_layers import OptimalInputGain, WhitenedLinear
from whiten_layers.statistics.covariance import Moments, merged

from .world import run

ROWS = (9, 14)


def trained(rank):
    torch.manual_seed(0)
    layer = WhitenedLinear(4, 3, dtype=torch.float64, transform=OptimalInputGain(damping=0.03))
    x = torch.randn(ROWS[rank], 4, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)
    model = DistributedDataParallel(layer) if torch.distributed.is_initialized() else layer
    model(x + x.cumsum(1)).cos().sum(1).mean().backward()
    return layer.transform.slopes


def gains(rank):
    return trained(rank).gains.tolist()


def test_gains_are_those_of_all_processes_rows():
    first, second = run(gains, 2)
    assert first == second  # to the last bit
    parts = [trained(rank) for rank in (0, 1)]
    names = ("running_count", "running_effective_count", "running_mean", "running_covariance")
    one, other = (Moments(*(getattr(part, name) for name in names)) for part in parts)
    together = copy.deepcopy(parts[0])
    together.reset_state()
    together.window = merged(one, other)
    together.close_window()
    together.solve_in_place()
    torch.testing.assert_close(torch.tensor(first, dtype=torch.float64), together.gains, rtol=1e-9, atol=1e-12)
    assert all((part.gains - together.gains).abs().max() > 0.01 for part in parts)
