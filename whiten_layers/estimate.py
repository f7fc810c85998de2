"""Estimate of what whitening a model will cost, before any batch."""

import copy
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from .conversion.patterns import Selection, selectors
from .conversion.whiten import convert
from .options import check_model
from .report import aligned
from .statistics.covariance import FeatureCovariance
from .statistics.whitening_factor import WhiteningFactor
from .transforms import GradientTransform

SELECTIONS: dict[str, Any] = {"include": None, "skip": None, "psi": False, "in_evaluation": None}  # of `whiten`
MEASURED = 512  # features of the largest matrix that is inverted to see how fast this machine is


@dataclass(frozen=True)
class Cost:
    """One factor of one layer: `matrices` of `size` features, their memory, and the time of a refresh.

    `bytes` are those of the state beside the weight; while a window is open, about half as much again. `seconds` are
    those of the inverses, which `update_interval` batches share.
    """

    layer: str
    factor: str
    matrices: int
    size: int
    method: str
    bytes: int
    seconds: float


@dataclass(frozen=True)
class Estimate:
    """A cost for each factor of each layer that would be whitened, in the model's order."""

    costs: list[Cost]

    @property
    def bytes(self) -> int:
        """Size of the state of all transforms, which adds to the model's own parameters."""
        return sum(cost.bytes for cost in self.costs)

    @property
    def seconds(self) -> float:
        """Time of a refresh of all layers by one process."""
        return sum(cost.seconds for cost in self.costs)

    def __str__(self) -> str:
        lines = [["layer", "factor", "matrices", "size", "method", "MiB", "seconds"]]
        for cost in self.costs:
            sizes = [str(cost.matrices), str(cost.size), cost.method, f"{cost.bytes / 2**20:.1f}"]
            lines.append([cost.layer, cost.factor, *sizes, f"{cost.seconds:.2g}"])
        return "\n".join(
            [*aligned(lines), f"{self.bytes / 2**20:.1f} MiB, and {self.seconds:.2g} seconds a refresh, in all"]
        )


def _copy_without_data(model: nn.Module) -> tuple[nn.Module, dict[int, Any]]:
    """Copy a model, but for the data of its tensors; return it with the copy of each of its modules, by the id."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        if is_lazy(parameter):
            memo[id(parameter)] = parameter
        else:
            memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer if is_lazy(buffer) else torch.empty_like(buffer, device="meta")
    for module in model.modules():
        if isinstance(module, FeatureCovariance):
            module.leave_window(memo)
    return copy.deepcopy(model, memo), memo


def copied_selections(options: dict[str, Any], memo: dict[int, Any]) -> dict[str, Any]:
    """Take the selections out of the options of `whiten`; return them with the copies of modules in their place."""
    copied = {}
    for option, default in SELECTIONS.items():
        given: bool | Selection = options.pop(option, default)
        if given is not None and not isinstance(given, bool):
            given = [memo.get(id(one), one) for one in selectors(option, given) or []]
        copied[option] = given
    return copied


def _seconds(factor: WhiteningFactor, size: int, device: torch.device) -> float:
    """Time the inverse of a matrix of so many features: the least of three calls, of several matrices if small."""
    generator, number = torch.Generator().manual_seed(0), max(1, 2**21 // size**3)
    rows = torch.randn(2 * size, size, generator=generator, dtype=torch.float32, device="cpu").to(device)
    covariance = rows.mT @ rows / len(rows) + factor.damping * torch.eye(size, device=device)
    method = factor.inversion
    arguments = (covariance.repeat(number, 1, 1), factor.power, None, min(factor.rank, size))[: method.arguments]
    taken = []
    for _ in range(3):
        start = time.perf_counter()
        with device:  # whatever the default device is
            method.inverse(*arguments).matrix.sum().item()  # waits for the device
        taken.append(time.perf_counter() - start)
    return min(taken) / number


@torch.no_grad()
def estimate(model: nn.Module, transform: GradientTransform | str | None = None, **options: Any) -> Estimate:
    """Estimate memory and time of whitening a model, without touching it.

    The memory is exact. The time is that of the inverse of a matrix of up to 512 features, measured on the device of
    the model's first parameter (the CPU for a model on the meta device), and for larger ones scaled by the number of
    operations.

    Args:
        model: the model, whitened or not.
        transform: the transform of each layer, as for `whiten`.
        **options: as for `whiten`.

    Raises:
        ValueError, TypeError: as for `whiten`.
    """
    check_model(model)
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    device = torch.device("cpu") if device.type == "meta" else device
    whitened, memo = _copy_without_data(model)
    selections = copied_selections(options, memo)
    convert(whitened, transform, **selections, process_group=options.pop("process_group", None), options=options)
    costs, measured = [], dict[Any, float]()
    transforms = [pair for pair in whitened.named_modules() if isinstance(pair[1], GradientTransform)]
    parts = [(f"{name}.{child}", one, part) for name, one in transforms for child, part in one.named_factors()]
    for name, owner, part in parts:
        matrices, size = part.running_mean.shape
        small = min(size, MEASURED)
        key = part.method, part.power, part.rank, small
        if key not in measured:
            measured[key] = _seconds(part, small, device)
        seconds = matrices * measured[key] * (size / small) ** (2 if part.is_approximate else 3)
        memory = owner.bytes_of(part)
        layer, _, factor = f".{name}".rpartition(".transform.")
        costs.append(Cost(layer[1:] or "the model", factor, matrices, size, part.method, memory, seconds))
    return Estimate(costs)
