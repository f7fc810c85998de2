"""What a run leaves in its folder: the checkpoint, ``results.json``, curves, plain weights, TensorBoard's scalars."""

import argparse
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
from ..output import encoded, replace
from .errors import Unusable, one_line

T = TypeVar("T")
FORMAT = 1  # of a checkpoint
CHECKPOINT, RESULTS = "checkpoint.pt", "results.json"
Row = dict[str, float | int]
COLUMNS: dict[str, tuple[str, str]] = {  # of the table: the head and the format of a figure
    "epoch": ("epoch", "d"),
    "lr": ("lr", ".2g"),
    "train_loss": ("training loss", ".4f"),
    "train_accuracy": ("acc.", ".4f"),
    "test_loss": ("test loss", ".4f"),
    "test_accuracy": ("acc.", ".4f"),
    "ema_loss": ("average's", ".4f"),
    "ema_accuracy": ("acc.", ".4f"),
    "images_per_second": ("images/s", ".0f"),
    "skipped": ("skipped", "d"),
    "failed": ("failed", "d"),
}


def writing(path: Path, action: Callable[[], T]) -> T:
    """What an action that writes gives, or a line that says that it could not."""
    try:
        return action()
    except OSError as error:
        raise Unusable(
            f"{path} cannot be written: {error.strerror or one_line(error)}; make it possible and --resume, or give "
            "another --out (what was there before is as it was)"
        ) from error


def save(path: Path, state: Any) -> None:
    """Write what `torch.load` reads with ``weights_only=True``, in place of what is there, whole or not at all.

    Raises:
        Unusable: the disk is full, or the like.
    """
    content = io.BytesIO()  # torch.save into a full disk raises what is no OSError
    torch.save(state, content)
    writing(path, lambda: path.parent.mkdir(parents=True, exist_ok=True))
    writing(path, lambda: replace(path, content.getbuffer()))


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint of this program.

    Raises:
        Unusable: there is none, or it is damaged, or something else.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise Unusable(f"{path} is not there, so there is nothing to --resume; leave that out to begin") from None
    except Exception as error:  # a damaged file makes the unpickler raise anything
        raise Unusable(
            f"{path} cannot be read as a checkpoint: {one_line(error)}; begin again in another --out"
        ) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise Unusable(f"{path} is no checkpoint of this program")
    return state


def check_same(path: Path, then: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise `Unusable` where a checkpoint's run was given other options, or other data, than this one."""
    for name in sorted({*then, *now}, key=lambda name: (name != "model", name)):
        if then.get(name) != now.get(name):
            option = name if " " in name else f"--{name.replace('_', '-')}"
            raise Unusable(
                f"{path} is of another run: {option} was {then.get(name)} there and is {now.get(name)} here; "
                "give the same options, or another --out"
            )


def check_unused(folder: Path) -> None:
    """Raise `Unusable` where a folder holds a run already; one that took no step is none."""
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

    def __init__(self, folder: Path, options: argparse.Namespace, about: dict[str, Any], done: int) -> None:
        chosen = {name: str(v) if isinstance(v, Path) else v for name, v in vars(options).items()}
        self.folder, self.headed, self.scalars = folder, False, None
        self.about = {"environment": environment(), "options": chosen, **about}
        if options.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            # What an interrupted run told of an epoch that it is to do again is not shown.
            self.scalars = writing(folder, lambda: SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1))

    def write(self, rows: list[Row], finished: bool = False) -> None:
        """Bring ``results.json`` up to date."""
        path = self.folder / RESULTS
        writing(path, lambda: replace(path, encoded({**self.about, "finished": finished, "epochs": rows})))

    def epoch(self, rows: list[Row]) -> None:
        """Take note of the last of the rows."""
        row = rows[-1]
        if not self.headed:
            tqdm.write(heads(row))
            self.headed = True
        tqdm.write(line(row))
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
        """Write what a finished run leaves: the plain weights and ``curves.png``, and that it is finished."""
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
    """Losses and accuracies against epochs."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    epochs = [row["epoch"] for row in rows]
    for panel, kind in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        for part in ("train", "test", "ema"):
            if f"{part}_{kind}" in rows[0]:
                panel.plot(epochs, [row[f"{part}_{kind}"] for row in rows], ".-", label=part)
        panel.set_xlabel("epoch")
        panel.set_ylabel(kind)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.grid(alpha=0.3)
        panel.legend()
    return figure


def heads(row: Row) -> str:
    """The line above `line`."""
    return "  ".join(head.rjust(_width(name)) for name, (head, _) in COLUMNS.items() if name in row)


def line(row: Row) -> str:
    """An epoch's figures, aligned."""
    return "  ".join(format(row[name], form).rjust(_width(name)) for name, (_, form) in COLUMNS.items() if name in row)


def _width(name: str) -> int:
    return max(8, len(COLUMNS[name][0]))
