"""The report: condition numbers, counts, memory, what is not whitened."""

import json
import math
import sys

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
    text = str(report(model, full=True))
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
    result = report(WhitenedLinear(3, 2))
    assert result.rows[0].condition == result.rows[0].whitened == float("inf")
    assert str(result).splitlines()[1:] == ["No batch has been seen yet.", "all 1 rows: report(model, full=True)"]


def trained(model, *, steps=3, spoil=False):
    torch.manual_seed(0)
    for step in range(steps):
        x = torch.randn(8, 6) * torch.tensor([1.0, 1, 1, 1, 10, 100])
        x[0, 0] = float("nan") if spoil and step == 1 else x[0, 0]
        model(x).square().sum().backward()
    return model


def test_a_summary_has_the_worst_ten_rows_and_what_went_wrong():
    torch.manual_seed(0)
    layers = [nn.Linear(6, 40), *(nn.Linear(40, 40) for _ in range(11)), *(nn.LSTM(2, 2) for _ in range(12))]
    model = whiten(nn.Sequential(*layers))
    trained(model[:12], spoil=True)
    result = report(model)
    lines = str(result).splitlines()
    share = sum(p.numel() for p in model[:12].parameters()) / sum(p.numel() for p in model.parameters())
    assert result.share == pytest.approx(share)
    assert lines[0].startswith(f"whitened layers: 12 ({100 * share:.0f} % of the parameters that train, ")
    assert lines[0].endswith("batches: 3; refreshes: 1") and lines[1].startswith("Condition number in the median")
    assert "batches with NaN or Inf were left out: 0, 1, 2, 3, 4, and 7 more" in lines
    assert "fewer rows than features, so whitened but little: 1, 2, 3, 4, 5, and 6 more" in lines
    head = next(i for i, line in enumerate(lines) if line.split()[:2] == ["layer", "factor"])
    shown = [line.split()[0] for line in lines[head + 1 : head + 11]]
    assert shown == [row.layer for row in sorted(result.rows, key=lambda row: -row.condition)[:10]]
    assert lines[head + 11] == "all 12 rows: report(model, full=True)"
    assert lines[head + 12].startswith("not whitened: 12 (LSTM, ") and lines[-1] == "not whitened: 2 more"
    full = str(report(model, full=True)).splitlines()
    assert "restarted" in full[head] and len(full) == len(lines) + 2
    assert all(f"not whitened: {i} (" in "\n".join(full) for i in range(12, 24))


def test_inputs_that_are_white_already_are_said_to_be():
    torch.manual_seed(0)
    layer = WhitenedLinear(4, 3)
    for _ in range(3):
        layer(torch.randn(500, 4)).sum().backward()
    assert "Nearly white already" in str(report(layer)) and "little to gain" in str(report(layer))


def test_spectra_are_the_eigenvalues_of_the_worst_group():
    transform = FeatureWhitening.exact(damping=0.0, decay=0.0, power=0.5)
    conv = whiten(nn.Conv1d(4, 4, 1, groups=2, dtype=torch.float64), transform)
    x = torch.randn(300, 4, 5, dtype=torch.float64) * torch.tensor([1.0, 2.0, 1.0, 8.0], dtype=torch.float64)[:, None]
    conv(x).sum().backward()
    (row,) = report(conv).rows
    covariance = x[:, 2:].transpose(0, 1).flatten(1).cov(correction=0)
    values = torch.linalg.eigvalsh(covariance / covariance.trace() * 2).flip(0)
    ours = torch.tensor(row.spectrum, dtype=torch.float64)
    torch.testing.assert_close(ours / ours.sum(), values / values.sum())
    assert row.whitened_spectrum[0] / row.whitened_spectrum[1] == pytest.approx((values[0] / values[1]).sqrt().item())
    (row,) = report(trained(whiten(nn.Linear(6, 3), "eigenbasis"))).rows[:1]
    assert row.whitened is None and row.whitened_spectrum is None and row.condition > 100


class Board:
    """Stands for TensorBoard's writer."""

    def __init__(self):
        self.written = {}

    def add_scalar(self, name, value, step):
        self.written[name, step] = value


class Run:
    """Stands for a run of Weights & Biases."""

    def __init__(self):
        self.written = {}

    def log(self, values, step):
        self.written |= {(name, step): value for name, value in values.items()}


@pytest.mark.parametrize("writer", [Board, Run])
def test_numbers_are_logged(writer):
    model, written = whiten(nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 2))), writer()
    report(model).log(written, 0)  # nothing is known yet, and nothing infinite is written
    report(trained(model)).log(written, 3)
    row = report(model).rows[1]
    assert written.written["whitening/1/inputs/condition", 3] == row.condition
    assert written.written["whitening/bytes", 0] == report(model).bytes
    assert ("whitening/1/inputs/condition", 0) not in written.written
    assert all(math.isfinite(value) for value in written.written.values())


def test_what_cannot_be_told_is_said():
    assert str(report(nn.Linear(3, 2))).splitlines()[0] == "No layer is whitened: call whiten(model)."
    layer = whiten(nn.Linear(3, 2))
    with pytest.raises(ValueError, match="no batch has been seen: there is nothing to draw"):
        report(layer).plot("report.png")
    for _ in range(2):
        layer(torch.zeros(4, 3)).sum().backward()
    with pytest.raises(ValueError, match="no batch has been seen: there is nothing to draw"):
        report(layer).plot("report.png")
    lines = str(report(layer)).splitlines()
    assert "batches: 2" in lines[0] and lines[1] == (
        "No condition number is known: all inputs were constant, or not finite."
    )
    assert "whitened layers: 1" in str(report(whiten(nn.Linear(3, 2), "optimal_gain")))
    with pytest.raises(ValueError, match="the model is on the meta device: there is nothing to report"):
        report(layer.to("meta"))


def test_a_plot_without_its_library_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match="a plot needs matplotlib: pip install matplotlib"):
        report(trained(whiten(nn.Linear(6, 2)))).plot(tmp_path / "report.png")


def test_a_plot_of_eigenbases_has_no_whitened_values(tmp_path):
    report(trained(whiten(nn.Linear(6, 2), "eigenbasis"))).plot(tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
