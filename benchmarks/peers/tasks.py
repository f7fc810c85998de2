"""The tasks of `benchmarks.peers`: networks of many kinds on data that pip packages ship, with held-out samples.

The samples that are held out are of two halves: for the choice of a learning rate and a weight decay, and for what is
reported.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial

import torch
import torch.nn.functional as F
import whiten_layers.models
from torch import Generator, Tensor, nn

from ..data import crops, standardised
from ..safety_tasks import Batch, Block, Transformer, convnet_1d, digits, mlp, mnist, prices, signals, source

Parts = tuple[Batch, Batch, Batch]  # inputs and targets for training, for choosing, and for testing


@dataclass(frozen=True)
class Task:
    """A network to be trained on inputs and targets, and tested on others.

    The network is made after `torch.manual_seed`.
    """

    network: Callable[[], nn.Module]
    data: Callable[[], Parts]
    steps: int
    batch_size: int
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy


def parts(train: Batch, held_out: Batch) -> Parts:
    """Divide what is held out in two, taking turns by samples."""
    return train, tuple(part[::2] for part in held_out), tuple(part[1::2] for part in held_out)


def split(data: Sequence[Tensor], held_out: int) -> tuple[Batch, Batch]:
    """Take so many samples, drawn by a fixed seed, out of a data set."""
    order = torch.randperm(len(data[0]), generator=Generator().manual_seed(0))
    test, train = order[:held_out], order[held_out:]
    return tuple(part[train] for part in data), tuple(part[test] for part in data)


@cache
def crops_data() -> Parts:
    """Cut the crops of two photographs."""
    data = crops()
    return parts(data.train, data.test)


@cache
def mnist_images(size: int) -> Parts:
    """Load MNIST's digits, four in five for training, as images ``(N, 1, size, size)``."""
    pixels, labels = mnist()
    images = (pixels.view(-1, 1, 28, 28) - 0.1307) / 0.3081
    return parts(*split((F.avg_pool2d(images, 28 // size), labels), 1000))


@cache
def signals_data() -> Parts:
    """Make the signals of MNIST-1D ``(N, 1, 40)``, with its own division."""
    return parts(signals(), signals(test=True))


@cache
def diamonds_data() -> Parts:
    """Load the diamonds, one in ten held out, but for those that are in the training set too."""
    (inputs, targets), (others, other_targets) = split(prices(), 5394)
    known = {row.numpy().tobytes() for row in inputs}
    fresh = torch.tensor([row.numpy().tobytes() not in known for row in others])
    inputs, others = standardised(inputs, others[fresh])
    targets, other_targets = standardised(targets, other_targets[fresh])
    return parts((inputs, targets), (others, other_targets))


@cache
def digits_to_copy() -> Parts:
    """Load the handwritten digits ``(N, 64)`` twice, as inputs and as targets."""
    (pixels,), (others,) = split(digits()[:1], 360)
    pixels, others = standardised(pixels, others)
    return parts((pixels, pixels), (others, others))


@cache
def characters() -> Parts:
    """Read windows of 64 characters and those one further; the last tenth of the text is held out."""
    text = source()
    end = len(text) * 9 // 10
    train, test = text[:end].unfold(0, 65, 1), text[end:].unfold(0, 65, 64)
    return parts((train[:, :-1], train[:, 1:]), (test[:, :-1], test[:, 1:]))


class Patches(nn.Module):
    """Cuts images into patches and maps each to a vector. Shape: ``(N, C, H, W)`` -> ``(N, L, width)``."""

    def __init__(self, channels: int, size: int, patch: int, width: int) -> None:
        super().__init__()
        self.cut = nn.Conv2d(channels, width, patch, stride=patch)
        self.positions = nn.Parameter(0.02 * torch.randn((size // patch) ** 2, width))

    def forward(self, images: Tensor) -> Tensor:
        return self.cut(images).flatten(2).mT + self.positions


class Mean(nn.Module):
    """Averages over patches. Shape: ``(N, L, width)`` -> ``(N, width)``."""

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs.mean(1)


def vision_transformer(
    channels: int, size: int, patch: int, classes: int, width: int = 64, depth: int = 2
) -> nn.Module:
    """Make a small vision transformer, which averages over its patches at the end."""
    blocks = [Block(width, 4, is_causal=False) for _ in range(depth)]
    return nn.Sequential(
        Patches(channels, size, patch, width), *blocks, nn.LayerNorm(width), Mean(), nn.Linear(width, classes)
    )


class MixerBlock(nn.Module):
    """A perceptron across patches, and one across channels (arXiv 2105.01601). Shape: ``(N, L, width)``."""

    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.across_patches = mlp(length, 2 * length, length, activation=nn.GELU)
        self.across_channels = mlp(width, 4 * width, width, activation=nn.GELU)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = inputs + self.across_patches(self.norms[0](inputs).mT).mT
        return hidden + self.across_channels(self.norms[1](hidden))


def mixer(channels: int, size: int, patch: int, classes: int, width: int = 64, depth: int = 2) -> nn.Module:
    """Make a small MLP-mixer."""
    blocks = [MixerBlock((size // patch) ** 2, width) for _ in range(depth)]
    return nn.Sequential(
        Patches(channels, size, patch, width), *blocks, nn.LayerNorm(width), Mean(), nn.Linear(width, classes)
    )


class GreyResNet(nn.Module):
    """A ResNet-20 for images of one channel, which it sees three times."""

    def __init__(self) -> None:
        super().__init__()
        self.body = whiten_layers.models.resnet20(num_classes=10)

    def forward(self, images: Tensor) -> Tensor:
        return self.body(images.expand(-1, 3, -1, -1))


def perceptron_of_signals() -> nn.Module:
    """Make the multilayer perceptron of MNIST-1D's authors."""
    return nn.Sequential(nn.Flatten(), mlp(40, 100, 100, 10))


TASKS: dict[str, Task] = {
    "resnet20-crops": Task(partial(whiten_layers.models.resnet20, num_classes=8), crops_data, 120, 32),
    "resnet20-mnist": Task(GreyResNet, partial(mnist_images, 14), 150, 64),
    "vit-mnist": Task(partial(vision_transformer, 1, 28, 4, 10), partial(mnist_images, 28), 200, 64),
    "vit-crops": Task(partial(vision_transformer, 3, 32, 4, 8), crops_data, 200, 64),
    "mixer-crops": Task(partial(mixer, 3, 32, 4, 8), crops_data, 200, 64),
    "convnet-mnist1d": Task(convnet_1d, signals_data, 600, 100),
    "mlp-mnist1d": Task(perceptron_of_signals, signals_data, 600, 100),
    "mlp-diamonds": Task(partial(mlp, 26, 128, 128, 1), diamonds_data, 800, 128, F.mse_loss),
    "autoencoder-digits": Task(
        partial(mlp, 64, 128, 64, 32, 12, 32, 64, 128, 64, activation=nn.Tanh), digits_to_copy, 800, 64, F.mse_loss
    ),
    "transformer-source": Task(Transformer, characters, 300, 16),
}
TUNED = ("resnet20-crops", "mixer-crops", "convnet-mnist1d", "mlp-diamonds", "transformer-source")  # the others confirm
