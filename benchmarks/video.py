"""Does a teacher on raw frames help a network on residual frames of compressed video, and do whitened layers?

Eight classes of moving textures and digits are encoded by H.264 and decoded again. The training program trains
`mfcd_net` on raw clips, on residual clips, and on residual clips with a teacher, each with plain and with whitened
layers. The teacher of all students of a seed is the plain network that was trained on raw clips.
"""

import importlib.util
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torchvision
from matplotlib.figure import Figure
from torch import Generator, Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from whiten_layers.models import mfcd_net, mfnet3d

from .data import photographs
from .environment import describe
from .moving import CLASSES, encode, moved, videos
from .options import Part, PositiveFloat, PositiveInt, Switch, read, reject
from .output import Column, annotate, cells, interruptible, medians, show, write
from .timing import median_seconds, steady_allocator
from .train.command_line import parse
from .train.datasets import Data, Prepared
from .train.distillation import Teacher
from .train.options import given
from .train.run import Run
from .train.video import ClipKind, Video, decode, start_of
from .train.world import Stop, World

PROGRAM = "python -m benchmarks.video"
CODEC = {"crf": "26", "refs": "1", "bf": "0", "g": "12"}  # one reference frame: the prediction is known exactly
# The clip, and whether it is taught, in the order of training.
VARIANTS: dict[str, tuple[ClipKind, bool]] = {
    "raw": ("rgb", False),
    "residual": ("residual", False),
    "residual, taught": ("residual", True),
}
LAYERS = ("plain", "whitened")
FULL = (16, 224, 224)  # the clip that published counts are for
LARGE = (240, 64, 16)  # a video as data sets have them, to be timed: size, frames, and those of a clip
Film = dict[ClipKind, Tensor]  # all frames of a video as clips of both kinds, (T, 3, H, W)


@dataclass(frozen=True)
class Options:
    """The options of the benchmark."""

    quick: Switch = False  # a look at everything in three minutes: one seed, 160 videos, 3 epochs
    videos: PositiveInt = 320  # for training; half as many for tests
    size: PositiveInt = 32  # rows and columns of a frame
    length: PositiveInt = 12  # frames of a video
    frames: PositiveInt = 8  # of a clip
    epochs: PositiveInt = 15
    batch_size: PositiveInt = 32
    lr: PositiveFloat = 0.05  # SGD's, with a cosine
    distill_weight: Part = 0.5
    temperature: PositiveFloat = 4.0
    seeds: tuple[int, ...] = (0, 1, 2)
    out: Path = Path("results/video")  # folder for the results


def counted(network: nn.Module, *shape: int) -> tuple[float, float]:
    """Count 10⁶ parameters, and 10⁹ multiply-adds for an input: of products, and one for each normalized value."""
    normalized: list[int] = []
    for module in network.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.BatchNorm3d)):
            module.register_forward_hook(lambda module, inputs, output: normalized.append(output.numel()))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network.eval()(torch.empty(1, 3, *shape, device=next(network.parameters()).device))
    operations = counter.get_total_flops() / 2 + sum(normalized)
    return sum(parameter.numel() for parameter in network.parameters()) / 1e6, operations / 1e9


def count_all() -> list[dict[str, Any]]:
    """Count the networks here beside what their papers say, and CoViAR's as an earlier one for compressed video.

    CoViAR (Wu et al., arXiv 1712.00636) has a ResNet-152 for I-frames, here one in twelve, and for the others two
    ResNet-18, for motion vectors and for residuals.
    """
    with torch.device("meta"):
        here = {"mfnet3d": counted(mfnet3d(), *FULL), "mfcd_net": counted(mfcd_net(), *FULL)}
        image, p_frame = (counted(getattr(torchvision.models, name)(), *FULL[1:]) for name in ("resnet152", "resnet18"))
    operations = FULL[0] * (image[1] / 12 + 2 * p_frame[1] * 11 / 12)
    here["CoViAR"] = image[0] + 2 * p_frame[0], operations
    claims = {"mfnet3d": "8.0 M, 11.1 G", "mfcd_net": "MFCD-Net: 11 and 3 times fewer than earlier ones"}
    return [
        {
            "network": name,
            "parameters": parameters,
            "operations": operations,
            "fewer_parameters": here["CoViAR"][0] / parameters,
            "fewer_operations": here["CoViAR"][1] / operations,
            "published": claims.get(name, ""),
        }
        for name, (parameters, operations) in here.items()
    ]


def time_clips(path: Path, frames: int) -> dict[str, Any]:
    """Time decoding a file alone, and with making a raw or a residual clip of its middle."""
    film = decode(path, vectors=True)
    start = start_of(frames, len(film), varied=False)
    numbers = range(start, start + frames)
    seconds = median_seconds(
        lambda: decode(path),
        lambda: decode(path).clip("rgb", numbers),
        lambda: decode(path, vectors=True).clip("residual", numbers),
        budget=5.0,
    )
    names = ("decode_ms", "raw_ms", "residual_ms")
    shape = f"{len(film)} x {film.frames[0].height} x {film.frames[0].width}"
    figures = {name: 1000 * taken for name, taken in zip(names, seconds, strict=True)}
    return {"video": shape, "kilobytes": path.stat().st_size / 1000, **figures}


def film_of(video: Video) -> Film:
    """Make clips of all frames but the first, which has no frame before it."""
    numbers = range(1, len(video))
    return {"rgb": video.clip("rgb", numbers), "residual": video.clip("residual", numbers)}


@dataclass(frozen=True)
class Window:
    """Transform of a film into clips of one part of it, in training a random one."""

    kinds: tuple[ClipKind, ...]
    frames: int
    varied: bool

    def __call__(self, film: Film) -> tuple[Tensor, ...]:
        start = start_of(self.frames, len(film["rgb"]), self.varied)
        return tuple(film[kind][start : start + self.frames].transpose(0, 1) for kind in self.kinds)


def films(options: Options, folder: Path, seed: int) -> tuple[list[tuple[Film, int]], list[tuple[Film, int]]]:
    """Encode the videos of a seed into files, and decode them, for training and for testing."""
    parts = []
    for held_out, number in ((False, options.videos), (True, options.videos // 2)):
        generator, part = Generator().manual_seed(2 * seed + held_out), []
        drawn = videos(number, options.length, options.size, generator, held_out=held_out)
        for frames, label in tqdm(drawn, total=number, desc="encode", unit="video", leave=False, dynamic_ncols=True):
            encode(folder / "film.mp4", frames, **CODEC)
            part.append((film_of(decode(folder / "film.mp4", vectors=True)), label))
        parts.append(part)
    return parts[0], parts[1]


def train(
    options: Options, parts: Sequence[list], variant: str, layers: str, seed: int, teacher: Teacher | None, out: Path
) -> Run:
    """Train a network by the training program."""
    kind, is_taught = VARIANTS[variant]
    model = "mfcd_net" if layers == "plain" else "whitened_mfcd_net"
    # Of ucf101 the program takes the kind of data alone: the clips are here already.
    arguments = ["--dataset", "ucf101", "--model", model, "--clip", kind, "--seed", str(seed), "--out", str(out)]
    arguments += ["--epochs", str(options.epochs), "--batch-size", str(options.batch_size), "--lr", str(options.lr)]
    arguments += ["--warmup-epochs", "1", "--device", "cpu", "--workers", "0"]
    if is_taught:
        arguments += ["--teacher", str(given(teacher).path), "--temperature", str(options.temperature)]
        arguments += ["--distill-weight", str(options.distill_weight)]
    kinds: tuple[ClipKind, ...] = (kind, "rgb") if is_taught else (kind,)
    data = Data(
        Prepared(parts[0], Window(kinds, options.frames, True), seed),
        Prepared(parts[1], Window((kind,), options.frames, False), seed),
        len(CLASSES),
    )
    world = World(0, 0, 1, torch.device("cpu"))
    run = Run(parse(arguments), data, world, teacher if is_taught else None)
    run.fit(None, Stop(world))
    return run


def train_all(options: Options, folder: Path, runs: list[dict[str, Any]]) -> None:
    """Fill `runs` with the epochs of every variant; with each seed all of them take turns."""
    for seed in options.seeds:
        parts, teacher = films(options, folder, seed), None
        for variant in VARIANTS:
            for layers in LAYERS:
                print(f"{variant}, {layers}, seed {seed}", file=sys.stderr)
                run = train(options, parts, variant, layers, seed, teacher, folder / f"{variant}-{layers}-{seed}")
                if variant == "raw" and layers == "plain":
                    teacher = Teacher(run.view.requires_grad_(False).eval(), run.path, len(CLASSES), "rgb")
                runs.append({"variant": variant, "layers": layers, "seed": seed, "epochs": run.rows})


def summarise(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each run; the leads are over the untaught and over the plain network of the same seed."""
    last = {(run["variant"], run["layers"], run["seed"]): run["epochs"][-1] for run in runs}
    rows = []
    for run in runs:
        variant, layers, seed = run["variant"], run["layers"], run["seed"]
        epoch = run["epochs"][-1]
        accuracy = 100 * epoch["test_accuracy"]
        untaught = last.get((variant.removesuffix(", taught"), layers, seed), {}).get("test_accuracy", float("nan"))
        plain = last.get((variant, "plain", seed), {}).get("test_accuracy", float("nan"))
        rows.append(
            {
                "variant": variant,
                "layers": layers,
                "seed": seed,
                "accuracy": accuracy,
                "loss": epoch["test_loss"],
                "training_accuracy": 100 * epoch["train_accuracy"],
                "seconds": sum(one["seconds"] for one in run["epochs"]),
                "over_untaught": accuracy - 100 * untaught,
                "over_plain": accuracy - 100 * plain,
            }
        )
    return rows


COLUMNS: list[Column] = [
    ("clip", "{variant}"),
    ("layers", "{layers}"),
    ("seed", "{seed}"),
    ("test acc. %", "{accuracy:.1f}"),
    ("over untaught", lambda row: f"{row['over_untaught']:+.1f}" if "taught" in row["variant"] else ""),
    ("over plain", lambda row: f"{row['over_plain']:+.1f}" if row["layers"] == "whitened" else ""),
    ("test loss", "{loss:.3f}"),
    ("training acc. %", "{training_accuracy:.1f}"),
    ("seconds", "{seconds:.1f}"),
]
COUNTS: list[Column] = [
    ("", "{network}"),
    ("M parameters", "{parameters:.1f}"),
    ("G multiply-adds", "{operations:.1f}"),
    ("fewer parameters than CoViAR", "{fewer_parameters:.1f}"),
    ("fewer multiply-adds", "{fewer_operations:.1f}"),
    ("published", "{published}"),
]
TIMES: list[Column] = [
    ("video", "{video}"),
    ("kB", "{kilobytes:.1f}"),
    ("decoded, ms", "{decode_ms:.1f}"),
    ("raw clip", "{raw_ms:.1f}"),
    ("residual clip", "{residual_ms:.1f}"),
]


def plot(runs: list[dict[str, Any]]) -> Figure:
    """Draw accuracies against epochs, and losses, a line for each run."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    styles = {"plain": "-", "whitened": "--"}
    for panel, kind in zip(figure.subplots(1, 2), ("accuracy", "loss"), strict=True):
        for run in runs:
            colour = f"C{list(VARIANTS).index(run['variant'])}"
            label = f"{run['variant']}, {run['layers']}"
            values = [epoch[f"test_{kind}"] for epoch in run["epochs"]]
            panel.plot(range(1, len(values) + 1), values, styles[run["layers"]], color=colour, label=label, alpha=0.8)
        annotate(panel, "epoch", f"test {kind}", legend=kind == "loss")  # which leaves room for it
    return figure


def sheet(folder: Path, size: int = 64, frames: int = 8) -> Figure:
    """Show every second frame of a video of each class, its residuals below it, and differences to the frame before.

    Residuals and differences are shown three times as strong, around grey.
    """
    drawn = list(videos(len(CLASSES), 2 * frames, size, Generator().manual_seed(1), held_out=False))
    figure = Figure(figsize=(frames * 1.1, len(CLASSES) * 3 * 0.75), layout="constrained")
    panels = figure.subplots(len(CLASSES), 1)
    for panel, (pictures, label) in zip(panels, drawn, strict=True):
        encode(folder / "sheet.mp4", pictures, **CODEC)
        film = decode(folder / "sheet.mp4", vectors=True)
        numbers = range(1, len(film), 2)
        rows = [
            torch.cat([film.picture(n) for n in numbers], 2),
            torch.cat([0.5 + 3 * (film.picture(n) - film.prediction(n)) for n in numbers], 2),
            torch.cat([0.5 + 3 * (film.picture(n) - film.picture(n - 1)) for n in numbers], 2),
        ]
        panel.imshow(torch.cat(rows, 1).clamp(0, 1).permute(1, 2, 0).numpy())
        panel.set_yticks([size // 2, 3 * size // 2, 5 * size // 2], ["frame", "residual", "difference"])
        panel.set_xticks([])
        panel.set_title(CLASSES[label], fontsize=9)
    return figure


def time_all(folder: Path, options: Options) -> list[dict[str, Any]]:
    """Time clips of a video as it is trained on, and of one of the size that videos have."""
    rows = []
    for size, length, frames in ((options.size, options.length, options.frames), LARGE):
        film = moved(photographs()[0], "shift", length, size, Generator().manual_seed(0))
        encode(folder / "timed.mp4", (255 * film).byte().permute(0, 2, 3, 1).numpy(), **CODEC)
        rows.append(time_clips(folder / "timed.mp4", frames))
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; return the exit status: 130 where Ctrl-C cut it short."""
    options = read(Options(), PROGRAM, __doc__, arguments)
    if options.quick:
        options = replace(options, seeds=options.seeds[:1], videos=160, epochs=3)
    if importlib.util.find_spec("av") is None:
        reject(PROGRAM, "PyAV is not installed; pip install 'whiten-layers[video]'")
    if options.size % 2 or not 16 <= options.size <= 80:
        reject(PROGRAM, f"--size {options.size}: give an even number from 16 to 80, which a photograph has room for")
    if options.frames >= options.length:
        reject(PROGRAM, f"--frames {options.frames}: a video has {options.length}, and the first is left out")
    if options.videos < options.batch_size:
        reject(PROGRAM, f"--batch-size {options.batch_size}: there are {options.videos} videos")
    steady_allocator()
    print(describe())
    runs: list[dict[str, Any]] = []
    result: dict[str, Any] = {"counts": count_all(), "times": [], "runs": runs}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with interruptible(result):
            result["times"] = time_all(folder, options)
            train_all(options, folder, runs)
        show(result, "parameters, and operations for 16 frames of 224 x 224", cells(COUNTS, result["counts"]))
        show(result, "milliseconds for a clip of a file, which one thread decodes", cells(TIMES, result["times"]))
        rows = summarise(runs)
        result["medians"] = medians(rows, ["variant", "layers"])
        shown = [*rows, *(result["medians"] if len(options.seeds) > 1 else [])]
        title = f"{options.videos} videos of {len(CLASSES)} classes, {options.epochs} epochs, sgd, lr {options.lr:g}"
        show(result, title, cells(COLUMNS, shown))
        figures = {"accuracy": lambda: plot(runs), "sheet": lambda: sheet(folder)}
        return write(options, result, figures)


if __name__ == "__main__":
    sys.exit(main())
