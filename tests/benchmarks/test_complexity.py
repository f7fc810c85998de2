"""The complexity benchmark on small cases."""

import pytest

from benchmarks import complexity

from . import results


def test_a_run_leaves_two_tables_a_file_and_a_plot(tmp_path, capsys):
    grid = ["--batches", "8", "64", "--outputs", "4", "--features", "16", "--sizes", "16", "48", "--largest", "16"]
    assert complexity.main([*grid, "--rank", "4", "--out", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert "within 2×" in output and "exponent" in output
    result = results(tmp_path)
    assert [cell["predicted"] for cell in result["transformation"]] == [4 / 16, 4 / 128]
    for cell in result["transformation"]:
        # 2 B M² multiplications for the samples, S M² and a few S M for the gradient.
        assert cell["multiplications_samples"] == 2 * cell["B"] * 16**2
        assert cell["counted"] == pytest.approx(cell["predicted"] * (1 + 2 / 16))
        assert cell["measured"] == cell["seconds_gradient"] / cell["seconds_samples"]
    assert set(result["refresh"]["16"]) == {"cholesky", "eigh", "newton_schulz", "recursive"}
    assert set(result["refresh"]["48"]) == {"cholesky", "recursive"}
    (row,) = [line.split("  ") for line in output.splitlines() if line.strip().startswith("48  ")]
    filled = [cell.strip() for cell in row if cell.strip()]
    times = [f"{1e3 * result['refresh']['48'][name]['inverse']:.2f}" for name in ("cholesky", "recursive")]
    assert [cell.split(" ")[0] for cell in filled[1:3]] == times  # and nothing under eigh
    assert result["exponents"]["exponent"]["eigh"]["inverse"] is None
    assert (tmp_path / "complexity.png").read_bytes().startswith(b"\x89PNG")


def test_the_exponent_is_the_slope():
    assert complexity.exponent({10: 1.0, 100: 1e2, 1000: 1e4}) == pytest.approx(2)


def test_where_a_factor_is_off_the_table_says_which_products_are_slow():
    def cell(gradient, alone, samples=1.0):
        times = {"seconds_gradient": gradient, "seconds_gradient_alone": alone, "seconds_samples": samples}
        return {"predicted": 1.0, "measured": gradient / samples, **times}

    assert complexity.agreement(cell(1.9, 1.0)) == "yes"
    assert (
        complexity.agreement(cell(4.0, 1.0)) == "no, 4.0×; alone 1.0×: the samples turn its operands out of the cache"
    )
    assert complexity.agreement(cell(4e-5, 4e-5, 1e-5)) == "no, 4.0×; alone 4.0×: too short to fill the machine"
    assert complexity.agreement(cell(0.1, 0.1)) == "no, 0.1×; alone 0.1×"


def test_another_power(tmp_path, capsys):
    grid = ["--batches", "8", "--outputs", "4", "--features", "16", "--sizes", "16", "--power", "0.5"]
    assert complexity.main([*grid, "--out", str(tmp_path)]) == 0
    assert "cholesky" not in capsys.readouterr().out
    result = results(tmp_path)
    assert set(result["refresh"]["16"]) == {"eigh", "newton_schulz", "recursive"}
