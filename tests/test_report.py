"""The report: condition numbers, counts, memory, what is not whitened."""

import json

import pytest
import torch
from torch import nn

from whiten_layers import FeatureWhitening, WhitenedLinear, report, whiten

from . import reference


def test_condition_numbers_are_those_of_the_covariance_before_and_after():
    layer = WhitenedLinear(
        4, 3, dtype=torch.float64, transform=FeatureWhitening.exact(power=0.5, damping=0.0, decay=0.0)
    )
    x = torch.randn(500, 4, dtype=torch.float64) * torch.tensor([1.0, 2.0, 4.0, 8.0])
    layer(x).sum().backward()
    (row,) = report(layer).rows
    values = torch.linalg.eigvalsh(x.T.cov(correction=0))
    assert row.condition == pytest.approx((values[-1] / values[0]).item())
    assert row.whitened == pytest.approx(row.condition**0.5)
    assert (row.layer, row.factor, row.groups, row.size) == ("the model", "inputs", 1, 4)
    assert (row.batches, row.skipped, row.refreshes, row.failed) == (1, 0, 1, 0)


def test_counts_memory_and_what_is_left(tmp_path):
    model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.Flatten(), nn.Linear(24, 3), nn.Embedding(3, 3))
    whiten(model, FeatureWhitening(features="kronecker", output_power=0.5), skip="2")
    model[:3](torch.randn(5, 4, 4, 4)).sum().backward()
    model[:3](torch.full((5, 4, 4, 4), float("nan"))).sum().backward()
    result = report(model)
    assert [(row.layer, row.factor, row.groups, row.size) for row in result.rows] == [
        ("0", "channels", 2, 2),
        ("0", "taps", 2, 9),
        ("0", "outputs", 2, 3),
    ]
    assert {row.batches for row in result.rows} == {2} and {row.skipped for row in result.rows} == {1}
    assert result.left == {
        "2": "Linear, not asked for",
        "3": "Embedding, whose covariance is diagonal: what an adaptive optimizer does already",
    }
    assert result.bytes == sum(buffer.nbytes for factor in model[0].transform.factors() for buffer in factor.buffers())
    assert json.loads(json.dumps(result.to_dict()))["rows"][1]["factor"] == "taps"
    text = str(result)
    assert "2 × 9" in text and "not whitened: 2 (Linear, not asked for)" in text
    result.plot(tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def test_blocks_are_shown_and_measured_together():
    transform = FeatureWhitening.exact(damping=0.0, decay=0.0, block_size=2)
    layer = WhitenedLinear(5, 3, dtype=torch.float64, transform=transform)
    x = torch.randn(500, 5, dtype=torch.float64) * torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0])
    layer(x).sum().backward()
    (row,) = report(layer).rows
    covariance = reference.block_diagonal(x.T.cov(correction=0), 2)
    values = torch.linalg.eigvalsh(covariance)
    assert row.condition == pytest.approx((values[-1] / values[0]).item())
    assert row.whitened == pytest.approx(1)
    assert (row.groups, row.blocks, row.size) == (1, 3, 2) and "3 × 2" in str(report(layer))


def test_a_layer_that_has_seen_nothing_has_no_condition():
    assert report(WhitenedLinear(3, 2)).rows[0].condition == float("inf")
