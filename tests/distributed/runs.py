"""What the processes of a test run: a small network, its batches, ways to train it in parallel."""

import hashlib
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from whiten_layers import EigenbasisScaling, FeatureWhitening, whiten

SAMPLES = 8
# How a batch is dealt out: unevenly, and with nothing for one of four.
CUTS = {1: (0, 8), 2: (0, 3, 8), 4: (0, 0, 3, 4, 8)}

# Without what each process measures of its own part of a batch, and without the rows that each samples of it: then they
# do what one does with the whole.
ALIKE: dict[str, Any] = {"shrink": False, "rescale": False, "bound": None, "max_rows": None}
TRANSFORMS: dict[str, dict[str, Any]] = {
    "default": {},
    # A window that is open when a checkpoint is saved is lost; so none is.
    "observed at refreshes": {"statistics_interval": 10, "output_power": 0.5, **ALIKE},
    "alike": ALIKE,
    "both sides": {"output_power": 0.5, **ALIKE},
    "paper": {"features": "patch", "power": 1.0, "update_interval": 1, **ALIKE},
    "windows of several batches": {"statistics_interval": 2, "update_interval": 6, "center": False, **ALIKE},
    "whitened, then scaled": {"output_power": 0.5, "psi": ["0", "2"], **ALIKE},
    "rarely, then scaled": {"update_interval": 100, "psi": ["0", "2"], **ALIKE},
    # In none of 9 refreshes its 18 steps run out of directions: from there on rounding chooses them.
    "recursive in blocks": {"method": "recursive", "power": 1.0, "rank": 1, "block_size": 32, "features": "patch"}
    | ALIKE,
    # Every batch is observed: in directions that none has shown, rounding chooses the basis.
    "eigenbases": {"transform": EigenbasisScaling(interval=1)},
}


def plain() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3, groups=2, bias=False), nn.Flatten(), nn.Linear(64, 5)]
    return nn.Sequential(*layers).double()


def network(transform: str = "default", process_group: Any = None) -> nn.Sequential:
    options = {"psi": False, **TRANSFORMS[transform]}
    psi, given = options.pop("psi"), options.pop("transform", None)
    return whiten(plain(), given or FeatureWhitening(**options), psi=psi, process_group=process_group)


def batch(step: int, cuts: tuple[int, ...] = (0, SAMPLES), rank: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(SAMPLES, 3, 8, 8, generator=generator, dtype=torch.float64)
    y = torch.randint(0, 5, (SAMPLES,), generator=generator)
    part = slice(cuts[rank], cuts[rank + 1])
    return (x + 0.3 * x.cumsum(2))[part], y[part]


def loss(model: nn.Module, x: Tensor, y: Tensor, ranks: int = 1) -> Tensor:
    """Of a rank's part, its share of the mean over the whole batch, times the ranks whose gradients are averaged."""
    return F.cross_entropy(model(x), y, reduction="sum") * ranks / SAMPLES


def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)


def train(model: nn.Module, steps: range, optimiser: torch.optim.Optimizer | None = None) -> nn.Module:
    """So many steps, on this rank's part of every batch."""
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if dist.is_initialized() else 0
    optimiser = optimizer(model) if optimiser is None else optimiser
    for step in steps:
        optimiser.zero_grad()
        loss(model, *batch(step, CUTS[ranks], rank), ranks).backward()
        optimiser.step()
    return model


def parallel(model: nn.Sequential, kind: str, **options: Any) -> nn.Module:
    if kind == "DDP":
        return DistributedDataParallel(model, **options)
    for child in model:
        if next(child.parameters(), None) is not None:
            fully_shard(child, **options)
    return fully_shard(model, **options)  # type: ignore[return-value]


def weights(model: nn.Module) -> list[list[float]]:
    whole = (p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters())
    return [parameter.detach().flatten().tolist() for parameter in whole]


def digest(model: nn.Module) -> str:
    """Of all the bits of the transforms' buffers, but for open windows and counts: each process has its own."""
    own = ("window", "num_batches")
    named = model.named_buffers()
    buffers = [b for name, b in named if ".transform." in name and not any(word in name for word in own)]
    return hashlib.sha256(b"".join(buffer.numpy().tobytes() for buffer in buffers)).hexdigest()


def distance(first: list[list[float]], second: list[list[float]]) -> float:
    """The greatest relative distance of two lists of parameters."""
    one, other = ([torch.tensor(v, dtype=torch.float64) for v in values] for values in (first, second))
    return max(((a - b).norm() / b.norm()).item() for a, b in zip(one, other, strict=True))
