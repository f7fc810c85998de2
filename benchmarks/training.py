"""Training one network and keeping its curve; the transform's options on a command line."""

import argparse
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from tqdm import tqdm

from whiten_layers import Chain, FeatureWhitening, GradientTransform, OptimalInputGain, follow_learning_rate

from .data import Images

OPTIMIZERS = {
    "sgd": lambda parameters, lr: torch.optim.SGD(parameters, lr, momentum=0.9, weight_decay=5e-4),
    "adamw": lambda parameters, lr: torch.optim.AdamW(parameters, lr, weight_decay=5e-4),
}
OPTIONS = ("method", "features", "power", "output_power", "damping", "decay", "center", "rescale")
OPTIONS += ("update_interval", "statistics_interval", "max_rows", "block_size", "rank")  # of FeatureWhitening
SHARED_OPTIONS = ("decay", "update_interval", "statistics_interval", "max_rows")  # OptimalInputGain's, too
TRANSFORMS = ("whitening", "optimal_gain", "whitening+optimal_gain")
SMOOTHING = 25  # steps that a point of the smoothed loss averages over


@dataclass
class Curve:
    """What a run measured: the loss of every step, the seconds of training at it, and the test at the end."""

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    test_loss: float = float("nan")
    test_accuracy: float = float("nan")

    def smoothed(self) -> list[float]:
        """The mean loss of the last `SMOOTHING` steps, for every step that has as many behind it."""
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

    Batches and augmentations depend on `seed` alone: two networks with one seed see the same.
    """
    generator = Generator().manual_seed(seed)
    images, labels = data.train
    each = len(labels) // batch_size

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(epochs):
            order = torch.randperm(len(labels), generator=generator)
            for batch in order.split(batch_size)[:each]:
                yield data.augment(images[batch], generator), labels[batch]

    fit(network, batches(), epochs * each, optimizer=optimizer, lr=lr, label=label, curve=curve)
    curve.test_loss, curve.test_accuracy = evaluate(network, *data.test)


def fit(
    network: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    steps: int,
    *,
    optimizer: str,
    lr: float,
    label: str,
    curve: Curve,
) -> None:
    """Train on so many batches with a one-cycle schedule, which the steps of stochastic whitening follow.

    What is measured is in `curve` at once, so that an interrupted run keeps it; making the batches is not timed.
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


def positive(kind: type) -> Callable[[str], int | float]:
    """An argparse type: an int or float above zero."""

    def parse(text: str) -> int | float:
        value = kind(text)
        if not 0 < value < float("inf"):
            raise ValueError
        return value

    parse.__name__ = f"positive {kind.__name__}"  # as argparse names it in its message
    return parse


def add_transform_options(parser: argparse.ArgumentParser) -> None:
    """Give a command line the options of the transforms; what is not named keeps the transform's own default."""
    group = parser.add_argument_group("transform (an option that it does not have is not looked at)")
    group.add_argument("--transform", choices=TRANSFORMS, help="default: whitening")
    group.add_argument("--exact", action="store_true", help="start from FeatureWhitening.exact()")
    group.add_argument("--method")
    group.add_argument("--features")
    for name in ("power", "output-power", "damping", "gain-damping", "decay"):
        group.add_argument(f"--{name}", type=float)
    for name in ("update-interval", "statistics-interval", "max-rows", "block-size", "rank"):
        group.add_argument(f"--{name}", type=int)
    for name in ("center", "rescale"):
        group.add_argument(f"--{name}", action=argparse.BooleanOptionalAction)


def changed(options: argparse.Namespace, text: str) -> argparse.Namespace:
    """The same options with those of the transform that `text` names: ``method=recursive,rank=8``."""
    parser = argparse.ArgumentParser(add_help=False, prog=f"--compare {text}", usage=argparse.SUPPRESS)
    add_transform_options(parser)
    return parser.parse_args([f"--{part.strip()}" for part in text.split(",")], argparse.Namespace(**vars(options)))


def transform_from(options: argparse.Namespace) -> GradientTransform:
    """The transform that `add_transform_options` describes.

    Raises:
        ValueError: as `FeatureWhitening` and `OptimalInputGain` do.
    """
    given = {name: getattr(options, name) for name in OPTIONS if getattr(options, name) is not None}
    whitening = FeatureWhitening.exact(**given) if options.exact else FeatureWhitening(**given)
    if options.transform in (None, "whitening"):
        return whitening
    of_gains = {name: value for name, value in given.items() if name in SHARED_OPTIONS}
    if options.gain_damping is not None:
        of_gains["damping"] = options.gain_damping
    elif options.transform == "optimal_gain" and options.damping is not None:
        of_gains["damping"] = options.damping
    gains = OptimalInputGain(**of_gains)
    return gains if options.transform == "optimal_gain" else Chain(whitening, gains)


def transform_options(transform: GradientTransform) -> dict[str, Any]:
    """All that a transform was made with, to stand beside a figure; of a chain, by its members' place."""
    if isinstance(transform, Chain):
        return {str(place): transform_options(member) for place, member in enumerate(transform.members())}
    return {name: getattr(transform, name) for name in OPTIONS if hasattr(transform, name)}
