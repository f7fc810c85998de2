"""Methods that precondition gradients by statistics of layers, from their formulas: FOOF, K-FAC, MAC.

Each watches the inputs of linear and convolutional layers, and K-FAC the gradients of their outputs, by hooks; and
multiplies the weights' gradients between the backward pass and the optimizer's step. Biases, norms and embeddings keep
their plain gradients. Statistics and inverses are renewed at every tenth batch.

A row x is an input of a linear layer, or a patch; δ is the gradient of the loss with respect to one output. G is the
gradient of a weight as a matrix ``(S, M)``.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

INTERVAL = 10  # batches between two updates of the statistics
DECAY = 0.95


@dataclass
class Watched:
    """A layer, its rows of the last batch, and what a method keeps of it."""

    layer: Any
    rows: Tensor | None = None  # (N·positions, M)
    gradients: Tensor | None = None  # (N·positions, S)
    state: dict[str, Tensor] = field(default_factory=dict)
    observed: int = 0  # batches, with the present one

    def average(self, name: str, value: Tensor) -> Tensor:
        """Move a running average of the weight min(1 − 1/k, 0.95) at the k-th batch, as K-FAC's paper does."""
        before = self.state.get(name, value)
        self.state[name] = torch.lerp(value, before, min(1 - 1 / self.observed, DECAY))
        return self.state[name]


def input_rows(layer: Any, inputs: Tensor) -> Tensor:
    """Arrange a layer's inputs as rows ``(N·positions, M)``."""
    if isinstance(layer, nn.Linear):
        return inputs.flatten(0, -2)
    two = isinstance(layer, nn.Conv2d)
    sizes = [layer.kernel_size, layer.dilation, layer.padding, layer.stride]
    images = inputs if two else inputs.unsqueeze(2)
    kernel, dilation, padding, stride = (
        given if two else (neutral, *given) for given, neutral in zip(sizes, (1, 1, 0, 1), strict=True)
    )
    return F.unfold(images, kernel, dilation, padding, stride).mT.flatten(0, 1)


def output_rows(layer: Any, gradient: Tensor) -> Tensor:
    """Arrange the gradient of a layer's outputs as rows ``(N·positions, S)``."""
    return gradient.flatten(0, -2) if isinstance(layer, nn.Linear) else gradient.flatten(2).mT.flatten(0, 1)


def damped_inverse(moment: Tensor, damping: Tensor | float) -> Tensor:
    """Invert ``moment + damping · I`` by its Cholesky factor."""
    eye = torch.eye(len(moment), dtype=moment.dtype)
    return torch.cholesky_inverse(torch.linalg.cholesky(moment + damping * eye))


class Preconditioner(ABC):
    """Multiplication of weights' gradients by what the statistics of the layers give.

    Args:
        network: whose linear layers and convolutions, of one group, in one or two dimensions, are watched.
    """

    def __init__(self, network: nn.Module) -> None:
        kinds = (nn.Linear, nn.Conv1d, nn.Conv2d)
        self.watched = [Watched(layer) for layer in network.modules() if isinstance(layer, kinds)]
        self.batch = 0
        for one in self.watched:
            one.layer.register_forward_hook(lambda _, inputs, output, one=one: self._watch(one, inputs[0], output))

    def _watch(self, one: Watched, inputs: Tensor, output: Tensor) -> None:
        if output.requires_grad and self.batch % INTERVAL == 0:
            one.rows = input_rows(one.layer, inputs.detach())

            def keep(gradient: Tensor) -> None:
                one.gradients = output_rows(one.layer, gradient)

            output.register_hook(keep)

    @torch.no_grad()
    def __call__(self, lr: float) -> None:
        """Replace the gradients of the watched weights."""
        for one in self.watched:
            if self.batch % INTERVAL == 0 and one.rows is not None and one.gradients is not None:
                one.observed += 1
                self.observe(one, one.rows, one.gradients)
                one.rows = one.gradients = None
            matrix = one.layer.weight.grad.flatten(1)
            mapped = self.map(one.state, matrix)
            one.state["product"] = (mapped * matrix).sum()
            one.layer.weight.grad.copy_(mapped.view_as(one.layer.weight))
        self.batch += 1
        self.finish(lr)

    @abstractmethod
    def observe(self, one: Watched, rows: Tensor, gradients: Tensor) -> None:
        """Take the rows of a batch into the statistics."""

    @abstractmethod
    def map(self, state: dict[str, Tensor], gradient: Tensor) -> Tensor:
        """Compute the new gradient ``(S, M)`` of a weight."""

    def finish(self, lr: float) -> None:  # noqa: B027
        """Do what takes all layers' gradients."""


class FOOF(Preconditioner):
    """``G (A + λI)⁻¹`` with the moving average A of E[x xᵀ] (arXiv 2201.12250).

    Args:
        damping: λ as a multiple of the mean of A's diagonal. The paper tunes an absolute λ; a relative one is the same
            number of trials for every task.
    """

    def __init__(self, network: nn.Module, damping: float = 0.1) -> None:
        super().__init__(network)
        self.damping = damping

    def observe(self, one: Watched, rows: Tensor, gradients: Tensor) -> None:
        moment = one.average("inputs", rows.mT @ rows / len(rows))
        one.state["inverse"] = damped_inverse(moment, self.damping * moment.trace() / len(moment))

    def map(self, state: dict[str, Tensor], gradient: Tensor) -> Tensor:
        return gradient @ state["inverse"]


class KFAC(Preconditioner):
    """``(B + √λ/π I)⁻¹ G (A + π√λ I)⁻¹`` (arXiv 1503.05671, for convolutions 1602.01407), with its limit on a step.

    A is E[x xᵀ], averaged over positions; B is E[δ δᵀ], summed over them, of one term of the loss, which is a mean over
    samples, or over samples and positions where the network's outputs have positions. The δ are those of the true
    targets (the empirical Fisher matrix), not of targets drawn from the network's outputs, which would take another
    backward pass. π² is the ratio of the two mean diagonals. All gradients are shortened together, such that
    ``lr² Σ ⟨Ĝ, G⟩`` is at most `clip`.
    """

    def __init__(self, network: nn.Module, damping: float = 1e-3, clip: float = 1e-3) -> None:
        super().__init__(network)
        self.damping, self.clip = damping, clip
        self.terms = 0
        network.register_forward_hook(self._count)

    def _count(self, network: nn.Module, inputs: tuple[Tensor, ...], outputs: Tensor) -> None:
        self.terms = outputs[:, 0].numel()  # (N, classes) or (N, classes, L)

    def observe(self, one: Watched, rows: Tensor, gradients: Tensor) -> None:
        inputs = one.average("inputs", rows.mT @ rows / len(rows))
        outputs = one.average("outputs", self.terms * gradients.mT @ gradients)  # δ of a mean is 1/N of a term's
        ratio = (inputs.trace() / len(inputs) / (outputs.trace() / len(outputs))).sqrt().clamp(1e-6, 1e6)
        one.state["inverse"] = damped_inverse(inputs, ratio * math.sqrt(self.damping))
        one.state["other"] = damped_inverse(outputs, math.sqrt(self.damping) / ratio)

    def map(self, state: dict[str, Tensor], gradient: Tensor) -> Tensor:
        return state["other"] @ gradient @ state["inverse"]

    def finish(self, lr: float) -> None:
        total = lr**2 * sum(one.state["product"].item() for one in self.watched)
        if total > self.clip:
            for one in self.watched:
                one.layer.weight.grad.mul_(math.sqrt(self.clip / total))


class MAC(Preconditioner):
    """``G (I − a aᵀ / (λ + aᵀa))`` with the moving average a of E[x]: the inverse of ``a aᵀ + λI`` times λ.

    Mean activation approximated curvature (arXiv 2506.08464). Its rule for the queries and keys of attention is left
    out.
    """

    def __init__(self, network: nn.Module, damping: float = 1.0) -> None:
        super().__init__(network)
        self.damping = damping

    def observe(self, one: Watched, rows: Tensor, gradients: Tensor) -> None:
        one.average("mean", rows.mean(0))

    def map(self, state: dict[str, Tensor], gradient: Tensor) -> Tensor:
        mean = state["mean"]
        return gradient - torch.outer(gradient @ mean, mean) / (self.damping + mean.dot(mean))
