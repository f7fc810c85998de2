"""The methods of `benchmarks.peers`: optimizers, rivals and whitened layers, each made for a network."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from whiten_layers import GradientTransform, convert_batchnorm, whiten

from ..safety_tasks import Transformer
from ..transforms import TransformOptions
from .curvature import FOOF, KFAC, MAC, Preconditioner
from .deconvolution import deconvolve

if not hasattr(torch.optim, "Muon"):
    raise ImportError(f"torch.optim.Muon is one of the methods; torch {torch.__version__} does not have it, 2.9 does")


@dataclass
class Training:
    """The optimizers of a network, and what is to be done with the gradients before they take a step."""

    optimizers: tuple[Optimizer, ...]
    precondition: Callable[[float], None] = lambda lr: None

    def step(self) -> None:
        """Take a step of all optimizers."""
        self.precondition(self.optimizers[0].param_groups[0]["lr"])
        for optimizer in self.optimizers:
            optimizer.step()


Make = Callable[[nn.Module, float, float], Training]  # of a network, a learning rate and a weight decay


@dataclass(frozen=True)
class Method:
    """A way to train a network, which it may change in place.

    `lr` and `decay` are where the search begins. `needs` names a kind of module without which it changes nothing.
    """

    make: Make
    lr: float
    decay: float
    needs: type[nn.Module] | None = None

    def suits(self, network: nn.Module) -> bool:
        """Tell whether the network has what the method changes."""
        return self.needs is None or any(isinstance(module, self.needs) for module in network.modules())


def plain(make: Callable[..., Optimizer], **options: Any) -> Make:
    """Train all parameters by one optimizer."""
    return lambda network, lr, decay: Training((make(network.parameters(), lr=lr, weight_decay=decay, **options),))


def others(network: nn.Module, chosen: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """List the parameters of a network that are not among the chosen."""
    ids = set(map(id, chosen))
    return [parameter for parameter in network.parameters() if id(parameter) not in ids]


class FlatMuon(torch.optim.Muon):
    """Muon that takes weights of any number of dimensions, as matrices of their first one and the others."""

    def __init__(self, weights: Iterable[nn.Parameter], **options: Any) -> None:
        self.weights = list(weights)
        super().__init__([nn.Parameter(weight.detach().flatten(1)) for weight in self.weights], **options)

    def step(self, closure: Any = None) -> Any:
        """Take a step; the matrices share their memory with the weights."""
        for weight, matrix in zip(self.weights, self.param_groups[0]["params"], strict=True):
            assert weight.grad is not None and matrix.data_ptr() == weight.data_ptr()
            matrix.grad = weight.grad.flatten(1)
        return super().step(closure)


def matrices(network: nn.Module, dims: Iterable[int]) -> Iterator[nn.Parameter]:
    """Yield the weights of hidden layers, of so many dimensions: all but the last layer's, as Muon's author advises."""
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d)
    layers: list[Any] = [module for module in network.modules() if isinstance(module, kinds)]
    yield from (layer.weight for layer in layers[:-1] if layer.weight.dim() in dims)


def muon(network: nn.Module, lr: float, decay: float, dims: Iterable[int] = (2, 3, 4)) -> Training:
    """Train weights by Muon, scaled to the length of AdamW's steps, and everything else by AdamW."""
    chosen = list(matrices(network, dims))
    made: list[Optimizer] = [AdamW(others(network, chosen), lr, weight_decay=decay)]
    if chosen:
        options: dict[str, Any] = {"lr": lr, "weight_decay": decay, "adjust_lr_fn": "match_rms_adamw"}
        made.append(FlatMuon(chosen, **options))
    return Training(tuple(made))


def singd(network: nn.Module, lr: float, decay: float) -> Training:
    """Train weights and biases of layers by SINGD (arXiv 2312.05705), and everything else by SGD with momentum.

    It does not know one-dimensional convolutions, which are left to SGD.
    """
    from singd.optim.optimizer import SINGD

    with_layers = [m for m in network.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    chosen = [p for module in with_layers for p in module.parameters()]
    options: dict[str, Any] = {"momentum": 0.9, "weight_decay": decay, "normalize_lr_cov": True}
    options |= {"T": 1, "lr_cov": 0.1}  # with the package's own, 10 and 0.01, short runs end where they began: at SGD
    options["loss_average"] = "batch+sequence" if isinstance(network, Transformer) else "batch"
    made: list[Optimizer] = [SINGD(network, params=chosen, lr=lr, **options)]
    if left := others(network, chosen):
        made.append(SGD(left, lr, momentum=0.9, weight_decay=decay))
    return Training(tuple(made))


def packaged(name: str, **options: Any) -> Make:
    """Train by an optimizer of pytorch_optimizer."""

    def make(network: nn.Module, lr: float, decay: float) -> Training:
        import pytorch_optimizer

        return plain(getattr(pytorch_optimizer, name), **options)(network, lr, decay)

    return make


def preconditioned(base: Make, preconditioner: Callable[[nn.Module], Preconditioner]) -> Make:
    """Replace the gradients before another method's step."""

    def make(network: nn.Module, lr: float, decay: float) -> Training:
        return Training(base(network, lr, decay).optimizers, preconditioner(network))

    return make


def changed(base: Make, change: Callable[[nn.Module], object]) -> Make:
    """Change the network before another method sees it."""

    def make(network: nn.Module, lr: float, decay: float) -> Training:
        change(network)
        return base(network, lr, decay)

    return make


def whitened(base: Make, transform: GradientTransform | None = None) -> Make:
    """Whiten the layers of a network that another method trains."""
    return changed(base, lambda network: whiten(network, transform))


def find(name: str) -> Method:
    """Return the method of a name, "muon", or of one with options, "whitened-adamw:power=1,rank=8", "kfac:damping=0.1".

    Raises:
        ValueError: there is none, or an option has a value that is not possible.
    """
    base, colon, text = name.partition(":")
    if base not in METHODS:
        raise ValueError(name)
    method = METHODS[base]
    if not colon:
        return method
    if base in WHITENED:
        return replace(method, make=whitened(WHITENED[base], TransformOptions().changed(text).make()))
    option, _, number = text.partition("=")
    if base not in PRECONDITIONED or option != "damping":
        raise ValueError(name)
    optimizer, preconditioner = PRECONDITIONED[base]
    return replace(method, make=preconditioned(optimizer, partial(preconditioner, damping=float(number))))


sgd, adamw = plain(SGD, momentum=0.9), plain(AdamW)
WHITENED = {"whitened-sgd": sgd, "whitened-adamw": adamw, "whitened-muon": muon}
PRECONDITIONED: dict[str, tuple[Make, Callable[..., Preconditioner]]] = {
    "foof": (sgd, FOOF),
    "kfac": (sgd, KFAC),
    "mac": (sgd, MAC),
    "newton-muon": (muon, partial(FOOF, damping=0.2)),
}
METHODS: dict[str, Method] = {
    "sgd": Method(sgd, 0.05, 5e-4),
    "adamw": Method(adamw, 0.004, 0.01),
    "muon-linear": Method(partial(muon, dims=(2,)), 0.004, 0.01),  # torch's own takes matrices only
    "muon": Method(muon, 0.004, 0.01),
    "soap": Method(packaged("SOAP"), 0.004, 0.01),
    "shampoo": Method(
        packaged(
            "ScalableShampoo", decoupled_weight_decay=True, preconditioning_compute_steps=10, shape_interpretation=False
        ),
        0.02,
        0.01,
    ),
    "psgd-kron": Method(packaged("Kron"), 0.002, 0.01),
    "singd": Method(singd, 0.01, 5e-4),
    "foof": Method(preconditioned(*PRECONDITIONED["foof"]), 0.01, 5e-4),
    "kfac": Method(preconditioned(*PRECONDITIONED["kfac"]), 0.05, 5e-4),
    "mac": Method(preconditioned(*PRECONDITIONED["mac"]), 0.05, 5e-4),
    "newton-muon": Method(preconditioned(*PRECONDITIONED["newton-muon"]), 0.004, 0.01),
    "deconvolution": Method(changed(sgd, deconvolve), 0.05, 5e-4),
    "iter-norm": Method(
        changed(sgd, lambda network: convert_batchnorm(network, "iter_norm")), 0.05, 5e-4, needs=nn.BatchNorm2d
    ),
    "whitened-sgd": Method(whitened(sgd), 0.05, 5e-4),
    "whitened-adamw": Method(whitened(adamw), 0.004, 0.01),
    "whitened-muon": Method(whitened(muon), 0.004, 0.01),
}
# As many other choices for those of the rivals that have a damping as for whitened layers.
VARIANTS = (
    "whitened-sgd:output-power=0.5",
    "whitened-adamw:output-power=0.5",
    "whitened-adamw:transform=eigenbasis",
    "foof:damping=1",
    "kfac:damping=0.1",
    "mac:damping=0.1",
)
