"""The calls of a step are counted, and stay few."""

from benchmarks import calls

from . import results


def test_a_step_makes_few_calls_and_changes_of_file(tmp_path, capsys):
    assert calls.main(["--out", str(tmp_path)]) == 0
    quiet, refresh = results(tmp_path)["rows"]
    # Every batch is observed: rows are sampled and kept, two norms measured, and one taken into its statistics.
    assert 0 < quiet["calls"] < 130 and 0 < quiet["changes"] < 32
    assert quiet["calls"] < refresh["calls"] <= 868 / 2 and quiet["changes"] < refresh["changes"] < 60
    assert f"{refresh['calls']}" in capsys.readouterr().out
