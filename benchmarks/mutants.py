"""Would the tests notice a mistake in the numerical core?

Small mistakes are made in it one at a time: another operator, a number one larger, a condition turned round, a loop
that does nothing, a decorator left out. For each the tests of its file run, then those of its room, until the first
that fails, but for those that compile a model; without a mistake all of them must pass. A mistake that none notices is
listed: it is one that these tests miss, or one that changes nothing.

The mistakes are drawn evenly from the places where one can be made, the annotations of types left out; `cosmic-ray`
finds the places and makes the mistakes, in copies of this checkout. What has been tried is kept in the folder, a line a
mistake, and not tried again: to try some again, take their lines out of mutants.jsonl.
"""

import ast
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from queue import Queue
from typing import Any

from tqdm import tqdm

from .environment import describe
from .options import PositiveInt, read, reject
from .output import Column, cells, interruptible, show, write

PROGRAM = "python -m benchmarks.mutants"
ROOT = Path(__file__).parent.parent
# The rooms, each with further tests of what it does, after those in the folder that mirrors it.
ROOMS: dict[str, tuple[str, ...]] = {
    "autograd.py": (
        "test_founding.py",
        "test_func.py",
        "test_geometry.py",
        "test_precision.py",
        "transforms/test_psi.py",
        "test_layers.py",
    ),
    "inverse": (),
    "refresh": ("test_windows.py", "distributed/test_agreement.py", "test_checkpoint.py"),
    "statistics": (
        "transforms/test_whitening.py",
        "transforms/test_norms.py",
        "test_founding.py",
        "test_windows.py",
        "test_hugging_face.py",
        "test_checkpoint.py",
    ),
    "transforms": (
        "test_report.py",
        "test_founding.py",
        "conversion/test_spelling.py",
        "test_checkpoint.py",
        "test_conformance.py",
    ),
}
LOG = "mutants.log"  # of the last tests, in each copy
# Each run of the tests forks from a process that has imported what takes long.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["benchmarks.environment", "benchmarks.output", "tqdm"])
LIMIT = 1800  # seconds; what has not ended by then does not end, and is noticed


@dataclass(frozen=True)
class Options:
    """Options of the command line."""

    mutants: PositiveInt = 300
    seed: int = 0  # of the draw
    jobs: PositiveInt = 2  # mistakes that are tried at a time
    out: Path = Path("results/mutants")  # folder for mutants.jsonl and results.json


@dataclass(frozen=True)
class Place:
    """A mistake: what kind it is, and where it is made: at one of the places in the file that allow this kind."""

    file: str
    line: int
    column: int
    kind: str
    occurrence: int


def place_of(row: dict[str, Any]) -> Place:
    """Return the mistake that a row is about."""
    return Place(**{name: row[name] for name in Place.__dataclass_fields__})


def annotated(source: str) -> set[int]:
    """List the lines of a file that an annotation of a type stands on."""
    lines: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        for name in ("annotation", "returns"):
            if (part := getattr(node, name, None)) is not None:
                lines.update(range(part.lineno, part.end_lineno + 1))
    return lines


def room_of(file: str) -> str:
    """Name the room of a file of the library."""
    return Path(file).relative_to("whiten_layers").parts[0]


def places() -> list[Place]:
    """List all mistakes that can be made in the rooms."""
    from cosmic_ray.commands.init import init
    from cosmic_ray.work_db import WorkDB, use_db

    library = ROOT / "whiten_layers"
    files = sorted(
        file for room in ROOMS for file in [library / room, *(library / room).glob("*.py")] if file.is_file()
    )
    with tempfile.TemporaryDirectory() as folder, use_db(Path(folder) / "places", WorkDB.Mode.create) as database:
        init(files, database, {})
        mutations = [item.mutations[0] for item in database.work_items]
    skipped = {file: annotated(file.read_text()) for file in files}
    return [
        Place(
            str(one.module_path.relative_to(ROOT)),
            one.start_pos[0],
            one.start_pos[1],
            one.operator_name.removeprefix("core/"),
            one.occurrence,
        )
        for one in mutations
        if one.start_pos[0] not in skipped[one.module_path]
    ]


def drawn(found: Sequence[Place], count: int, seed: int) -> list[Place]:
    """Draw mistakes, no two of one family at one place: an operator can be replaced by eleven others."""

    def place(one: Place) -> tuple:
        return one.file, one.line, one.column, one.kind.partition("_")[0]

    chance = random.Random(seed)
    groups = [
        sorted(group, key=str) for _, group in groupby(sorted(found, key=lambda one: (place(one), str(one))), place)
    ]
    return [chance.choice(group) for group in chance.sample(groups, min(count, len(groups)))]


def tests_for(file: str) -> list[str]:
    """List the tests that a mistake in a file is shown to, in their order."""
    path = Path(file).relative_to("whiten_layers")
    own = Path("tests") / path.with_name(f"test_{path.name}")
    room = sorted((ROOT / own.parent).glob("test_*.py")) if len(path.parts) > 1 else []
    further = [Path("tests") / name for name in ROOMS[path.parts[0]]]
    ordered = [own, *(one.relative_to(ROOT) for one in room), *further]
    return [str(one) for one in dict.fromkeys(ordered) if (ROOT / one).exists()]


def _run(folder: Path, tests: Sequence[str]) -> None:
    """Run tests in a process of its own, in a copy of the checkout, and end with pytest's exit status."""
    os.setsid()
    os.chdir(folder)
    log = os.open(LOG, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, sys.stdout.fileno())
    os.dup2(log, sys.stderr.fileno())
    sys.path.insert(0, str(folder))
    # Python would take two mistakes of the same second and length for one, by the compiled file.
    sys.dont_write_bytecode = True
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    import pytest

    sys.exit(pytest.main(["-x", "-n", "0", "-p", "no:cacheprovider", "-k", "not compile", *tests]))


def are_passed(folder: Path, tests: Sequence[str]) -> bool:
    """Run tests in a copy of the checkout, until the first that fails; tell whether none did."""
    process = _context.Process(target=_run, args=(folder, tests))
    process.start()
    try:
        process.join(LIMIT)
    finally:
        if process.is_alive():
            assert process.pid is not None
            os.killpg(process.pid, signal.SIGKILL)  # with the processes that the tests have started
            process.join()
    return process.exitcode == 0


def attempt(folder: Path, place: Place) -> dict[str, Any]:
    """Make a mistake in a copy of the checkout, run the tests, and take it back."""
    import cosmic_ray.plugins
    from cosmic_ray.mutating import use_mutation

    operator = cosmic_ray.plugins.get_operator(f"core/{place.kind}")()
    with use_mutation(folder / place.file, operator, place.occurrence) as (before, after):
        lines = zip(before.splitlines(), after.splitlines(), strict=False)
        changed = next(((old.strip(), new.strip()) for old, new in lines if old != new), ("", ""))
        noticed = not are_passed(folder, tests_for(place.file))
    return asdict(place) | {"old": changed[0], "new": changed[1], "noticed": noticed}


def copy_of_the_checkout(folder: Path) -> Path:
    """Copy the files of the checkout that are of the project."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    return folder


def attempts(drawn_places: Sequence[Place], jobs: int, folder: Path) -> Iterator[dict[str, Any]]:
    """Try mistakes, several at a time, each job in a copy of its own."""
    copies: Queue[Path] = Queue()
    for job in range(jobs):
        copies.put(copy_of_the_checkout(folder / str(job)))
    every = list(dict.fromkeys(test for place in drawn_places for test in tests_for(place.file)))
    if every and not are_passed(folder / "0", every):
        last = (folder / "0" / LOG).read_text(errors="replace").strip().splitlines()[-3:]
        reject(PROGRAM, "a test fails without any mistake: " + " ".join(last))

    def one(place: Place) -> dict[str, Any]:
        copy = copies.get()
        try:
            return attempt(copy, place)
        finally:
            copies.put(copy)

    with ThreadPoolExecutor(jobs) as pool:
        try:
            yield from pool.map(one, drawn_places)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def summarise(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Count the mistakes and those that were noticed, by rooms and in all."""
    summary = []
    for room in [*ROOMS, "all"]:
        members = [row for row in rows if room in (room_of(row["file"]), "all")]
        if members:
            noticed = sum(row["noticed"] for row in members)
            summary.append(
                {"room": room, "mistakes": len(members), "noticed": noticed, "share": noticed / len(members)}
            )
    return summary


SUMMARY: list[Column] = [
    ("room", "`{room}`"),
    ("mistakes", "{mistakes}"),
    ("noticed", "{noticed}"),
    ("share", "{share:.1%}"),
]
MISSED: list[Column] = [
    ("place", "{file}:{line}"),
    ("as it is", lambda row: f"`{row['old']}`".replace("|", "∣")),
    ("mistake", lambda row: f"`{row['new']}`".replace("|", "∣")),
]


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; return the exit status: 130 where Ctrl-C cut it short."""
    options = read(Options(), PROGRAM, __doc__, arguments)
    try:
        found = places()
    except ModuleNotFoundError as error:
        reject(PROGRAM, f"{error.name} is missing: pip install 'whiten-layers[test]'")
    print(describe())
    chosen = drawn(found, options.mutants, options.seed)
    options.out.mkdir(parents=True, exist_ok=True)
    kept = options.out / "mutants.jsonl"
    tried = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    rows = {place_of(row): row for row in tried}
    result: dict[str, Any] = {"places": len(found)}
    left = [one for one in chosen if one not in rows]
    with (
        interruptible(result),
        tempfile.TemporaryDirectory() as folder,
        open(kept, "a", encoding="utf-8") as file,
        tqdm(total=len(left), unit="mistake", dynamic_ncols=True) as bar,
    ):
        for row in attempts(left, options.jobs, Path(folder)):
            rows[place_of(row)] = row
            file.write(f"{json.dumps(row)}\n")
            file.flush()
            bar.update()
    result["rows"] = [rows[one] for one in chosen if one in rows]
    show(result, "mistakes that a test noticed", cells(SUMMARY, summarise(result["rows"])))
    show(result, "those that none noticed", cells(MISSED, [row for row in result["rows"] if not row["noticed"]]))
    return write(options, result)


if __name__ == "__main__":
    sys.exit(main())
