"""The benchmark of inverse roots on small covariances; wrong options."""

import pytest
import torch

from benchmarks import inverse_roots

from . import results


def test_a_run_leaves_two_tables_and_a_file(tmp_path, capsys):
    arguments = ["--sizes", "6", "--conditions", "10", "1000", "--iterations", "3", "15", "--seeds", "0"]
    assert inverse_roots.main([*arguments, "--budget", "0.01", "--out", str(tmp_path)]) == 0
    rows = results(tmp_path)["rows"]
    assert [row["condition"] for row in rows] == [10, 1000]
    for row in rows:
        assert list(row["rounding"]) == ["single 3", "coupled 3", "single 15", "coupled 15"]
        assert list(row["exact"]) == list(row["seconds"]) == ["eigenvectors", "coupled 3", "coupled 15"]
        # Rounding of 6e-8 times the condition number; three steps are no root.
        assert max(row["rounding"]["coupled 15"]) < 1e-6 * row["condition"]
        assert max(row["exact"]["eigenvectors"]) < 1e-6 * row["condition"] < max(row["exact"]["coupled 3"])
    line = next(line.split() for line in capsys.readouterr().out.splitlines() if "ms" in line and "1000" in line)
    assert line[2] == f"{rows[1]['exact']['eigenvectors'][0]:.0e},"


def test_what_is_wrong_is_not_measured(monkeypatch):
    inverse_roots.check()
    right = inverse_roots.by_single_steps
    monkeypatch.setattr(inverse_roots, "by_single_steps", lambda *given: tuple(1.1 * one for one in right(*given)))
    with pytest.raises(AssertionError):
        inverse_roots.check()


def test_a_covariance_is_drawn_as_asked():
    covariance, grad = inverse_roots.draw(7, 100.0, 0)
    values = torch.linalg.eigvalsh(covariance)[0]
    torch.testing.assert_close(values, torch.logspace(-2, 0, 7).double(), rtol=1e-6, atol=0)
    assert grad.shape == covariance.shape == (1, 7, 7)


def test_a_wrong_option_is_one_line(capsys):
    with pytest.raises(SystemExit) as ended:
        inverse_roots.main(["--conditions", "0.5"])
    assert ended.value.code == 2 and "--conditions 0.5: a condition number is at least 1" in capsys.readouterr().err
