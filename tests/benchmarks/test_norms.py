"""The benchmark of normalizations on small shapes and few steps; interrupted; wrong options."""

import pytest
import torch

from benchmarks import convergence, norms, training
from benchmarks.data import Images

from . import results

SHAPES = ["--shapes", "4x8x4", "8x72", "--memory-shapes", "4x80x4", "--budget", "0.01"]
NAMES = ["BN", "IterNorm", "DBN", "SWBN kl 1e-05", "SWBN frobenius 1e-05"]


@pytest.fixture
def small(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    part = torch.randn(16, 3, 8, 8, generator=generator), torch.arange(16) % 8
    for name in norms.DATASETS:
        monkeypatch.setitem(norms.DATASETS, name, lambda: Images(part, part, 8))
    for module in (convergence, training):
        monkeypatch.setattr(module, "SMOOTHING", 2)


def test_a_run_leaves_tables_a_file_and_plots(tmp_path, capsys, small):
    few = ["--epochs", "1", "--batch-size", "8", "--seeds", "0", "--step-size", "1e-5"]
    assert norms.main([*SHAPES, *few, "--out", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert "SWBN / IterNorm 64" in output and "peak MiB" in output and "steps to BN" in output
    result = results(tmp_path)
    images, vectors = result["time"]
    assert images["shape"] == [4, 8, 4, 4] and vectors["shape"] == [8, 72]
    assert list(vectors["step"]) == list(vectors["forward"]) == list(norms.VARIANTS)
    assert list(images["step"]) == [name for name in norms.VARIANTS if not name.endswith(" all")]  # 64 is all of 8
    line = next(line.split() for line in output.splitlines() if "8×72" in line)
    ratio = vectors["step"]["SWBN kl all"] / vectors["step"]["IterNorm all"]
    assert line[-2] == f"{ratio:.2f}"
    for name in norms.DATASETS:
        trained = result["convergence"][name]
        assert [row["variant"] for row in trained["rows"]] == NAMES
        assert all(row["steps"] == 2 and row["lr"] == 0.1 for row in trained["rows"])
        losses = [curve["losses"] for curve in trained["curves"]]
        # The same weights and the same batch: SWBN begins, as good as, where BN does.
        assert losses[0][0] == pytest.approx(losses[3][0], rel=0.01) and losses[0][0] != losses[3][0]
        assert losses[0][0] != pytest.approx(losses[1][0], rel=0.01)
    for name in ("times", "curves"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_memory_is_counted(tmp_path):
    assert norms.main([*SHAPES, "--only", "memory", "--out", str(tmp_path)]) == 0
    rows = {row["variant"]: row for row in results(tmp_path)["memory"]}
    assert list(rows) == list(norms.VARIANTS)
    size = rows["BN"]["input"]
    assert size == 4 * 4 * 80 * 4 * 4 and {row["input"] for row in rows.values()} == {size}
    assert 2 * size < rows["BN"]["peak"] < 2.5 * size  # the output and the input's gradient
    # Of 80 channels saved are the input and matrices: IterNorm's V and Σ, SWBN's V.
    for name, matrices in [("IterNorm all", 2), ("SWBN kl all", 1)]:
        assert 0 < rows[name]["saved"] - size - matrices * 4 * 80**2 < 0.1 * size
    assert set(path.name for path in tmp_path.iterdir()) == {"results.json"}


def test_what_is_wrong_is_not_timed(monkeypatch):
    monkeypatch.setattr(norms, "whitened", lambda variant, covariance: 1.1 * torch.eye(covariance.shape[-1])[None])
    with pytest.raises(AssertionError):
        norms.times((64, 8), 0.01)


def test_the_best_rate_of_batch_norm_is_used_and_an_interrupt_keeps_what_was_measured(tmp_path, capsys, monkeypatch):
    def train(network, data, *, lr, curve, **options):
        curve.losses, curve.seconds = [1 + abs(lr - 0.2)] * 30, [0.0] * 30
        seen.append((type(network.bn1).__name__, options["epochs"]))
        if len(seen) == 4:
            raise KeyboardInterrupt

    seen = []
    monkeypatch.setattr(convergence, "train", train)
    arguments = ["--only", "convergence", "--dataset", "digits", "--lr", "0.1", "0.2", "--seeds", "0"]
    assert norms.main([*arguments, "--out", str(tmp_path)]) == 130
    assert "interrupted" in capsys.readouterr().err
    assert seen == [(name, 20) for name in ("BatchNorm2d", "BatchNorm2d", "IterNorm2d", "DecorrelatedBatchNorm2d")]
    result = results(tmp_path)
    assert result["interrupted"] and result["time"] == result["memory"] == []
    assert [row["lr"] for row in result["convergence"]["digits"]["rows"]] == [0.1, 0.2, 0.2, 0.2]
