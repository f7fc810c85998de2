"""What does a whitened training step cost, against the plain one?

Steps of the plain and of the whitened network are timed in turn, on the same batch, so that both see
the machine as it is at that moment. A cycle of the whitened network's schedule holds steps that
update statistics or refresh inverses and steps that do neither: the time of a step is a mean over
whole cycles, and the ratio printed is the median over such stretches.
"""

import argparse
import copy
import math
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

from whiten_layers import whiten

from .convergence import MODELS
from .environment import describe, environment
from .output import write
from .timing import steady_allocator
from .training import OPTIMIZERS, add_transform_options, positive, transform_from, transform_options


def stepper(network: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], float]:
    """A function that takes one training step and returns its seconds."""
    method = OPTIMIZERS["sgd"](network.parameters(), 0.01)

    def step() -> float:
        start = time.perf_counter()
        method.zero_grad()
        F.cross_entropy(network(images), labels).backward()
        method.step()
        return time.perf_counter() - start

    return step


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overhead", description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", choices=MODELS, default="resnet20")
    parser.add_argument("--batch-size", type=positive(int), default=128)
    parser.add_argument("--size", type=positive(int), default=32, help="height and width of the images")
    parser.add_argument(
        "--stretches", type=positive(int), default=9, help="stretches of whole cycles to take the median of"
    )
    parser.add_argument("--system-allocator", action="store_true", help="leave memory allocation as the system has it")
    parser.add_argument("--out", type=Path, default=Path("results/overhead"), help="folder for results.json")
    add_transform_options(parser)
    options = parser.parse_args(arguments)
    try:
        transform = transform_from(options)
    except ValueError as error:
        parser.error(str(error))
    steady = not options.system_allocator and steady_allocator()
    torch.manual_seed(0)
    plain = getattr(whiten_layers.models, options.model)()
    whitened = whiten(copy.deepcopy(plain), transform)
    images = torch.randn(options.batch_size, 3, options.size, options.size)
    labels = torch.randint(10, (options.batch_size,))
    # The answers agree before they are timed: until the first refresh a whitened gradient is the plain one.
    for network in (plain, whitened):
        F.cross_entropy(network(images), labels).backward()
    for ours, theirs in zip(whitened.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)
    steps = {"plain": stepper(plain.train(), images, labels), "whitened": stepper(whitened.train(), images, labels)}
    cycle = math.lcm(transform.update_interval, transform.statistics_interval)
    window = math.ceil(1 / (1 - transform.decay)) + transform.update_interval  # every batch is observed at first
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    print(describe())
    for number in tqdm(range(window + cycle * options.stretches), unit="pair", dynamic_ncols=True):
        order = list(steps) if number % 2 else list(steps)[::-1]
        for name in order:
            taken = steps[name]()
            if number >= window:
                seconds[name].append(taken)

    def stretches(name: str) -> list[float]:
        return [statistics.mean(seconds[name][i : i + cycle]) for i in range(0, len(seconds[name]), cycle)]

    ratios = [w / p for w, p in zip(stretches("whitened"), stretches("plain"), strict=True)]
    print(f"\n{options.model}, batch {options.batch_size}, {options.size}×{options.size}, {transform.extra_repr()}")
    print("memory kept between steps" if steady else "memory as the system allocates it")
    for name in steps:
        print(f"{name:9} {1e3 * statistics.median(stretches(name)):8.1f} ms a step")
    print(f"ratio     {statistics.median(ratios):8.3f} (median of {len(ratios)} stretches of {cycle} steps,", end=" ")
    print(f"{min(ratios):.3f} to {max(ratios):.3f})")
    result = {"environment": environment(), "transform": transform_options(transform), "model": options.model}
    result |= {
        "steady_allocator": steady,
        "batch_size": options.batch_size,
        "size": options.size,
        "seconds": seconds,
        "ratios": ratios,
    }
    write(options.out, result, {})
    return 0


if __name__ == "__main__":
    sys.exit(main())
