"""Training of one network by one method, and a file of what was trained, so that an interrupted benchmark goes on."""

import json
import math
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Generator, nn
from torch.optim.lr_scheduler import LambdaLR

from ..output import finite
from ..safety_tasks import Batch, shuffled
from .methods import Training, find
from .tasks import TASKS, Task

WARM_UP = 0.1  # part of the steps in which the learning rate rises to its full height; then it falls as a cosine to 0
LOSSES = ("loss", "valid_loss", "test_loss")
SAMPLE = 40  # steps whose losses tell one version of a method from another


@dataclass(frozen=True)
class Setting:
    """What is trained, by what, and how: all that a run depends on. `version` is that of `version_of`."""

    task: str
    method: str
    lr: float
    weight_decay: float
    seed: int
    steps: int
    version: str


def height(step: int, steps: int) -> float:
    """Compute the learning rate of a step, as a part of its full height."""
    rise = max(1, round(WARM_UP * steps))
    if step < rise:
        return (step + 1) / rise
    return (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise))) / 2


def updates(task: Task, network: nn.Module, training: Training, steps: int, seed: int) -> Iterator[float]:
    """Train step by step, yielding each loss before its step."""
    schedules = [LambdaLR(method, lambda step: height(step, steps)) for method in training.optimizers]
    inputs, targets = task.data()[0]
    batches: Iterable[Batch] = shuffled((inputs, targets), task.batch_size, Generator().manual_seed(seed))
    network.train()
    for inputs, targets in islice(batches, steps):
        loss = task.loss(network(inputs), targets)
        network.zero_grad()
        loss.backward()
        training.step()
        for schedule in schedules:
            schedule.step()
        yield loss.item()


@torch.no_grad()
def evaluate(task: Task, network: nn.Module) -> dict[str, float | None]:
    """Compute the losses of both held-out parts, and for classes the accuracy of testing."""
    network.eval()
    measured: dict[str, float | None] = {}
    for name, (inputs, targets) in zip(("valid_loss", "test_loss"), task.data()[1:], strict=True):
        outputs = torch.cat([network(part) for part in inputs.split(256)])
        loss = task.loss(outputs, targets).item()
        measured[name] = loss if math.isfinite(loss) else math.inf
        is_class = not targets.is_floating_point()
        measured["test_accuracy"] = (outputs.argmax(1) == targets).float().mean().item() if is_class else None
    return measured


def start(task: Task, method: str, lr: float, weight_decay: float, seed: int) -> tuple[nn.Module, Training]:
    """Make a task's network, and what trains it; seed all generators, since one rival draws from NumPy's."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
    network = task.network()
    return network, find(method).make(network, lr, weight_decay)


def version_of(name: str, method: str) -> str:
    """Tell what a method does to a task today, by the mean loss of a few steps, to four digits.

    Runs of other code, of the method, of the library or of a package, are so told apart where they differ, and remain
    where they do not: a comment does not make ten hours of training worthless.
    """
    task, found = TASKS[name], find(method)
    network, training = start(task, method, found.lr, found.decay, 0)
    losses: list[float] = []
    with suppress(torch.linalg.LinAlgError):  # those before it stay
        losses.extend(updates(task, network, training, SAMPLE, 0))
    return f"{statistics.fmean(losses):.4g}" if losses else "fails"


def run(setting: Setting) -> dict[str, Any]:
    """Train and test a network. A run whose loss is not finite, or whose matrices cannot be inverted, has no losses.

    Returns:
        The setting; ``loss``, the mean training loss of the last tenth of the steps; ``valid_loss`` on the samples for
        choosing; ``test_loss`` and ``test_accuracy``.
    """
    task = TASKS[setting.task]
    network, training = start(task, setting.method, setting.lr, setting.weight_decay, setting.seed)
    losses: list[float] = []
    measured: dict[str, Any] = dict.fromkeys(LOSSES, math.inf) | {"test_accuracy": None}
    try:
        for loss in updates(task, network, training, setting.steps, setting.seed):
            if not math.isfinite(loss):
                break
            losses.append(loss)
        else:
            measured = {"loss": statistics.fmean(losses[-max(1, setting.steps // 10) :]), **evaluate(task, network)}
    except torch.linalg.LinAlgError:
        pass
    return asdict(setting) | measured


def pace(name: str, methods: Iterable[str], steps: int) -> dict[str, float]:
    """Measure the processor's seconds of a whole run of each method; the methods take turns by steps."""
    task = TASKS[name]
    taken = dict.fromkeys(methods, 0.0)
    streams = {}
    for method in taken:
        network, training = start(task, method, 1e-4 * find(method).lr, 0.0, 0)
        streams[method] = updates(task, network, training, steps, 0)
    for step in range(steps):
        for method in list(streams) if step % 2 else list(streams)[::-1]:
            before = time.process_time()
            next(streams[method])
            taken[method] += time.process_time() - before
    return taken


class Store:
    """The runs of a task, one a line of a file, to which each run is added when it is done."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.found = path, dict[Setting, dict[str, Any]]()
        text = path.read_text() if path.exists() else ""
        for line in text.splitlines():
            try:
                one = json.loads(line)
            except json.JSONDecodeError:  # the program was killed while it wrote this line
                continue
            one |= {key: math.inf for key in LOSSES if one[key] is None}
            self.found[Setting(**{key: one[key] for key in Setting.__dataclass_fields__})] = one
        if text and not text.endswith("\n"):
            self._add("")

    def _add(self, line: str) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(f"{line}\n")

    def get(self, setting: Setting, compute: Callable[[Setting], dict[str, Any]] = run) -> dict[str, Any]:
        """Return a run, which is made only if the file does not have it."""
        if setting not in self.found:
            self.found[setting] = one = compute(setting)
            self._add(json.dumps(finite(one)))
        return self.found[setting]
