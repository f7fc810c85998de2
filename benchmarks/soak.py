"""Does a long training with faults now and then drift: in memory, in its matrices, in what it learns?

A small network is trained three times from the same weights on the same batches: without faults; with faults that must
leave no mark, so that its weights are those of the first run to the last bit; and with bad batches and errors too. A
step whose gradients are not finite is left out, as `GradScaler` does.
"""

import copy
import gc
import io
import random
import resource
import statistics
import sys
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Generator, Tensor, nn
from tqdm import tqdm

from whiten_layers import load_window_state_dict, plain_state_dict, report, whiten, window_state_dict
from whiten_layers.inverse import METHODS
from whiten_layers.statistics.whitening_factor import WhiteningFactor

from .environment import describe
from .options import PositiveInt, read
from .output import Column, annotate, cells, interruptible, show, write

CHECKS = 50  # how often memory and matrices are looked at
WARM = 0.2  # part of the steps after which memory is not to grow any more
CLASSES, SIZE, BATCH = 4, 8, 16


@dataclass(frozen=True)
class Options:
    """Options of the command line."""

    steps: PositiveInt = 20_000
    every: PositiveInt = 20  # steps between two faults, on the mean
    compiled: bool = False  # compile the model
    traced: bool = False  # count Python's memory too, by tracemalloc, which takes several times as long
    seed: int = 0
    out: Path = Path("results/soak")  # folder for results.json and soak.png


class Failure(Exception):
    """What faults raise."""


@dataclass
class Training:
    """A network in training, and what was seen of it."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)
    faults: Counter[str] = field(default_factory=Counter)
    checks: list[dict[str, float]] = field(default_factory=list)  # memory and least eigenvalue, at steps

    def step(self, images: Tensor, labels: Tensor) -> float:
        """Train a step, unless a gradient is not finite; return the loss."""
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.model(images), labels)
        loss.backward()
        if all(p.grad is None or p.grad.isfinite().all() for p in self.model.parameters()):
            self.optimizer.step()
        return loss.item()

    def check(self, step: int) -> None:
        """Note the memory, and the least eigenvalue of all matrices P."""
        gc.collect()
        factors = [part for part in self.model.modules() if isinstance(part, WhiteningFactor)]
        least = min(float(torch.linalg.eigvalsh(factor.precision.double()).min()) for factor in factors)
        one = {"step": step, "mib": resident() / 2**20, "least": least}
        self.checks.append(one | {"traced_kib": tracemalloc.get_traced_memory()[0] / 2**10})

    def weights(self) -> Tensor:
        """Return all parameters as one vector."""
        return torch.cat([parameter.detach().flatten() for parameter in self.model.parameters()])

    def row(self, name: str, other: "Training") -> dict[str, Any]:
        """Summarise the run beside another one."""
        warm = [one for one in self.checks if one["step"] > WARM * self.checks[-1]["step"]]
        tail = max(1, len(self.losses) // 20)
        return {
            "run": name,
            "faults": self.faults.total(),
            "loss": statistics.median(self.losses[-tail:]),
            "difference": float((self.weights() - other.weights()).abs().max()),
            "least": min(one["least"] for one in self.checks),
            "mib": warm[0]["mib"],
            "grown_mib": warm[-1]["mib"] - warm[0]["mib"],
            "grown_kib": warm[-1]["traced_kib"] - warm[0]["traced_kib"] if warm[0]["traced_kib"] else None,
            "is_finite": all(bool(value.isfinite().all()) for value in self.model.buffers()),
            "by_fault": dict(self.faults),
        }


def resident() -> int:
    """Return the bytes of memory that this process holds; 0 where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * resource.getpagesize()


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Make the images and labels of a step: waves of four lengths, with noise, beside a slope."""
    generator = Generator().manual_seed(step)
    labels = torch.randint(CLASSES, (BATCH,), generator=generator)
    places = torch.arange(float(SIZE * SIZE)).view(SIZE, SIZE)
    waves = torch.sin(places * (1 + labels.view(-1, 1, 1)) / 9)
    images = torch.stack([waves, places.expand(BATCH, SIZE, SIZE) / SIZE**2], 1)
    return images + 0.5 * torch.randn(images.shape, generator=generator), labels


def start(options: Options) -> Training:
    """Make the network and its optimizer."""
    torch.manual_seed(options.seed)
    layers = nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(216, 16), nn.ReLU(), nn.Linear(16, CLASSES)
    model = whiten(nn.Sequential(*layers))
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
    if options.compiled:
        model.compile()
    return Training(model, optimizer)


# Faults that leave no mark happen between two steps.


def _fails_forward(training: Training, images: Tensor, labels: Tensor) -> None:
    with suppressed(RuntimeError):
        training.model(images[..., 1:])


def _only_forward(training: Training, images: Tensor, labels: Tensor) -> None:
    training.model(images)


def _attacks(training: Training, images: Tensor, labels: Tensor) -> None:
    images = images.clone().requires_grad_()
    torch.autograd.grad(F.cross_entropy(training.model(images), labels), images)


def _evaluates(training: Training, images: Tensor, labels: Tensor) -> None:
    training.model.eval()
    with torch.no_grad():
        training.model(images)
    training.model.train()


def _trains_a_copy(training: Training, images: Tensor, labels: Tensor) -> None:
    other = copy.deepcopy(training.model)
    F.cross_entropy(other(images), labels).backward()


def _resumes(training: Training, images: Tensor, labels: Tensor) -> None:
    file = io.BytesIO()
    torch.save((training.model.state_dict(), window_state_dict(training.model)), file)
    file.seek(0)
    state, window = torch.load(file)
    training.model.load_state_dict(state)
    load_window_state_dict(training.model, window)


def _reports(training: Training, images: Tensor, labels: Tensor) -> None:
    str(report(training.model))
    plain_state_dict(training.model)


WITHOUT_MARK: dict[str, Callable[[Training, Tensor, Tensor], None]] = {
    "an error in a forward pass": _fails_forward,
    "a forward pass alone": _only_forward,
    "gradients of the images alone": _attacks,
    "an evaluation": _evaluates,
    "training of a copy": _trains_a_copy,
    "saving and loading": _resumes,
    "a report": _reports,
}


@contextmanager
def suppressed(*errors: type[BaseException]) -> Iterator[None]:
    """Go on after an error that was put there; its absence is one."""
    try:
        yield
    except errors:
        return
    raise AssertionError(f"{errors} was not raised")


def _no_rows(training: Training, images: Tensor, labels: Tensor) -> None:
    training.model(images[:0]).sum().backward()


def _fails_backward(training: Training, images: Tensor, labels: Tensor) -> None:
    def fail(gradient: Tensor) -> Tensor:
        raise Failure

    images.requires_grad_()
    images.register_hook(fail)  # the last thing of a pass, of a compiled one too
    with suppressed(Failure):
        training.step(images, labels)


def _interrupts_refreshes(training: Training, images: Tensor, labels: Tensor) -> None:
    methods = dict(METHODS)

    def fail(*_: Any) -> Any:
        raise KeyboardInterrupt

    METHODS.update({name: method._replace(inverse=fail) for name, method in methods.items()})
    try:
        with suppressed(KeyboardInterrupt):
            for _ in range(100):  # until one is due
                training.step(images, labels)
    finally:
        METHODS.update(methods)


def _changed(change: Callable[[Tensor], Tensor]) -> Callable[[Training, Tensor, Tensor], None]:
    def train(training: Training, images: Tensor, labels: Tensor) -> None:
        training.step(change(images.clone()), labels)

    return train


def _put(value: float) -> Callable[[Tensor], Tensor]:
    def change(images: Tensor) -> Tensor:
        images[3, 0, 2, 2] = value
        return images

    return change


def _one_class(training: Training, images: Tensor, labels: Tensor) -> None:
    training.step(images, torch.zeros_like(labels))


WITH_MARK: dict[str, Callable[[Training, Tensor, Tensor], None]] = {
    "an error in a backward pass": _fails_backward,
    "Ctrl-C in a refresh": _interrupts_refreshes,
    "a batch of no images": _no_rows,
    "a NaN": _changed(_put(torch.nan)),
    "an Inf": _changed(_put(torch.inf)),
    "a number of 1e30": _changed(_put(1e30)),
    "zeros": _changed(torch.zeros_like),
    "a constant": _changed(torch.ones_like),
    "one image many times": _changed(lambda images: images[:1].expand_as(images)),
    "numbers of 1e-30": _changed(lambda images: images * 1e-30),
    "a jump of three deviations": _changed(lambda images: images + 3 * images.std()),
    "wrong labels": _one_class,
}


# What PyTorch cannot do with a compiled network, a plain one too: it keeps 0.2 MiB of each error while it compiles for
# another size, and its convolution fails in the backward pass of a batch of no images.
NOT_COMPILED = ("an error in a forward pass", "a batch of no images")


def train(options: Options, faults: dict[str, Callable[[Training, Tensor, Tensor], None]], bar: tqdm) -> Training:
    """Train a network, with one of some faults now and then."""
    training, chance = start(options), random.Random(options.seed)
    with collecting(), tracing(options.traced):
        for step in range(options.steps):
            if faults and chance.random() < 1 / options.every:
                name = chance.choice(list(faults))
                training.optimizer.zero_grad()
                faults[name](training, *batch(options.steps + step))
                training.faults[name] += 1
            training.losses.append(training.step(*batch(step)))
            if (step + 1) % max(1, options.steps // CHECKS) == 0:
                training.check(step + 1)
            bar.update()
    return training


@contextmanager
def collecting() -> Iterator[None]:
    """Let collections in a block look at what is made in it alone, which takes a hundredth of the time."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def tracing(traced: bool) -> Iterator[None]:
    """Count what Python allocates in a block, if asked for."""
    if not traced:
        yield
        return
    tracemalloc.start()
    try:
        yield
    finally:
        tracemalloc.stop()


COLUMNS: list[Column] = [
    ("", "{run}"),
    ("faults", "{faults}"),
    ("loss", "{loss:.2g}"),
    ("weights differ by", "{difference:.3g}"),
    ("least eigenvalue of P", "{least:.3g}"),
    ("MiB", "{mib:.0f}"),
    ("grown by MiB", "{grown_mib:.1f}"),
    ("Python's by KiB", lambda row: "not counted" if row["grown_kib"] is None else f"{row['grown_kib']:.0f}"),
    ("state is finite", "{is_finite}"),
]
MEANING = f"""loss: median of the last twentieth of the steps; weights differ by: from those of the run without faults
MiB: of the whole process after {WARM:.0%} of the steps; grown: from then to the end"""


def plot(runs: dict[str, Training]) -> Figure:
    """Draw losses and memory against steps."""
    figure = Figure(figsize=(10, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, training in runs.items():
        width = max(1, len(training.losses) // 100)
        parts = [training.losses[first : first + width] for first in range(0, len(training.losses), width)]
        left.plot([width * (number + 0.5) for number in range(len(parts))], list(map(statistics.median, parts)))
        right.plot([one["step"] for one in training.checks], [one["mib"] for one in training.checks], label=name)
    left.set_yscale("log")
    annotate(left, "steps", "loss, median of a hundredth of the steps")
    annotate(right, "steps", "memory of the process, MiB")
    return figure


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; return the exit status."""
    options = read(Options(), "python -m benchmarks.soak", __doc__, arguments)
    print(describe())
    without, every = dict(WITHOUT_MARK), WITHOUT_MARK | WITH_MARK
    for name in NOT_COMPILED if options.compiled else ():
        without.pop(name, None)
        del every[name]
    kinds = {"no faults": {}, "faults without a mark": without, "all faults": every}
    runs: dict[str, Training] = {}
    result: dict[str, Any] = {}
    with interruptible(result):
        for name, faults in kinds.items():
            with tqdm(desc=name, total=options.steps, unit="step", dynamic_ncols=True) as bar:
                runs[name] = train(options, faults, bar)
    rows = [training.row(name, runs["no faults"]) for name, training in runs.items()]
    result["rows"], result["checks"] = rows, {name: training.checks for name, training in runs.items()}
    show(result, f"{options.steps} steps with a fault every {options.every} on the mean", cells(COLUMNS, rows))
    print(MEANING)
    return write(options, result, {"soak": lambda: plot(runs)})


if __name__ == "__main__":
    sys.exit(main())
