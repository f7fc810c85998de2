"""The distributed benchmark on a small network: what is put on paper is what was counted."""

import pytest

from benchmarks import distributed

from . import results


def test_a_run_leaves_a_table_and_a_file(tmp_path, capsys):
    arguments = ["--model", "cifar-resnet20", "--ranks", "1", "2", "--image-size", "16", "--out", str(tmp_path)]
    assert distributed.main(arguments) == 0
    output = capsys.readouterr().out
    assert "7B decoder" in output and "bytes a step = " in output
    result = results(tmp_path)
    alone, two = result["counted"]
    assert alone["statistics_bytes"] == alone["outcome_bytes"] == alone["messages_in_a_refresh"] == 0
    assert two["messages_in_other_steps"] == 0 and two["messages_in_a_refresh"] == 6
    assert two["operations"] == alone["operations"] and two["busiest"] < 0.6
    (paper, _) = result["paper"].values()
    # Beside the sums on paper there are who is there (16 bytes) and what is wanted: a byte for each of 25 factors, two
    # of the five layers whose patches are not whitened whole, and for 20 norms.
    assert two["statistics_bytes"] == paper[0]["statistics_bytes"] + 16 + 25 + 20
    assert two["outcome_bytes"] == paper[0]["outcome_bytes"]
    assert two["gradient_bytes_a_step"] * 2 * 7 / 8 == pytest.approx(paper[0]["gradient_bytes_a_step"])
    assert two["extra"] < 0.5
