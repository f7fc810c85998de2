"""Write the tables of results into README.md and docs/, from the JSON files in benchmarks/results/.

A page says where a table stands: between ``<!-- table: NAME -->`` and ``<!-- end -->``. NAME.json holds the cells of
the table that a benchmark printed ("table"), on which machine ("environment"), and the commands that repeat it. With
several names the rows follow one another. ``<!-- table: NAME, without CELL -->`` leaves out the rows that end with this
cell, and the commands: a table of failures, for instance, beside a whole one on another page.
"""

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .options import Switch, read, reject
from .output import replace

PROGRAM = "python -m benchmarks.tables"
ROOT = Path(__file__).parent.parent
MARKED = re.compile(r"(<!-- table: ([^>]+) -->\n)(.*?)(<!-- end -->)", flags=re.DOTALL)
BULKY = ("curves", "seconds", "cases", "runs")  # of a run, that no table needs
VERSIONS = {"Python": "python", "torch": "torch", "torchvision": "torchvision"}


@dataclass(frozen=True)
class Options:
    """Options of the command line."""

    check: Switch = False  # write nothing; status 1 if a page differs
    keep: tuple[str, ...] | None = None  # first take over a table: a run's results.json, and a NAME
    number: int = 1  # with --keep: which of the run's tables
    label: str = ""  # with --keep: what comes before the name of each row
    command: tuple[str, ...] | None = None  # with --keep: what repeats the run (default: as NAME.json says)


def markdown(names: list[str], results: dict[str, dict[str, Any]], without: str | None = None) -> str:
    """Make a table, and below it the commands that repeat it, the machine, and where figures come from if not a run.

    With `without` the rows whose last cell it is are left out, and what is below the table.

    Raises:
        ValueError: there is no such file, or the files' columns differ.
    """
    for name in names:
        if name not in results:
            raise ValueError(f"there is no benchmarks/results/{name}.json")
    chosen = [results[name] for name in names]
    head = chosen[0]["table"][0]
    if any(one["table"][0] != head for one in chosen):
        raise ValueError(f"the columns of {', '.join(names)} are not the same")
    lines = [head, ["---"] * len(head), *(row for one in chosen for row in one["table"][1:] if row[-1] != without)]
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    if without is not None:  # the whole table, elsewhere, says how it was made
        return table
    below = [f"`{command}`" for command in dict.fromkeys(command for one in chosen for command in one["command"])]
    below += [f"on {machine}" for machine in dict.fromkeys(_machine(one["environment"]) for one in chosen) if machine]
    below += [f"transcribed {source}" for source in dict.fromkeys(one.get("transcribed") for one in chosen) if source]
    return table + "\n" + ";\n".join(below) + "\n"


def _machine(environment: dict[str, Any]) -> str:
    if not environment:  # figures on paper
        return ""
    versions = (f"{name} {environment[key]}" for name, key in VERSIONS.items() if key in environment)
    return f"{environment['processor']}, {environment['cores']} cores, {', '.join(versions)}"


def filled(text: str, results: dict[str, dict[str, Any]]) -> str:
    """Return the text of a page with every table made anew."""

    def replaced(match: re.Match[str]) -> str:
        begin, names, inside, end = match.groups()
        if "<!-- table:" in inside:
            raise ValueError(f"the table {names} has no <!-- end -->")
        names, _, without = names.partition(", without ")
        return begin + markdown(names.split(), results, without or None) + end

    if text.count("<!-- table:") != len(MARKED.findall(text)):
        raise ValueError("a table has no <!-- end -->, or its marker is not <!-- table: NAME --> on a line of its own")
    return MARKED.sub(replaced, text)


def kept(path: Path, number: int, label: str, command: list[str]) -> dict[str, Any]:
    """Return what is kept of a run's ``results.json``, with one of its tables; of rows by seed, their medians.

    A label comes before the first cell of each row, to tell the rows of several runs apart.

    Raises:
        ValueError: the run was cut short, or has no such table.
    """
    result = json.loads(path.read_text(encoding="utf-8"))
    tables = result.pop("tables", [])
    if result.get("interrupted"):
        raise ValueError(f"{path}: the run was interrupted")
    if not 1 <= number <= len(tables):
        raise ValueError(f"{path}: there is no table {number} (it has {len(tables)})")
    head, *rows = tables[number - 1]["cells"]
    if "seed" in head and any("median" in row for row in rows):
        place = head.index("seed")
        rows = [row[:place] + row[place + 1 :] for row in rows if row[place] == "median"]
        head = head[:place] + head[place + 1 :]
    rows = [[f"{label}: {row[0]}" if label else row[0], *row[1:]] for row in rows]
    return {"command": command, **_lean(result), "title": tables[number - 1]["title"], "table": [head, *rows]}


def _lean(result: dict[str, Any]) -> dict[str, Any]:
    """Leave out what no table needs, at any depth of a result."""
    kept = {key: value for key, value in result.items() if key not in BULKY}
    return {key: _lean(value) if isinstance(value, dict) else value for key, value in kept.items()}


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    """Write the tables, or compare them; return the exit status: 1 if a page differs, 2 if something does not fit."""
    options = read(Options(), PROGRAM, __doc__, arguments)
    if options.keep is not None and len(options.keep) != 2:
        reject(PROGRAM, "--keep: give a run's results.json and the NAME to keep its table under")
    folder, where = root / "benchmarks" / "results", "benchmarks/results"
    try:
        results = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in folder.glob("*.json")}
        if options.keep:
            path, name = Path(options.keep[0]), options.keep[1]
            command = list(options.command or ()) or results.get(name, {}).get("command")
            if command is None:
                raise ValueError(f"{name}.json is new: say what repeats the run, by --command")
            results[name] = kept(path, options.number, options.label, command)
            replace(folder / f"{name}.json", (json.dumps(results[name], indent=1, ensure_ascii=False) + "\n").encode())
        changed = []
        for page in [root / "README.md", *sorted((root / "docs").glob("*.md"))]:
            where, before = str(page.relative_to(root)), page.read_text(encoding="utf-8")
            after = filled(before, results)
            if before != after:
                changed.append(where)
                if not options.check:
                    replace(page, after.encode())
    except (ValueError, LookupError, OSError) as error:
        what = repr(error) if isinstance(error, LookupError) else error  # of those the text is a key alone
        print(f"{PROGRAM}: {where}: {what}", file=sys.stderr)
        return 2
    print(f"{'differ from benchmarks/results' if options.check else 'written'}: {', '.join(changed) or 'no pages'}")
    return 1 if options.check and changed else 0


if __name__ == "__main__":
    sys.exit(main())
