"""The complexity benchmark on small cases."""

import json

import pytest

from benchmarks import complexity


def test_a_run_leaves_two_tables_a_file_and_a_plot(tmp_path, capsys):
    grid = ["--batches", "8", "64", "--outputs", "4", "--features", "16", "--sizes", "16", "48", "--largest", "16"]
    assert complexity.main([*grid, "--rank", "4", "--out", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert "within 2×" in output and "exponent" in output
    result = json.loads((tmp_path / "results.json").read_text())
    assert [cell["predicted"] for cell in result["transformation"]] == [4 / 16, 4 / 128]
    for cell in result["transformation"]:
        # 2 B M² multiplications for the samples, S M² and a few S M for the gradient.
        assert cell["multiplications_samples"] == 2 * cell["B"] * 16**2
        assert cell["counted"] == pytest.approx(cell["predicted"] * (1 + 3 / 16))
        assert cell["measured"] == cell["seconds_gradient"] / cell["seconds_samples"]
    assert set(result["refresh"]["16"]) == {"cholesky", "eigh", "newton_schulz", "recursive"}
    assert set(result["refresh"]["48"]) == {"cholesky", "recursive"}
    assert result["exponents"]["exponent"]["eigh"] is None and result["exponents"]["exponent"]["recursive"] > -5
    assert (tmp_path / "complexity.png").read_bytes().startswith(b"\x89PNG")


def test_the_exponent_is_the_slope():
    assert complexity.exponent({10: 1.0, 100: 1e2, 1000: 1e4}) == pytest.approx(2)


def test_where_a_factor_is_off_the_table_says_which_products_are_slow():
    assert complexity.agreement({"predicted": 1.0, "measured": 1.9}) == "yes"
    assert "gradient's products run at 0.25" in complexity.agreement({"predicted": 1.0, "measured": 4.0})
    assert "samples' products run at 0.10" in complexity.agreement({"predicted": 1.0, "measured": 0.1})


def test_a_wrong_option_ends_with_one_line(capsys):
    with pytest.raises(SystemExit) as ended:
        complexity.main(["--sizes", "64", "--largest", "32"])
    assert ended.value.code == 2 and "--largest 32: --sizes begins at 64" in capsys.readouterr().err
