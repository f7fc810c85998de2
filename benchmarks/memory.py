"""How much memory does whitening add: to what a model keeps, and to the most that a training step needs?

What is kept is counted from sizes, of models without data, so that large ones can be asked for. The peak is that of all
tensors alive at one time in the first steps of a training, refreshes among them, counted operation by operation on this
machine; what an operation allocates and frees within itself is not seen.
"""

import copy
import gc
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import torchvision
import whiten_layers.models
from torch import Tensor, nn
from tqdm import tqdm

from whiten_layers import GradientTransform, whiten
from whiten_layers.statistics.covariance import FeatureCovariance

from . import overhead
from .allocations import PeakMemory
from .distributed import Transformer as Decoder
from .environment import describe
from .options import PositiveInt, choice, read
from .output import Column, cells, interruptible, show, write
from .training import OPTIMIZERS
from .transforms import TransformOptions, settings_of

MIB = 2**20
KEPT: dict[str, Callable[[], nn.Module]] = {
    "ResNet-20": whiten_layers.models.resnet20,
    "ResNet-18": torchvision.models.resnet18,
    "ResNet-50": torchvision.models.resnet50,
    "ViT-B/16": torchvision.models.vit_b_16,
    "linear layers of a 7B decoder": Decoder,
}
TRAINED = {
    "MLP, 64 rows": overhead.Options("mlp", 64),
    "ResNet-20, 128 images of 32×32": overhead.Options("resnet20", 128, 32),
    "ResNet-18, 64 images of 64×64": overhead.Options("resnet18", 64, 64),
    "ResNet-50, 16 images of 224×224": overhead.Options("resnet50", 16, 224),
    "transformer, 64 texts of 64 characters": overhead.Options("transformer", 64),
}


@dataclass(frozen=True)
class Options:
    """Options of the command line."""

    steps: PositiveInt = 9  # of which the most that is alive is taken; P is refreshed in the first, 2nd, 4th and 8th
    optimizer: Annotated[str, choice(OPTIMIZERS)] = "sgd"
    out: Path = Path("results/memory")  # folder for results.json
    transform: TransformOptions = field(default_factory=TransformOptions)


def size_of(tensors: Iterable[Tensor]) -> int:
    """Count the bytes of tensors, of which none comes twice."""
    return sum(tensor.nbytes for tensor in tensors)


def kept(make: Callable[[], nn.Module], transform: GradientTransform) -> dict[str, Any]:
    """Count what a model keeps: its parameters, and what whitening adds, between and within two refreshes."""
    with torch.device("meta"):
        model = make()
        plain = size_of(model.buffers())
        model = whiten(model, transform)
    parameters, state = size_of(model.parameters()), size_of(model.buffers()) - plain
    covariances = [part for part in model.modules() if isinstance(part, FeatureCovariance)]
    window = size_of(one.running_covariance for one in covariances)
    return {
        "parameters": parameters / MIB,
        "state": state / MIB,
        "with_window": (state + window) / MIB,
        "ratio": (state + window) / parameters,
    }


def peak(network: nn.Module, inputs: Tensor, labels: Tensor, options: Options) -> int:
    """Train some steps; return the bytes of the most tensors alive at one time, with the model's own."""
    optimizer = OPTIMIZERS[options.optimizer](network.parameters(), 1e-3)
    before = size_of([*network.parameters(), *network.buffers(), inputs, labels])
    gc.collect()
    with PeakMemory() as memory:
        for _ in range(options.steps):
            optimizer.zero_grad()
            overhead.loss_of(network, inputs, labels, "fp32").backward()
            optimizer.step()
    return before + memory.peak


KEPT_COLUMNS: list[Column] = [
    ("", "{model}"),
    ("parameters, MiB", "{parameters:.1f}"),
    ("whitening's state, MiB", "{state:.1f}"),
    ("with an open window", "{with_window:.1f}"),
    ("of the parameters", "{ratio:.2f}"),
]
PEAK_COLUMNS: list[Column] = [
    ("", "{model}"),
    ("plain, MiB", "{plain:.1f}"),
    ("whitened, MiB", "{whitened:.1f}"),
    ("ratio", "{ratio:.3f}"),
]


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; return the exit status: 130 where Ctrl-C cut it short."""
    options = read(Options(), "python -m benchmarks.memory", __doc__, arguments)
    transform = options.transform.make()
    print(describe())
    result: dict[str, Any] = {"transform": settings_of(transform), "peaks": []}
    result["kept"] = [{"model": name, **kept(make, transform)} for name, make in KEPT.items()]
    show(result, "kept beside the model, from sizes", cells(KEPT_COLUMNS, result["kept"]))
    with interruptible(result), tqdm(total=len(TRAINED), unit="network", dynamic_ncols=True) as bar:
        for name, task in TRAINED.items():
            bar.set_postfix_str(name)
            torch.manual_seed(0)
            network, inputs, labels = overhead.task_of(task)
            whitened = whiten(copy.deepcopy(network), transform)
            plain, ours = (peak(one, inputs, labels, options) for one in (network, whitened))
            row = {"model": name, "plain": plain / MIB, "whitened": ours / MIB, "ratio": ours / plain}
            result["peaks"].append(row)
            bar.update()
    title = f"most that is alive at one time in the first {options.steps} steps, {options.optimizer}"
    show(result, title, cells(PEAK_COLUMNS, result["peaks"]))
    return write(options, result)


if __name__ == "__main__":
    sys.exit(main())
