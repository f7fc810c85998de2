import json

import pytest

from benchmarks.soak import NOT_COMPILED, WITH_MARK, WITHOUT_MARK, main


def rows(folder, *arguments):
    assert main([*map(str, arguments), "--out", str(folder)]) == 0
    return json.loads((folder / "results.json").read_text())["rows"]


def check(rows, faults, left_out=()):
    none, without, everything = rows
    assert none["faults"] == 0 and min(without["faults"], everything["faults"]) > faults
    assert set(without["by_fault"]) == {*WITHOUT_MARK} - {*left_out}
    assert set(everything["by_fault"]) == {*WITHOUT_MARK, *WITH_MARK} - {*left_out}
    assert without["difference"] == 0 < everything["difference"]
    for row in rows:
        assert row["is_finite"] and row["least"] > 0 and row["loss"] < 0.2  # 1.39 at the start


def test_a_short_run_leaves_no_mark_and_no_memory(tmp_path):
    measured = rows(tmp_path, "--steps", 300, "--every", 3, "--traced")
    check(measured, 60)
    # What is kept for each step, its loss and now and then a check, takes less; a tensor or a graph that is kept, more.
    assert all(row["grown_kib"] < 240 for row in measured)


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_twenty_thousand_steps_leave_no_mark_and_no_memory(tmp_path, compiled):
    measured = rows(tmp_path, *(["--compiled"] if compiled else []))
    check(measured, 800, left_out=NOT_COMPILED if compiled else ())
    # Of 16,000 steps; the allocator's own pools move by some MiB
    assert all(row["grown_mib"] < 16 for row in measured)
