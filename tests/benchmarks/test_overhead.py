"""The step-time benchmark on a few small steps."""

import json

from benchmarks import overhead


def test_it_compares_in_one_run(tmp_path, capsys):
    arguments = ["--batch-size", "2", "--size", "8", "--stretches", "2", "--decay", "0.5", "--update-interval", "2"]
    assert overhead.main([*arguments, "--statistics-interval", "2", "--out", str(tmp_path)]) == 0
    assert "ratio" in capsys.readouterr().out
    result = json.loads((tmp_path / "results.json").read_text())
    assert len(result["ratios"]) == 2 and len(result["seconds"]["plain"]) == len(result["seconds"]["whitened"]) == 4
