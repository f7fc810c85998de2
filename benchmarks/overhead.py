"""What does a whitened training step cost, compared with the plain one?

Steps of the plain and of the whitened network are timed in turn, on the same batch, so that all see
the machine as it is at that moment; compiled and not, if asked for, in the same run. A cycle of the whitened network's
schedule holds steps that update statistics or refresh inverses and steps that do neither: the time of a step is a mean
over whole cycles, and the ratio printed is the median over such stretches. A breakdown times, in the same run, networks
that leave out the refreshes, and the statistics too: what they take less is what those cost. Beside it stands the least
time that the counted operations and bytes of each part take at the peaks that are measured in the same run; the rest is
Python and what each call of an operation costs. On a CUDA device each network's peak memory is taken before, while it
alone trains.
"""

import copy
import math
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
import whiten_layers.models
from torch import Tensor, nn
from tqdm import tqdm

from whiten_layers import FeatureWhitening, GradientTransform, OptimalInputGain, whiten
from whiten_layers.layers import layers_of
from whiten_layers.refresh.schedule import observation_interval, refresh_interval

from .convergence import PLAIN
from .counting import PAPER, Counting, Peaks, measure_peaks
from .environment import describe, device_name
from .options import PositiveInt, Switch, Wrong, choice, read, reject, value
from .output import Column, cells, show, write
from .safety_tasks import Transformer, mlp
from .timing import steady_allocator, synchronize
from .training import OPTIMIZERS
from .transforms import TransformOptions, settings_of

PROGRAM = "python -m benchmarks.overhead"
OTHERS = ("mlp", "transformer")  # networks that read no images
MODES = {"no": ["eager"], "yes": ["compiled"], "both": ["eager", "compiled"]}
# The largest distance of two first gradients, relative to their norm. The forward passes of both networks are the same
# to the last bit, so that only the sums of backward round differently: by 2⁻⁹ of bfloat16 in each of a hundred layers,
# or in float32 by 2⁻¹¹ of TF32, in which cuDNN multiplies.
TOLERANCE = {"fp32": 1e-3, "bf16": 5e-2}


def known_device(text: str) -> str | Wrong:
    """The name of the CPU, or of a CUDA device of this machine."""
    if not re.fullmatch(r"cpu|cuda(:\d+)?", text):
        return Wrong(f"{text!r}: must be cpu, cuda or cuda:N")
    chosen = torch.device(text)
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        return Wrong(f"{text!r}: CUDA devices that are here: {torch.cuda.device_count()}")
    return text


@dataclass(frozen=True)
class Options:
    """The options of the benchmark."""

    # A network for images; or three linear layers of 64, 128 and 128 features; or a transformer of four blocks of width
    # 256 that reads 64 characters.
    model: Annotated[str, choice([*PLAIN, *OTHERS])] = "resnet20"
    batch_size: PositiveInt = 128
    size: PositiveInt = 32  # height and width of the images
    device: Annotated[str, value("device", known_device)] = "cpu"  # cpu, cuda or cuda:N
    precision: Literal["fp32", "bf16"] = "fp32"  # bf16 is autocast's
    channels_last: Switch = False  # the memory format of images and weights
    compile: Literal["no", "yes", "both"] = "no"  # torch.compile, or with and without in one run
    batches: PositiveInt = 1000  # that count as having come when the timing begins: refreshes become rarer
    # Time networks that only transform, and that never refresh, too; count what each part does.
    breakdown: Switch = False
    simulate: Annotated[str, choice(PAPER)] | None = None  # the same, and what it would take on another device
    stretches: PositiveInt = 9  # stretches of whole cycles to take the median of
    system_allocator: Switch = False  # leave memory allocation as the system has it
    out: Path = Path("results/overhead")  # folder for results.json
    transform: TransformOptions = field(default_factory=TransformOptions)

    @property
    def takes_apart(self) -> bool:
        """Whether a step is taken apart; what it would take on another device is told by its parts."""
        return self.breakdown or self.simulate is not None

    @property
    def layout(self) -> torch.memory_format:
        """The memory format of tensors of four dimensions."""
        return torch.channels_last if self.channels_last else torch.contiguous_format


NEVER = 2**31  # an interval; before it, things are due at powers of two
PARTS = {
    "whitened": (),
    "transform and statistics": ("update_interval",),
    "transform": ("update_interval", "statistics_interval"),
}


def leave_out(network: nn.Module, intervals: tuple[str, ...], batches: int) -> None:
    """Let a network's layers be where they are after so many batches, and leave out what has one of these intervals."""
    batch = NEVER // 2 + 1 if intervals else batches
    for layer in layers_of(network).values():
        layer.transform.schedule.batch = batch
        for part in observing(layer.transform):
            part.attendance.observed = batch
            for name in intervals:
                setattr(part, name, NEVER)


def task_of(options: Options) -> tuple[nn.Module, Tensor, Tensor]:
    """Make a network, and a batch of inputs and labels for it."""
    if options.model == "mlp":
        return mlp(64, 128, 128, 10), torch.randn(options.batch_size, 64), torch.randint(10, (options.batch_size,))
    if options.model == "transformer":
        codes = torch.randint(128, (options.batch_size, 64))
        return Transformer(context=64, width=256, depth=4), codes, codes.roll(-1, 1)
    network = getattr(whiten_layers.models, options.model)()
    images = torch.randn(options.batch_size, 3, options.size, options.size)
    return network, images, torch.randint(network.fc.out_features, (options.batch_size,))


def loss_of(network: nn.Module, images: Tensor, labels: Tensor, precision: str) -> Tensor:
    """Cross-entropy, ``()``, under autocast if the precision is "bf16"."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16"):
        return F.cross_entropy(network(images), labels)


def gradients(network: nn.Module, images: Tensor, labels: Tensor, precision: str) -> dict[str, Tensor]:
    """Compute the gradient of every parameter, by its name, on the CPU, and clear the gradients of the network.

    cuDNN computes deterministically: in bfloat16 the gradients of two passes that round differently in forward can be a
    third of their norm apart.
    """
    with torch.backends.cudnn.flags(enabled=True, deterministic=True):
        loss_of(network, images, labels, precision).backward()
    parameters = network.named_parameters()
    found = {name: parameter.grad.cpu() for name, parameter in parameters if parameter.grad is not None}
    network.zero_grad()
    return found


def check_agreement(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> None:
    """Raise an AssertionError if a gradient is farther from the plain network's than `tolerance` of its norm."""
    for name, expected in theirs.items():
        distance = ((ours[name] - expected).norm() / expected.norm()).item()
        if not distance <= tolerance:
            raise AssertionError(
                f"the first gradient of {name} is {distance:.2g} of its norm away from the plain network's: "
                f"rounding is {tolerance:g} at most"
            )


def stepper(network: nn.Module, images: Tensor, labels: Tensor, precision: str) -> Callable[[], float]:
    """Make a function that takes one training step and returns its seconds, until the device has finished it."""
    method = OPTIMIZERS["sgd"](network.parameters(), 0.01)

    def step() -> float:
        synchronize(images.device)
        start = time.perf_counter()
        method.zero_grad()
        loss_of(network, images, labels, precision).backward()
        method.step()
        synchronize(images.device)
        return time.perf_counter() - start

    return step


def observing(transform: GradientTransform) -> list[FeatureWhitening | OptimalInputGain]:
    """The parts of a transform that keep statistics."""
    return [part for part in transform.parts() if isinstance(part, FeatureWhitening | OptimalInputGain)]


def prepare(
    network: nn.Module, images: Tensor, labels: Tensor, transform: GradientTransform, cycle: int, options: Options
) -> tuple[dict[str, Callable[[], float]], dict[str, int]]:
    """Make a plain and a whitened copy of a network for each mode, check that they agree, and warm them up.

    Returns:
        Functions that take a step, and on a CUDA device the peak memory in bytes over a cycle of steps, each by the
        name of the copy, such as "whitened compiled". The peak is what training this one copy allocates, with the batch
        and without the other copies.

    Raises:
        AssertionError: a whitened copy's first gradient is not the plain one's.
    """
    batch = images, labels, options.precision
    # At first statistics are taken of every batch, which costs more than later.
    window = max(math.ceil(1 / (1 - part.decay)) + cycle for part in observing(transform))
    steps: dict[str, Callable[[], float]] = {}
    peaks: dict[str, int] = {}
    if images.is_cuda:  # cuBLAS takes its workspaces at the first product, and keeps them for all
        gradients(copy.deepcopy(network).to(images.device).to(memory_format=options.layout), *batch)
    for mode in MODES[options.compile]:
        expected = None
        for kind in ("plain", *(PARTS if options.takes_apart else ["whitened"])):
            name = f"{kind} {mode}"
            if images.is_cuda:
                others = torch.cuda.memory_allocated(images.device) - images.nbytes - labels.nbytes
            copied = copy.deepcopy(network).to(images.device).to(memory_format=options.layout)
            if kind != "plain":
                whiten(copied, transform)
            if mode == "compiled":
                copied.compile(fullgraph=True)
            # The answers agree before they are timed: until the first refresh a whitened gradient is the plain one.
            # Like is compared with like: what is compiled rounds elsewhere, in forward too.
            found = gradients(copied, *batch)
            expected = expected or found
            check_agreement(found, expected, TOLERANCE[options.precision])
            steps[name] = stepper(copied, *batch)
            for _ in tqdm(range(window), desc=name, unit="step", leave=False, dynamic_ncols=True):
                steps[name]()
            leave_out(copied, PARTS.get(kind, ()), options.batches)
            if images.is_cuda:
                torch.cuda.reset_peak_memory_stats(images.device)
                for _ in range(cycle):
                    steps[name]()
                peaks[name] = torch.cuda.max_memory_allocated(images.device) - others
    return steps, peaks


@dataclass(frozen=True)
class Part:
    """A part of a whitened step: seconds, operations and bytes that it adds, and the least seconds for those.

    The last two are the least seconds on a device that is not here, with what each call takes at least and without.
    """

    name: str
    seconds: float
    operations: float
    bytes: float
    calls: float
    least: float
    elsewhere: float
    elsewhere_without_calls: float


def count(steps: dict[str, Callable[[], float]], cycle: int) -> dict[str, Counting]:
    """Count what each network does in a cycle of steps that are not timed."""
    counted = {}
    for name, step in steps.items():
        with Counting() as counted[name]:
            for _ in tqdm(range(cycle), desc=f"counting {name}", unit="step", leave=False, dynamic_ncols=True):
                step()
    return counted


@contextmanager
def elsewhere_than_on_a_cpu() -> Iterator[None]:
    """Let no tensor be a CPU's: the library then reads no number, and computes with tensors instead, as on a GPU."""
    torch.Tensor.is_cpu = False  # type: ignore[misc, assignment]
    try:
        yield
    finally:
        del torch.Tensor.is_cpu


def parts_of(
    seconds: dict[str, float],
    counted: dict[str, Counting],
    counted_elsewhere: dict[str, Counting],
    cycle: int,
    peaks: Peaks,
    elsewhere: Peaks,
) -> list[Part]:
    """Take the parts of a step apart: what a network does more than the one that leaves the part out."""
    devices = elsewhere, replace(elsewhere, call=0.0)
    whole, *others = PARTS
    names = {"plain step": ("plain", None), "whitening": (whole, "plain")}
    names |= {"refreshes": (whole, others[0]), "statistics": (others[0], others[1]), "transform": (others[1], "plain")}
    totals: dict[str | None, list[float]] = {None: [0.0] * len(fields(Part)[1:])}
    for kind in ("plain", *PARTS):
        own, other = counted[f"{kind} eager"], counted_elsewhere[f"{kind} eager"]
        least = own.least_seconds(peaks), *map(other.least_seconds, devices)
        sums = own.operations, own.bytes, own.calls, *least
        totals[kind] = [seconds[f"{kind} eager"], *(number / cycle for number in sums)]
    return [
        Part(name, *(own - other for own, other in zip(totals[more], totals[less], strict=True)))
        for name, (more, less) in names.items()
    ]


def cut(seconds: list[float], cycle: int) -> list[list[float]]:
    """Cut the seconds of steps into stretches of whole cycles."""
    return [seconds[i : i + cycle] for i in range(0, len(seconds), cycle)]


def slowness(seconds: list[float], cycle: int) -> list[float]:
    """Divide the slowest step of each stretch by the stretch's median."""
    return [max(stretch) / statistics.median(stretch) for stretch in cut(seconds, cycle)]


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; return the exit status."""
    options = read(Options(), PROGRAM, __doc__, arguments)
    try:
        transform = options.transform.make()
    except ValueError as error:
        reject(PROGRAM, str(error))
    steady = not options.system_allocator and steady_allocator()
    torch.manual_seed(0)
    network, images, labels = task_of(options)
    is_image = images.dim() == 4
    images = images.to(options.device, memory_format=options.layout if is_image else torch.preserve_format)
    labels = labels.to(options.device)
    intervals = [
        (
            refresh_interval(options.batches, part.update_interval),
            observation_interval(options.batches, part.statistics_interval),
        )
        for part in observing(transform)
    ]
    cycle = math.lcm(*(interval for both in intervals for interval in both))
    print(describe())
    steps, peaks = prepare(network, images, labels, transform, cycle, options)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in tqdm(range(cycle * options.stretches), unit="round", dynamic_ncols=True):
        for name in list(steps) if number % 2 else list(steps)[::-1]:
            seconds[name].append(steps[name]())

    def stretches(name: str) -> list[float]:
        return list(map(statistics.mean, cut(seconds[name], cycle)))

    def ratios_of(kind: str, mode: str) -> list[float]:
        pairs = zip(stretches(f"{kind} {mode}"), stretches(f"plain {mode}"), strict=True)
        return [own / plain for own, plain in pairs]

    ratios = {mode: ratios_of("whitened", mode) for mode in MODES[options.compile]}
    hardware = device_name(images.device)
    shape = f", {options.size}×{options.size}" if is_image else ""
    title = f"{options.model}, batch {options.batch_size}{shape}, "
    title += f"{options.precision}{', channels_last' if options.channels_last else ''}, {hardware}, "
    title += "; ".join(part.extra_repr() for part in observing(transform)) + f", from batch {options.batches} on"
    title += "\nmemory kept between steps" if steady else "\nmemory as the system allocates it"
    medians = {name: statistics.median(stretches(name)) for name in steps}

    def times_plain(name: str) -> str:
        kind, _, mode = name.rpartition(" ")
        found = ratios_of(kind, mode)
        return "" if kind == "plain" else f"{statistics.median(found):.3f} ({min(found):.3f} to {max(found):.3f})"

    columns: list[Column] = [
        ("", str),
        ("ms a step", lambda name: f"{1e3 * medians[name]:.4g}"),
        ("samples a second", lambda name: f"{options.batch_size / medians[name]:.1f}"),
        ("times plain", times_plain),
        ("slowest / median", lambda name: f"{statistics.median(slowness(seconds[name], cycle)):.2f}"),
        ("peak MiB", lambda name: f"{peaks[name] / 2**20:.0f}" if name in peaks else "not measured"),
    ]
    result: dict[str, Any] = {}
    show(result, title, cells(columns, steps))
    for mode, all_ratios in ratios.items():
        middle = f"ratio {mode} {statistics.median(all_ratios):.3f} (median of {len(all_ratios)} stretches of"
        print(f"{middle} {cycle} steps, {min(all_ratios):.3f} to {max(all_ratios):.3f})")
    if options.takes_apart and options.compile != "yes":
        eager = {name: step for name, step in steps.items() if name.endswith("eager")}
        peak = measure_peaks(images.device)
        paper = PAPER[options.simulate] if options.simulate else peak
        counted = count(eager, cycle)
        counted_elsewhere = counted
        if options.simulate:
            with elsewhere_than_on_a_cpu():
                counted_elsewhere = count(eager, cycle)
        parts = parts_of(medians, counted, counted_elsewhere, cycle, peak, paper)
        title = f"a step's parts; peaks: {peak.operations / 1e9:.0f} Gflop/s in float32 products, "
        title += f"{peak.cache / 1e9:.0f} GB/s from the cache, {peak.memory / 1e9:.0f} GB/s from memory"
        plain = parts[0].seconds
        part_columns: list[Column] = [
            ("", lambda part: part.name),
            ("ms", lambda part: f"{1e3 * part.seconds:.4g}"),
            ("times plain", lambda part: f"{part.seconds / plain:.3f}"),
            ("Gflop", lambda part: f"{part.operations / 1e9:.4g}"),
            ("MB", lambda part: f"{part.bytes / 1e6:.4g}"),
            ("operations", lambda part: f"{part.calls:.0f}"),
            ("least ms", lambda part: f"{1e3 * part.least:.4g}"),
            ("least, times plain", lambda part: f"{part.least / plain:.3f}"),
        ]
        show(result, title, cells(part_columns, parts))
        if options.simulate:
            title = f"on paper, by {options.simulate}, where no number is read: {paper.operations / 1e12:g} Tflop/s in "
            title += f"float32 products, {(paper.half or paper.operations) / 1e12:g} in 16 bits, "
            title += f"{paper.memory / 1e12:g} TB/s, decompositions at {paper.decompositions:.0%}"
            first = parts[0]
            paper_columns: list[Column] = [
                ("", lambda part: part.name),
                (f"ms, {1e6 * paper.call:g} µs a call", lambda part: f"{1e3 * part.elsewhere:.4g}"),
                ("times plain", lambda part: f"{part.elsewhere / first.elsewhere:.3f}"),
                ("ms without that", lambda part: f"{1e3 * part.elsewhere_without_calls:.4g}"),
                ("times plain", lambda part: f"{part.elsewhere_without_calls / first.elsewhere_without_calls:.3f}"),
            ]
            show(result, title, cells(paper_columns, parts))
        result |= {"peaks": asdict(peak), "parts": list(map(asdict, parts))}
    names = ("model", "precision", "channels_last", "batch_size", "size", "batches")
    given = {name: getattr(options, name) for name in names}
    result |= {"transform": settings_of(transform), **given, "device": hardware}
    result |= {"steady_allocator": steady, "seconds": seconds, "ratios": ratios, "peak_bytes": peaks}
    return write(options, result)


if __name__ == "__main__":
    sys.exit(main())
