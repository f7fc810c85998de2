"""The calls of a step are counted, and stay few: half of what they were when each concept got its room."""

from benchmarks import calls

from . import results


def test_a_step_makes_few_calls_and_changes_of_file(tmp_path, capsys):
    assert calls.main(["--out", str(tmp_path)]) == 0
    quiet, refresh = results(tmp_path)["rows"]
    assert 0 < quiet["calls"] < 65 and 0 < quiet["changes"] < 32
    assert quiet["calls"] < refresh["calls"] <= 868 / 2 and quiet["changes"] < refresh["changes"] <= 75 / 2
    assert f"{refresh['calls']}" in capsys.readouterr().out
