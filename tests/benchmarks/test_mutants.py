"""The benchmark that makes mistakes, on a checkout of one small file and its test."""

import json
import subprocess

import pytest

from benchmarks import mutants

SOURCE = '''def half(number: int | None = 3) -> float:
    """Half of it."""
    return number / 2


def slow(number: float) -> float:
    for _ in range(10):
        number = number + 1
    return number
'''
TEST = """from whiten_layers.inverse.halves import half


def test_half():
    assert half(6) == 3 and half() == 1.5
"""


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    for name, text in {
        "whiten_layers/__init__.py": "",
        "whiten_layers/inverse/__init__.py": "",
        "whiten_layers/inverse/halves.py": SOURCE,
        "tests/inverse/test_halves.py": TEST,
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    monkeypatch.setattr(mutants, "ROOT", tmp_path)
    return tmp_path


def test_places_are_those_of_the_rooms_without_annotations(checkout):
    found = mutants.places()
    assert {(one.file, one.line) for one in found} == {("whiten_layers/inverse/halves.py", line) for line in (3, 7, 8)}
    chosen = mutants.drawn(found, 5, 0)
    assert chosen == mutants.drawn(found[::-1], 5, 0) != mutants.drawn(found, 5, 1)
    # / and 2 on line 3; range's loop and 10 on line 7; + and 1 on line 8.
    everything = mutants.drawn(found, 100, 0)
    places = {(one.line, one.column, one.kind.partition("_")[0]) for one in everything}
    assert len(everything) == len(places) == 6


def test_a_mistake_is_noticed_by_the_test_of_its_file_and_taken_back(checkout, capsys, monkeypatch):
    arguments = ["--mutants", "100", "--out", str(checkout / "results")]
    assert mutants.main(arguments) == 0
    result = json.loads((checkout / "results" / "results.json").read_text())
    assert {row["line"]: row["noticed"] for row in result["rows"]} == {3: True, 7: False, 8: False}
    assert result["tables"][0]["cells"][1:] == [["`inverse`", "6", "2", "33.3%"], ["`all`", "6", "2", "33.3%"]]
    assert (checkout / "whiten_layers/inverse/halves.py").read_text() == SOURCE
    monkeypatch.setattr(mutants, "attempt", None)  # what has been tried is not tried again
    assert mutants.main(arguments) == 0
    assert json.loads((checkout / "results" / "results.json").read_text())["rows"] == result["rows"]


def test_a_test_that_fails_anyway_ends_it(checkout, capsys):
    (checkout / "tests/inverse/test_halves.py").write_text(TEST + "    assert False\n")
    with pytest.raises(SystemExit, match="2"):
        mutants.main(["--mutants", "1", "--out", str(checkout / "results")])
    assert "a test fails without any mistake" in capsys.readouterr().err


def test_a_file_is_shown_to_the_test_of_its_name_then_to_its_room():
    first, *others = mutants.tests_for("whiten_layers/statistics/patches.py")
    assert first == "tests/statistics/test_patches.py"
    assert "tests/statistics/test_covariance.py" in others and first not in others
    assert mutants.tests_for("whiten_layers/autograd.py")[0] == "tests/test_autograd.py"
