"""The files of a run: the checkpoint, ``results.json``, curves, plain weights, TensorBoard's scalars."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor
from tqdm import tqdm

from ..environment import environment
from ..options import chosen, dashed
from ..output import Column, aligned, annotate, cells, encoded, replace
from .errors import Unusable, one_line
from .options import Options

T = TypeVar("T")
FORMAT = 2  # of a checkpoint
CHECKPOINT, RESULTS = "checkpoint.pt", "results.json"
Row = dict[str, float | int]
COLUMNS: dict[str, Column] = {
    "epoch": ("epoch", "{epoch}"),
    "lr": ("lr", "{lr:.2g}"),
    "train_loss": ("training loss", "{train_loss:.4f}"),
    "train_accuracy": ("acc.", "{train_accuracy:.4f}"),
    "test_loss": ("test loss", "{test_loss:.4f}"),
    "test_accuracy": ("acc.", "{test_accuracy:.4f}"),
    "ema_loss": ("average's", "{ema_loss:.4f}"),
    "ema_accuracy": ("acc.", "{ema_accuracy:.4f}"),
    "images_per_second": ("images/s", "{images_per_second:.0f}"),
    "skipped": ("skipped", "{skipped}"),
    "failed": ("failed", "{failed}"),
}


def writing(path: Path, action: Callable[[], T]) -> T:
    """Call an action that writes.

    Raises:
        Unusable: it cannot write.
    """
    try:
        return action()
    except OSError as error:
        raise Unusable(
            f"{path} cannot be written: {error.strerror or one_line(error)}; make it possible and --resume, or give "
            "another --out (what was there before is as it was)"
        ) from error


def save(path: Path, state: Any) -> None:
    """Write a file for `torch.load` with ``weights_only=True``, whole or not at all, in place of an older one.

    Raises:
        Unusable: the file cannot be written, for example because the disk is full.
    """
    content = io.BytesIO()  # torch.save into a full disk raises what is no OSError
    torch.save(state, content)
    writing(path, lambda: path.parent.mkdir(parents=True, exist_ok=True))
    writing(path, lambda: replace(path, content.getbuffer()))


NO_RUN = "so there is nothing to --resume; leave that out to begin"


def load(path: Path, absent: str = NO_RUN, damaged: str = "begin again in another --out") -> dict[str, Any]:
    """Read a checkpoint of this program; `absent` and `damaged` are what to say of a file that is so.

    Raises:
        Unusable: there is none, or it is damaged, or of another kind.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise Unusable(f"{path} is not there, {absent}") from None
    except Exception as error:  # a damaged file makes the unpickler raise anything
        raise Unusable(f"{path} cannot be read as a checkpoint: {one_line(error)}; {damaged}") from error
    if not isinstance(state, dict) or state.get("format") not in (1, FORMAT):
        raise Unusable(f"{path} is no checkpoint of this program")
    if state["format"] == 1:  # windows without names, in a list for each process; with the default intervals none
        if any(window is not None for process in state["processes"] for window in process["windows"]):
            raise Unusable(f"{path} holds statistics of an earlier version: resume with whiten_layers 0.1.0")
        for process in state["processes"]:
            process["windows"] = {}
    return state


def check_same(path: Path, then: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise `Unusable` if the run of a checkpoint was given other options, or other data, than this one."""
    for name in sorted({*then, *now}, key=lambda name: (name != "model", name)):
        if then.get(name) != now.get(name):
            option = name if " " in name else dashed(name)
            raise Unusable(
                f"{path} is of another run: {option} was {then.get(name)} there and is {now.get(name)} here; "
                "give the same options, or another --out"
            )


def check_unused(folder: Path) -> None:
    """Raise `Unusable` if a folder holds a run already; a run that took no step does not count."""
    for name in (CHECKPOINT, RESULTS):
        path = folder / name
        try:
            used = path.exists() and not (name == CHECKPOINT and _is_untouched(path))
        except OSError as error:
            raise Unusable(f"{path} cannot be looked at: {error.strerror}; give another --out") from error
        if used:
            raise Unusable(f"{folder} holds a run already ({name}): go on with it by --resume, or give another --out")


def _is_untouched(path: Path) -> bool:
    try:
        state = load(path)
    except Unusable:
        return False
    return state["epoch"] == state["step"] == 0


class Record:
    """The table, ``results.json`` and TensorBoard's scalars of a run, kept by the first process."""

    def __init__(self, folder: Path, options: Options, about: dict[str, Any], done: int) -> None:
        self.folder, self.headed, self.scalars = folder, False, None
        self.about = {"environment": environment(), "options": chosen(options), **about}
        if options.machine.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            # The purge hides what an interrupted run has already written of an epoch that will be done again.
            self.scalars = writing(folder, lambda: SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1))

    def write(self, rows: list[Row], finished: bool = False) -> None:
        """Write ``results.json`` anew."""
        path = self.folder / RESULTS
        writing(path, lambda: replace(path, encoded({**self.about, "finished": finished, "epochs": rows})))

    def epoch(self, rows: list[Row]) -> None:
        """Print, and add to the files, the epoch of the last row."""
        row = rows[-1]
        columns = [column for name, column in COLUMNS.items() if name in row]
        lines = aligned(cells(columns, [row]), width=8).splitlines()
        tqdm.write("\n".join(lines[self.headed :]))
        self.headed = True
        self.write(rows)
        if self.scalars is not None:
            writing(self.folder, lambda: self._scalars(self.scalars, row))

    @staticmethod
    def _scalars(writer: Any, row: Row) -> None:
        for name, value in row.items():
            part, _, kind = name.partition("_")
            tag = f"{part}/{kind}" if part in ("train", "test", "ema") else name
            if name != "epoch":
                writer.add_scalar(tag, value, row["epoch"])
        writer.flush()

    def close(self, rows: list[Row], weights: dict[str, dict[str, Tensor]]) -> None:
        """Write the plain weights and ``curves.png`` of a finished run, and mark it as finished."""
        for name, state in weights.items():
            save(self.folder / name, state)
        image, path = io.BytesIO(), self.folder / "curves.png"
        curves(rows).savefig(image, dpi=120)
        writing(path, lambda: replace(path, image.getbuffer()))
        self.write(rows, finished=True)
        names = [CHECKPOINT, *weights, RESULTS, path.name]
        print("written:", ", ".join(str(self.folder / name) for name in names))
        if self.scalars is not None:
            self.scalars.close()


def curves(rows: list[Row]) -> Figure:
    """Plot losses and accuracies against epochs."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    epochs = [row["epoch"] for row in rows]
    for panel, kind in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        for part in ("train", "test", "ema"):
            if f"{part}_{kind}" in rows[0]:
                panel.plot(epochs, [row[f"{part}_{kind}"] for row in rows], ".-", label=part)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        annotate(panel, "epoch", kind)
    return figure
