"""The benchmark of covariance pooling on small maps and few steps; interrupted; wrong options; its truth."""

import pytest
import torch
from torch import nn

from benchmarks import convergence, pooling, training
from benchmarks.data import Images

from . import results

NAMES = ["average", "eigh", "newton_schulz", "pade"]
FEW = ["--channels", "3", "12", "--sides", "2", "--samples", "2", "--budget", "0.01"]


@pytest.fixture
def small(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    part = torch.randn(16, 3, 8, 8, generator=generator), torch.arange(16) % 8
    monkeypatch.setitem(pooling.DATASETS, "crops", lambda: Images(part, part, 8))
    for module in (convergence, training):
        monkeypatch.setattr(module, "SMOOTHING", 2)


def test_a_run_leaves_tables_a_file_and_plots(tmp_path, capsys, small):
    trained = ["--epochs", "1", "--batch-size", "8", "--seeds", "0", "1"]
    assert pooling.main([*FEW, *trained, "--out", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert "milliseconds of forward and backward" in output and "steps to average" in output
    result = results(tmp_path)
    full, thin = result["roots"]
    assert (full["channels"], thin["channels"]) == (3, 12) and full["positions"] == thin["positions"] == 4
    for kind in pooling.KINDS:
        assert list(full[kind]) == list(thin[kind]) == [pooling.BASELINE, *pooling.METHODS]
    # float32 rounds to 6e-8, and a few steps do not come that near to the root.
    assert thin["output_error"]["eigh"] < 1e-5 and thin["gradient_error"]["eigh"] < 1e-3
    assert min(thin["output_error"][name] for name in ("newton_schulz", "pade")) > 1e-5
    line = next(line.split() for line in output.splitlines() if line.split()[:2] == ["12", "4"])
    assert line[2] == f"{1e3 * thin['forward'][pooling.BASELINE]:.2f}"
    rows = result["convergence"]["rows"]
    assert [row["variant"] for row in rows] == NAMES * 2 and {row["steps"] for row in rows} == {2}
    assert len(result["convergence"]["medians"]) == 4
    assert [len(table["cells"]) for table in result["tables"]] == [3, 3, 3, 3, 13]
    for name in ("roots", "curves"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_the_truth_has_the_gradient_of_its_output():
    """Of full rank by autograd through the singular values; in few positions by differences."""
    torch.manual_seed(0)
    for maps in (pooling.draw_maps(2, 4, 4).double(), pooling.draw_maps(1, 6, 2).double()):
        channels = maps.shape[1]
        grad_output = torch.randn(len(maps), channels * (channels + 1) // 2).double()
        output, grad = pooling.truth(maps, grad_output)
        direction = torch.randn_like(maps)
        ahead, behind = (pooling.truth(maps + eps * direction, grad_output)[0] for eps in (1e-6, -1e-6))
        torch.testing.assert_close(
            ((ahead - behind) * grad_output).sum() / 2e-6, (grad * direction).sum(), rtol=1e-5, atol=1e-5
        )
        _, covariances = pooling.centred_covariance(maps)
        for row, covariance in zip(output, covariances, strict=True):
            root = torch.zeros_like(covariance)
            rows, columns = torch.triu_indices(channels, channels)
            root[rows, columns] = root[columns, rows] = row
            torch.testing.assert_close(root @ root, covariance, rtol=1e-9, atol=1e-9)


def test_what_is_wrong_is_not_timed(monkeypatch):
    pooling.check()
    right = pooling.autograd_pooling
    monkeypatch.setattr(pooling, "autograd_pooling", lambda maps: 1.1 * right(maps))
    with pytest.raises(AssertionError, match="autograd is not exact"):
        pooling.check()


def test_networks_differ_in_their_pooling_alone():
    made = {}
    for name, make in pooling.networks(8).items():
        torch.manual_seed(0)
        made[name] = make()
    assert list(made) == NAMES
    average = made.pop("average")
    for name, network in made.items():
        assert network.avgpool.method == name and network.fc.in_features == 64 * 65 // 2
        assert torch.equal(network.layer3[0].conv1.weight, average.layer3[0].conv1.weight)
        assert network(torch.randn(2, 3, 32, 32)).shape == (2, 8)
    assert isinstance(average.avgpool, nn.AdaptiveAvgPool2d)


def test_quick_is_short_and_an_interrupt_keeps_what_was_measured(tmp_path, capsys, monkeypatch):
    def train(network, data, *, curve, **options):
        curve.losses, curve.seconds = [1.0] * 30, [0.0] * 30
        seen.append(options["epochs"])
        if len(seen) == 2:
            raise KeyboardInterrupt

    seen = []
    monkeypatch.setattr(convergence, "train", train)
    assert pooling.main(["--quick", "--only", "convergence", "--out", str(tmp_path)]) == 130
    assert "interrupted" in capsys.readouterr().err and seen == [1, 1]
    result = results(tmp_path)
    assert result["interrupted"] and result["roots"] == []
    assert [row["variant"] for row in result["convergence"]["rows"]] == NAMES[:2]
    assert pooling.Options().settled().epochs == 5 and pooling.Options(dataset="digits").settled().epochs == 20


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (["--sides", "1"], "--sides 1: a map needs at least 2 positions"),
        (["--channels", "0"], "argument --channels: invalid"),
        (["--batch-size", "100000"], "--batch-size 100000: crops has 6400 training images"),
    ],
)
def test_a_wrong_option_is_one_line(arguments, complaint, capsys):
    with pytest.raises(SystemExit) as ended:
        pooling.main(arguments)
    assert ended.value.code == 2 and complaint in capsys.readouterr().err
