"""The tables of the pages are those of benchmarks/results, and the generator notices what does not fit."""

import json
import re

import pytest

from benchmarks.tables import ROOT, main

RUN = {
    "command": ["python -m benchmarks.convergence"],
    "environment": {"processor": "Chip", "cores": 2, "python": "3.11", "torch": "2.15"},
    "table": [["", "loss"], ["plain", "0.2"], ["whitened", "0.1"]],
}
SEEDS = [["", "seed", "loss"], ["plain", "0", "0.5"], ["plain", "1", "0.3"], ["plain", "median", "0.4"]]
PAGE = "# Title\n\n<!-- table: one -->\nold\n<!-- end -->\n\nafter\n"
TABLE = """# Title

<!-- table: one -->
|  | loss |
| --- | --- |
| plain | 0.2 |
| whitened | 0.1 |

`python -m benchmarks.convergence`;
on Chip, 2 cores, Python 3.11, torch 2.15
<!-- end -->

after
"""


@pytest.fixture
def root(tmp_path):
    """A checkout with one page, and one file of results."""
    for folder in ("docs", "benchmarks/results"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "README.md").write_text("nothing here\n")
    (tmp_path / "docs" / "page.md").write_text(PAGE)
    (tmp_path / "benchmarks" / "results" / "one.json").write_text(json.dumps(RUN))
    return tmp_path


def test_the_pages_show_what_the_files_hold(capsys):
    assert main(["--check"]) == 0, capsys.readouterr().out
    pages = "\n".join(page.read_text() for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
    named = {name for names in re.findall(r"<!-- table: ([^>,]+) -->", pages) for name in names.split()}
    assert named == {file.stem for file in (ROOT / "benchmarks" / "results").glob("*.json")}


def test_a_table_is_written_and_a_figure_that_changes_is_noticed(root, capsys):
    page, file = root / "docs" / "page.md", root / "benchmarks" / "results" / "one.json"
    assert main(["--check"], root) == 1 and page.read_text() == PAGE
    assert main([], root) == 0 and page.read_text() == TABLE
    assert main(["--check"], root) == 0
    file.write_text(file.read_text().replace("0.1", "0.3"))
    capsys.readouterr()
    assert main(["--check"], root) == 1 and "docs/page.md" in capsys.readouterr().out
    assert main([], root) == 0 and "| whitened | 0.3 |" in page.read_text()


def test_rows_that_end_with_a_cell_are_left_out(root):
    page = root / "docs" / "page.md"
    page.write_text(PAGE.replace("one -->", "one, without 0.2 -->"))
    assert main([], root) == 0
    text = page.read_text()
    assert "| whitened | 0.1 |" in text and "| plain |" not in text and "python -m" not in text


def test_a_run_is_kept_without_what_is_bulky(root, capsys):
    path = root / "results.json"
    tables = [{"title": "other", "cells": [["a"]]}, {"title": "of a run", "cells": SEEDS}]
    path.write_text(json.dumps({"environment": RUN["environment"], "curves": [1], "tables": tables}))
    assert main(["--keep", str(path), "one", "--number", "2", "--label", "A"], root) == 0
    assert "| A: plain | 0.4 |\n\n`python -m benchmarks.convergence`" in (root / "docs" / "page.md").read_text()
    file = json.loads((root / "benchmarks" / "results" / "one.json").read_text())
    assert "curves" not in file and "tables" not in file and file["title"] == "of a run"
    (root / "README.md").write_text("<!-- table: one two -->\n<!-- end -->")
    again = ["--keep", str(path), "two", "--number", "2"]
    assert main(again, root) == 2 and "by --command" in capsys.readouterr().err
    assert main([*again, "--command", "python -m other"], root) == 0
    assert main([*again[:3], "--number", "3"], root) == 2
    assert "there is no table 3 (it has 2)" in capsys.readouterr().err
    assert (root / "README.md").read_text().count("plain | 0.4 |") == 2


@pytest.mark.parametrize(
    "page, complaint",
    [
        (PAGE.replace("one", "two"), "page.md: there is no benchmarks/results/two.json"),
        (PAGE.replace("<!-- end -->", ""), "page.md: a table has no <!-- end -->"),
        (PAGE.replace("old", "<!-- table: one -->\n"), "page.md: a table has no <!-- end -->"),
        (PAGE.replace("one", "one other"), "page.md: the columns of one, other are not the same"),
    ],
)
def test_what_does_not_fit_is_an_error_that_names_the_page(root, capsys, page, complaint):
    (root / "benchmarks" / "results" / "other.json").write_text(json.dumps({**RUN, "table": [["", "accuracy"]]}))
    (root / "docs" / "page.md").write_text(page)
    assert main([], root) == 2 and complaint in capsys.readouterr().err


def test_a_run_that_was_interrupted_is_not_kept(root, capsys):
    path = root / "results.json"
    path.write_text(json.dumps({**RUN, "interrupted": True}))
    assert main(["--keep", str(path), "one"], root) == 2 and "was interrupted" in capsys.readouterr().err
