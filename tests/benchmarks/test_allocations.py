"""The counters of memory: on operations whose tensors can be counted by hand, and on what the library observes."""

import torch
import torch.nn.functional as F

from benchmarks.allocations import KeptMemory, PeakMemory
from whiten_layers import FeatureWhitening, WhitenedConv2d


def test_the_peak_is_of_what_is_alive_at_one_time():
    x = torch.randn(1000)
    with PeakMemory() as memory:
        view = (x + 1).view(10, 100)  # holds what its base held
        assert memory.now == 4000
        del view
        assert memory.now == 0
        x.add_(1)
        y = (x * 2).sum()
    assert memory.peak == 4004 and memory.now == y.nbytes


def test_what_is_saved_counts_once():
    x, weight = torch.randn(6, 5, requires_grad=True), torch.randn(4, 5, requires_grad=True)
    with KeptMemory() as kept:
        y = F.linear(x, weight)
        (y * y).sum()
    assert kept.bytes == 4 * (x.numel() + weight.numel() + y.numel())


def test_kronecker_statistics_unfold_no_patch():
    x = torch.randn(16, 32, 32, 32)

    def peak(features):
        transform = FeatureWhitening(features=features, max_rows=None)
        layer = WhitenedConv2d(32, 32, 3, padding=1, bias=False, transform=transform)
        gradient = torch.zeros_like(layer.weight)
        with torch.no_grad(), PeakMemory() as memory:
            layer.transform.observe(x, gradient)
        return memory.peak / (x.numel() * x.element_size())

    # Of the input's own size at a time: its rows and what centring makes of them, or an image beside
    # its two shifted views. A patch matrix alone is nine.
    assert peak("kronecker") < 4.5
    assert peak("patch") > 9
