import json

import pytest
import torch
from torch import nn

from benchmarks import memory
from whiten_layers import FeatureWhitening, estimate, whiten


def network():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(32, 5))


def test_what_is_kept_is_what_a_model_that_has_trained_keeps():
    counted = memory.kept(network, FeatureWhitening())
    model = whiten(network())
    state = sum(buffer.nbytes for buffer in model.buffers()) - sum(buffer.nbytes for buffer in network().buffers())
    assert counted["state"] * 2**20 == state
    # Counters and norms stand beside what `estimate` counts.
    assert counted["state"] * 2**20 == pytest.approx(estimate(network()).bytes, abs=200)
    assert counted["parameters"] * 2**20 == sum(parameter.nbytes for parameter in network().parameters())
    assert counted["state"] < counted["with_window"] < 2 * counted["state"]


def test_a_peak_holds_the_model_its_gradients_and_the_optimizers_state():
    model, inputs, labels = nn.Linear(30, 20, bias=False), torch.randn(4, 30), torch.randint(20, (4,))
    taken = memory.peak(model, inputs, labels, memory.Options(steps=3))
    weights, batch = 3 * model.weight.nbytes, inputs.nbytes + labels.nbytes
    assert weights + batch < taken < weights + batch + 2 * model.weight.nbytes


def test_the_program_writes_both_tables(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "TRAINED", {"MLP": memory.TRAINED["MLP, 64 rows"]})
    assert memory.main(["--steps", "2", "--optimizer", "adamw", "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "results.json").read_text())
    assert [len(table["cells"]) for table in result["tables"]] == [1 + len(memory.KEPT), 2]
    assert result["peaks"][0]["ratio"] > 1
