"""What does a whitened training step cost, against the plain one?

Steps of the plain and of the whitened network are timed in turn, on the same batch, so that all see
the machine as it is at that moment; compiled and not, if asked for, in the same run. A cycle of the whitened network's
schedule holds steps that update statistics or refresh inverses and steps that do neither: the time of a step is a mean
over whole cycles, and the ratio printed is the median over such stretches. On a CUDA device each network's peak memory
is taken before, while it alone trains.
"""

import argparse
import copy
import math
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
import whiten_layers.models
from torch import Tensor, nn
from tqdm import tqdm

from whiten_layers import FeatureWhitening, GradientTransform, OptimalInputGain, whiten

from .convergence import PLAIN
from .environment import describe, device_name, environment
from .output import aligned, write
from .timing import steady_allocator
from .training import OPTIMIZERS, add_transform_options, positive, transform_from, transform_options

MODES = {"no": ["eager"], "yes": ["compiled"], "both": ["eager", "compiled"]}
# How far two first gradients may be apart, of their norm. Both networks' forward passes are the same to the last bit,
# so that only backward's sums round differently: by a bfloat16's 2⁻⁹ in each of a hundred layers, or, where float32 is,
# by the 2⁻¹¹ of TF32, which cuDNN multiplies in.
TOLERANCE = {"fp32": 1e-3, "bf16": 5e-2}


def device(text: str) -> torch.device:
    """An argparse type: the CPU, or a CUDA device that is here."""
    if not re.fullmatch(r"cpu|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"{text!r}: must be cpu, cuda or cuda:N")
    chosen = torch.device(text)
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(f"{text!r}: CUDA devices that are here: {torch.cuda.device_count()}")
    return chosen


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def loss_of(network: nn.Module, images: Tensor, labels: Tensor, precision: str) -> Tensor:
    """Cross-entropy, ``()``, under autocast if the precision is "bf16"."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16"):
        return F.cross_entropy(network(images), labels)


def gradients(network: nn.Module, images: Tensor, labels: Tensor, precision: str) -> dict[str, Tensor]:
    """The gradient of every parameter, by its name, on the CPU; the network is left without.

    cuDNN computes deterministically: in bfloat16 the gradients of two passes that round differently in forward can be a
    third of their norm apart.
    """
    with torch.backends.cudnn.flags(enabled=True, deterministic=True):
        loss_of(network, images, labels, precision).backward()
    found = {name: parameter.grad.cpu() for name, parameter in network.named_parameters()}
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
    """A function that takes one training step and returns its seconds, to where the device has finished it."""
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


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; a wrong option ends the program with one line and status 2."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overhead", description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", choices=PLAIN, default="resnet20")
    parser.add_argument("--batch-size", type=positive(int), default=128)
    parser.add_argument("--size", type=positive(int), default=32, help="height and width of the images")
    parser.add_argument("--device", type=device, default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--precision", choices=TOLERANCE, default="fp32", help="bf16: by autocast")
    parser.add_argument("--channels-last", action="store_true", help="the memory format of images and weights")
    parser.add_argument("--compile", choices=MODES, default="no", help="torch.compile, or with and without in one run")
    parser.add_argument(
        "--stretches", type=positive(int), default=9, help="stretches of whole cycles to take the median of"
    )
    parser.add_argument("--system-allocator", action="store_true", help="leave memory allocation as the system has it")
    parser.add_argument("--out", type=Path, default=Path("results/overhead"), help="folder for results.json")
    add_transform_options(parser)
    options = parser.parse_args(arguments)
    try:
        options.transform = transform_from(options)
    except ValueError as error:
        parser.error(str(error))
    return options


def layout(options: argparse.Namespace) -> torch.memory_format:
    """How images and weights of four dimensions lie in memory."""
    return torch.channels_last if options.channels_last else torch.contiguous_format


def observing(transform: GradientTransform) -> list[FeatureWhitening | OptimalInputGain]:
    """Those parts of a transform that have statistics, and intervals."""
    return [part for part in transform.parts() if isinstance(part, FeatureWhitening | OptimalInputGain)]


def prepare(
    network: nn.Module, images: Tensor, labels: Tensor, cycle: int, options: argparse.Namespace
) -> tuple[dict[str, Callable[[], float]], dict[str, int]]:
    """Make a plain and a whitened copy of a network for each mode, check that they agree, and warm them up.

    Returns:
        What takes a step, and on a CUDA device the peak memory in bytes over a cycle of steps, each by the name of the
        copy: "whitened compiled". The peak is what training this one copy allocates, with the batch and without the
        other copies.

    Raises:
        AssertionError: a whitened copy's first gradient is not the plain one's.
    """
    batch = images, labels, options.precision
    # Every batch is observed at first.
    window = max(math.ceil(1 / (1 - part.decay)) + part.update_interval for part in observing(options.transform))
    steps: dict[str, Callable[[], float]] = {}
    peaks: dict[str, int] = {}
    if options.device.type == "cuda":  # cuBLAS takes its workspaces at the first product, and keeps them for all
        gradients(copy.deepcopy(network).to(options.device, memory_format=layout(options)), *batch)
    for mode in MODES[options.compile]:
        expected = None
        for kind in ("plain", "whitened"):
            name = f"{kind} {mode}"
            if options.device.type == "cuda":
                others = torch.cuda.memory_allocated(options.device) - images.nbytes - labels.nbytes
            copied = copy.deepcopy(network).to(options.device, memory_format=layout(options))
            if kind == "whitened":
                whiten(copied, options.transform)
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
            if options.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(options.device)
                for _ in range(cycle):
                    steps[name]()
                peaks[name] = torch.cuda.max_memory_allocated(options.device) - others
    return steps, peaks


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; return the exit status."""
    options = parse(arguments)
    transform = options.transform
    steady = not options.system_allocator and steady_allocator()
    torch.manual_seed(0)
    network = getattr(whiten_layers.models, options.model)()
    classes = network.fc.out_features
    images = torch.randn(options.batch_size, 3, options.size, options.size)
    images = images.to(options.device, memory_format=layout(options))
    labels = torch.randint(classes, (options.batch_size,)).to(options.device)
    intervals = [(part.update_interval, part.statistics_interval) for part in observing(transform)]
    cycle = math.lcm(*(interval for both in intervals for interval in both))
    print(describe())
    steps, peaks = prepare(network, images, labels, cycle, options)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in tqdm(range(cycle * options.stretches), unit="round", dynamic_ncols=True):
        for name in list(steps) if number % 2 else list(steps)[::-1]:
            seconds[name].append(steps[name]())

    def stretches(name: str) -> list[float]:
        return [statistics.mean(seconds[name][i : i + cycle]) for i in range(0, len(seconds[name]), cycle)]

    ratios = {
        mode: [w / p for w, p in zip(stretches(f"whitened {mode}"), stretches(f"plain {mode}"), strict=True)]
        for mode in MODES[options.compile]
    }
    hardware = device_name(options.device)
    print(f"\n{options.model}, {classes} classes, batch {options.batch_size}, {options.size}×{options.size}", end=", ")
    print(
        f"{options.precision}{', channels_last' if options.channels_last else ''}, {hardware},",
        "; ".join(part.extra_repr() for part in observing(transform)),
    )
    print("memory kept between steps" if steady else "memory as the system allocates it")
    table = [["", "ms a step", "images a second", "peak MiB"]]
    for name in steps:
        each = statistics.median(stretches(name))
        peak = f"{peaks[name] / 2**20:.0f}" if name in peaks else "not measured"
        table.append([name, f"{1e3 * each:.1f}", f"{options.batch_size / each:.1f}", peak])
    print(aligned(table))
    for mode, all_ratios in ratios.items():
        print(f"ratio {mode} {statistics.median(all_ratios):.3f} (median of {len(all_ratios)} stretches of", end=" ")
        print(f"{cycle} steps, {min(all_ratios):.3f} to {max(all_ratios):.3f})")
    result = {"environment": environment(), "transform": transform_options(transform), "model": options.model}
    result |= {
        "device": hardware,
        "precision": options.precision,
        "channels_last": options.channels_last,
        "classes": classes,
        "steady_allocator": steady,
        "batch_size": options.batch_size,
        "size": options.size,
        "seconds": seconds,
        "ratios": ratios,
        "peak_bytes": peaks,
    }
    write(options.out, result, {})
    return 0


if __name__ == "__main__":
    sys.exit(main())
