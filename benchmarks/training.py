"""Training one network and keeping its curve."""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop
from tqdm import tqdm

from whiten_layers import follow_learning_rate

from .data import Images

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "sgd": partial(SGD, momentum=0.9, weight_decay=5e-4),
    "adam": partial(Adam, weight_decay=5e-4),
    "adamw": partial(AdamW, weight_decay=5e-4),
    "rmsprop": partial(RMSprop, momentum=0.9, weight_decay=5e-4),
}
Batch = tuple[Tensor, Tensor]  # images or other inputs, and their classes
SMOOTHING = 25  # steps that a point of the smoothed loss averages over


@dataclass
class Curve:
    """Measurements of a run: the loss of every step, the seconds of training until then, and the test at the end."""

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    test_loss: float = float("nan")
    test_accuracy: float = float("nan")

    def smoothed(self) -> list[float]:
        """The mean loss of the last `SMOOTHING` steps, from the first step on that has so many."""
        losses = torch.tensor(self.losses, dtype=torch.float64)
        return losses.unfold(0, SMOOTHING, 1).mean(-1).tolist() if len(losses) >= SMOOTHING else []

    @property
    def final_loss(self) -> float:
        """The last point of the smoothed loss."""
        return self.smoothed()[-1] if len(self.losses) >= SMOOTHING else float("nan")

    def steps_until(self, loss: float) -> int | None:
        """The first step at which the smoothed loss is at most `loss`."""
        reached = [step for step, value in enumerate(self.smoothed(), start=SMOOTHING) if value <= loss]
        return reached[0] if reached else None


@torch.no_grad()
def evaluate(network: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """Mean cross-entropy and accuracy."""
    network.eval()
    logits = torch.cat([network(part) for part in images.split(400)])
    return F.cross_entropy(logits, labels).item(), (logits.argmax(1) == labels).float().mean().item()


def train(
    network: nn.Module,
    data: Images,
    *,
    optimizer: str,
    lr: float,
    epochs: int,
    batch_size: int,
    seed: int,
    label: str,
    curve: Curve,
) -> None:
    """Train on a data set and test, writing into `curve`.

    Batches and augmentations depend on `seed` alone: two networks with the same seed are trained on the same images.
    """
    generator = Generator().manual_seed(seed)
    images, labels = data.train
    each = len(labels) // batch_size

    def batches() -> Iterator[Batch]:
        for _ in range(epochs):
            order = torch.randperm(len(labels), generator=generator)
            for batch in order.split(batch_size)[:each]:
                yield data.augment(images[batch], generator), labels[batch]

    fit(network, batches(), epochs * each, optimizer=optimizer, lr=lr, label=label, curve=curve)
    curve.test_loss, curve.test_accuracy = evaluate(network, *data.test)


def fit(
    network: nn.Module, batches: Iterable[Batch], steps: int, *, optimizer: str, lr: float, label: str, curve: Curve
) -> None:
    """Train on `steps` batches with a one-cycle schedule, which the step size of stochastic whitening follows.

    Every step is written into `curve` at once, so that an interrupted run keeps it; making the batches is not timed.
    """
    method = OPTIMIZERS[optimizer](network.parameters(), lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(method, lr, total_steps=steps, cycle_momentum=False)
    follow_learning_rate(network, method)
    network.train()
    seconds, correct = 0.0, 0.0
    with tqdm(total=steps, desc=label, unit="step", dynamic_ncols=True) as bar:
        for inputs, targets in batches:
            start = time.perf_counter()
            method.zero_grad()
            logits = network(inputs)
            loss = F.cross_entropy(logits, targets)
            loss.backward()
            method.step()
            schedule.step()
            seconds += time.perf_counter() - start
            curve.losses.append(loss.item())
            curve.seconds.append(seconds)
            correct += 0.1 * ((logits.argmax(1) == targets).float().mean().item() - correct)
            bar.set_postfix(loss=f"{loss.item():.3f}", accuracy=f"{correct:.2f}")
            bar.update()
