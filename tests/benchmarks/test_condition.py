"""The condition benchmark on small cases: what it prints is what it measured."""

import pytest
import torch

from benchmarks import condition
from benchmarks.data import Images

from ..reference import with_spectrum
from . import results


def test_a_run_leaves_a_table_a_file_and_a_plot(tmp_path, capsys, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(128, 3, 32, 32, generator=generator).cumsum(-1) / 5, torch.arange(128) % 8
    monkeypatch.setitem(condition.DATASETS, "crops", lambda: Images(images, images, 8))
    arguments = ["--sizes", "24", "--epochs", "1", "--refreshes", "5", "--rank", "4", "--out", str(tmp_path)]
    assert condition.main(arguments) == 0
    output = capsys.readouterr().out
    assert "textbook" in output and "ResNet-20, worst" in output and "after 5" in output and "after 10" not in output
    result = results(tmp_path)
    layers = [case for case in result["cases"] if case["kind"] == "layer"]
    assert len(layers) == 20 and {case["size"] for case in layers} >= {27, 144, 288, 576, 64}
    for case in result["cases"]:
        runs = {(run["method"], run["power"]): run for run in case["runs"]}
        for name in ("cholesky", "eigh", "newton_schulz"):
            # Rounding of 6e-8 times a condition number of up to a few thousand, in a matrix of hundreds of rows.
            assert runs[name, 1.0]["after"]["1"]["condition"] == pytest.approx(1, rel=0.02)
        assert runs["eigh", 0.5]["after"]["1"]["condition"] == pytest.approx(case["before"] ** 0.5, rel=0.02)
        after = [value["condition"] for value in runs["recursive", 1.0]["after"].values()]
        assert after[-1] < case["before"]
    assert (tmp_path / "condition.png").read_bytes().startswith(b"\x89PNG")


def test_the_textbook_recursion_whitens_its_directions():
    torch.manual_seed(0)
    covariance = with_spectrum(1 / torch.arange(1, 41))[None]
    last = condition.textbook(covariance, 1.0, None, 4)
    values = torch.linalg.eigvals(last.matrix[0] @ covariance[0]).real
    assert ((values - 1).abs() < 1e-9).sum() == 4
    assert condition.condition(last.matrix, covariance) == pytest.approx((values.max() / values.min()).item())
