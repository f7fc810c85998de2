"""The step-time benchmark on a few small steps."""

from functools import partialmethod

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from benchmarks import overhead
from whiten_layers import WhitenedConv2d, whiten
from whiten_layers.refresh.schedule import last_refresh
from whiten_layers.statistics.whitening_factor import WhiteningFactor

from . import results

QUICK = ["--batch-size", "2", "--decay", "0.5", "--update-interval", "2", "--statistics-interval", "2"]


def run(folder, *arguments):
    assert overhead.main([*QUICK, "--out", str(folder), *arguments]) == 0
    return results(folder)


def test_it_compares_in_one_run(tmp_path, capsys):
    result = run(tmp_path, "--size", "8", "--stretches", "2")
    output = capsys.readouterr().out
    assert "ratio eager" in output and "samples a second" in output and "not measured" in output  # memory, on a CPU
    assert len(result["ratios"]["eager"]) == 2 and not result["peak_bytes"]
    steps = {name: len(seconds) for name, seconds in result["seconds"].items()}
    assert steps == {"plain eager": 4, "whitened eager": 4}


def test_a_breakdown_leaves_out_one_part_after_the_other(tmp_path):
    result = run(tmp_path, "--size", "8", "--stretches", "1", "--breakdown")
    kinds = ("plain", "whitened", "transform and statistics", "transform")
    assert list(result["seconds"]) == [f"{kind} eager" for kind in kinds]
    step, whole, *parts = result["parts"]
    assert [part["name"] for part in (step, whole, *parts)] == [
        "plain step",
        "whitening",
        "refreshes",
        "statistics",
        "transform",
    ]
    for number in ("seconds", "operations", "bytes", "calls", "least"):
        assert sum(part[number] for part in parts) == pytest.approx(whole[number])
    assert step["operations"] > 0 < whole["operations"] and all(part["calls"] > 0 for part in parts)
    seen = {}
    for kind, left_out in overhead.PARTS.items():
        layer = whiten(nn.Sequential(nn.Linear(3, 2)))[0]
        overhead.leave_out(layer, left_out, batches=1000)
        for _ in range(100):
            layer(torch.randn(5, 3)).sum().backward()
        factor = layer.transform.inputs
        seen[kind] = factor.num_refreshes > 0, factor.num_refreshes > 0 or factor.window is not None
    assert seen == {"whitened": (True, True), "transform and statistics": (False, True), "transform": (False, False)}


def test_the_same_calls_are_estimated_for_a_device_that_is_not_here(tmp_path, capsys):
    result = run(tmp_path, "--model", "mlp", "--stretches", "1", "--simulate", "h100")
    output = capsys.readouterr().out
    assert "on paper, by h100, where no number is read: 45 Tflop/s in float32 products, 600 in 16 bits" in output
    assert "5 µs a call" in output and torch.ones(1).is_cpu
    step, whole, *parts = result["parts"]
    for number in ("elsewhere", "elsewhere_without_calls"):
        assert sum(part[number] for part in parts) == pytest.approx(whole[number]) and step[number] > 0
    # At this size a kernel's call takes longer than what it computes; views call none.
    assert 0.5 * step["calls"] < step["elsewhere"] / 5e-6 < step["calls"]
    # Where no number is read, tensors stand for the numbers that Python computes with on a CPU.
    assert whole["elsewhere"] / 5e-6 > whole["calls"]


def test_the_slowest_step_of_a_stretch_is_compared_with_its_median():
    assert overhead.slowness([1.0, 2.0, 3.0, 2.0, 2.0, 8.0], 3) == [1.5, 4.0]


@pytest.mark.parametrize("model", overhead.OTHERS)
def test_networks_that_read_no_images(model, tmp_path):
    result = run(tmp_path, "--model", model, "--stretches", "1", "--channels-last")
    assert list(result["seconds"]) == ["plain eager", "whitened eager"] and result["model"] == model


PLACES = [(1, 14), (101, 111), (1, 44), (2001, 2041)]  # the first batch, and the one after the last


def test_refreshes_come_as_rarely_as_after_so_many_batches(tmp_path, monkeypatch):
    refreshed = []
    monkeypatch.setattr(WhiteningFactor, "commit", lambda self, result: refreshed.append(self))
    small = ["--batch-size", "2", "--size", "8", "--stretches", "1", "--decay", "0.5", "--out", str(tmp_path)]
    counts = []
    for batches in ("100", "2000"):
        refreshed.clear()
        assert overhead.main([*small, "--batches", batches]) == 0
        steps = len(results(tmp_path)["seconds"]["whitened eager"])
        counts.append((steps, refreshed.count(refreshed[0])))
    # A gradient is compared with the plain one, and two batches more than a cycle warm the network up.
    due = [sum(last_refresh(batch, "auto") == batch for batch in range(first, last)) for first, last in PLACES]
    assert counts == [(10, due[0] + due[1]), (40, due[2] + due[3])]


def test_a_network_for_imagenet_in_bfloat16_and_channels_last(tmp_path, monkeypatch):
    seen = []
    gradients = overhead.gradients

    def watched(network, *batch):
        def see(layer, inputs, output):
            lies = [one.is_contiguous(memory_format=torch.channels_last) for one in (inputs[0], layer.weight)]
            seen.append((type(layer), output.dtype, *lies))

        with network.conv1.register_forward_hook(see):
            return gradients(network, *batch)

    monkeypatch.setattr(overhead, "gradients", watched)
    small = ["--model", "resnet18", "--size", "32", "--stretches", "1", "--block-size", "32"]
    result = run(tmp_path, *small, "--precision", "bf16", "--channels-last")
    assert seen == [(layer, torch.bfloat16, True, True) for layer in (nn.Conv2d, WhitenedConv2d)]
    assert result["precision"] == "bf16" and result["channels_last"]


@pytest.mark.filterwarnings("ignore")  # the compilers of some versions warn of themselves
def test_compiled_and_not_in_one_run(tmp_path, monkeypatch, capsys):
    torch._dynamo.reset()
    counters.clear()
    # The graphs are inductor's, without the minute that it takes to compile them.
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="aot_eager"))
    result = run(tmp_path, "--size", "8", "--stretches", "1", "--compile", "both")
    kinds = ("plain", "whitened")
    assert list(result["seconds"]) == [f"{kind} {mode}" for mode in ("eager", "compiled") for kind in kinds]
    assert "ratio eager" in (output := capsys.readouterr().out) and "ratio compiled" in output
    assert counters["stats"]["unique_graphs"] == 2


def test_a_chain_of_transforms(tmp_path):
    result = run(tmp_path, "--size", "8", "--stretches", "1", "--transform", "whitening+optimal_gain")
    assert list(result["transform"]) == ["0", "1"] and len(result["seconds"]["whitened eager"]) == 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_compiled_in_bfloat16(tmp_path):
    torch._dynamo.reset()
    result = run(tmp_path, "--size", "8", "--stretches", "1", "--compile", "yes", "--precision", "bf16")
    assert list(result["ratios"]) == ["compiled"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="peak memory is that of a CUDA device")
def test_the_peak_memory_is_that_of_one_network(tmp_path):
    result = run(tmp_path, "--size", "32", "--stretches", "1", "--device", "cuda", "--model", "resnet18")
    plain, whitened = (result["peak_bytes"][f"{kind} eager"] for kind in ("plain", "whitened"))
    resident = 3 * 4 * 11_689_512  # weights, gradients and momentum
    assert resident < plain < whitened < plain + resident  # to which the other's would add


def test_gradients_that_do_not_agree_are_not_timed(tmp_path, monkeypatch):
    monkeypatch.setattr(overhead, "whiten", lambda network, transform: nn.init.zeros_(network.fc.bias))
    with pytest.raises(AssertionError, match=r"the first gradient of conv1.weight is .* of its norm away"):
        run(tmp_path, "--size", "8")
