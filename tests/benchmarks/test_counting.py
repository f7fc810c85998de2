"""Counts of operations and bytes, against those that are known."""

import pytest
import torch
import torch.nn.functional as F

from benchmarks.counting import PAPER, Counting, Peaks, measure_peaks

PEAKS = Peaks(operations=1e9, cache=1e9, memory=1e8)


def counted(call):
    with Counting() as counting:
        call()
    return counting


def test_a_product_takes_two_operations_for_each_of_its_terms():
    first, second = torch.randn(20, 30), torch.randn(30, 40)
    counting = counted(lambda: first @ second)
    assert counting.operations == 2 * 20 * 30 * 40 and counting.calls == 1
    assert counting.bytes == 4 * (20 * 30 + 30 * 40 + 20 * 40)
    assert counting.least_seconds(PEAKS) == pytest.approx(max(counting.operations, counting.bytes) / 1e9)


def test_what_a_view_does_costs_nothing():
    square = torch.randn(8, 8)
    counting = counted(lambda: square.view(64).unsqueeze(0).transpose(0, 1)[3:])
    assert counting.bytes == counting.operations == counting.least_seconds(PAPER["h100"]) == 0 and counting.calls > 0


def test_an_operation_in_place_reads_and_writes():
    square = torch.randn(8, 8)
    assert counted(lambda: square.mul_(2)).bytes == 2 * square.nbytes


@pytest.mark.parametrize("call, each", [(torch.linalg.eigh, 9), (torch.linalg.cholesky, 1 / 3)])
def test_decompositions_are_counted(call, each):
    matrices = torch.eye(32).repeat(5, 1, 1)
    assert counted(lambda: call(matrices)).operations == pytest.approx(each * 5 * 32**3, abs=1)


def test_a_backward_pass_counts_too():
    images, weight = torch.randn(2, 3, 8, 8, requires_grad=True), torch.randn(4, 3, 3, 3, requires_grad=True)
    forward = 2 * 2 * 8 * 8 * 4 * 27
    counting = counted(lambda: F.conv2d(images, weight, padding=1).sum().backward())
    assert counting.operations == 3 * forward  # the product, and one for each gradient


def test_what_is_larger_than_a_cache_comes_from_memory():
    large = torch.zeros(2**20)
    assert counted(large.clone).least_seconds(PEAKS) == pytest.approx(2 * large.nbytes / PEAKS.memory)


def test_a_device_on_paper_has_a_speed_for_each_kind_of_call():
    paper = Peaks(operations=1e9, cache=1e30, memory=1e30, half=1e10, decompositions=0.1, call=1e-6)
    square = torch.randn(64, 64)
    product, decomposition = 2 * 64**3, 9 * 64**3
    assert counted(lambda: square @ square).least_seconds(paper) == pytest.approx(product / 1e9)
    rounded = square.bfloat16()
    assert counted(lambda: rounded @ rounded).least_seconds(paper) == pytest.approx(product / 1e10)
    assert counted(lambda: torch.linalg.eigh(square)).least_seconds(paper) >= decomposition / 1e8
    assert counted(lambda: (square.add_(1), square.add_(1))).least_seconds(paper) == pytest.approx(2e-6)


def test_peaks_are_those_of_a_machine():
    peaks = measure_peaks(torch.device("cpu"), size=128, bytes_in_memory=2**22)
    assert peaks.operations > 1e8 and peaks.cache >= peaks.memory > 1e7
