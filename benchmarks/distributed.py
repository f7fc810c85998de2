"""What does whitening send and compute where several processes train one model? Counted for few, predicted for many.

Trains a network under DistributedDataParallel, plain and whitened with the defaults, in 1, 2 and 4 processes on this
machine, and counts the bytes and messages of every step (by wrapping the functions that send), the operations of every
process's inverses, and the seconds of a refresh.
"""

import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
import whiten_layers.models
from torch import Tensor, nn
from torch.multiprocessing.spawn import start_processes
from torch.nn.parallel import DistributedDataParallel

from whiten_layers import FeatureWhitening, whiten
from whiten_layers.refresh import collectives, schedule, update
from whiten_layers.statistics.covariance import FeatureCovariance
from whiten_layers.statistics.whitening_factor import WhiteningFactor

from .environment import describe
from .options import PositiveFloat, PositiveInt, choice, read
from .output import Column, cells, show, write

MODELS: dict[str, Callable[[], nn.Module]] = {
    "resnet50": torchvision.models.resnet50,
    "resnet18": torchvision.models.resnet18,
    "cifar-resnet20": whiten_layers.models.resnet20,
}
GPUS = (8, 64, 1024)
MIB = 2**20
LAST = schedule.last_due(19, 10)  # the last step: the first from the tenth on that refreshes
COUNTED: list[Column] = [
    ("ranks", "{ranks}"),
    ("gradients MiB a step", lambda row: f"{row['gradient_bytes_a_step'] / MIB:.1f}"),
    ("messages in other steps", "{messages_in_other_steps:.0f}"),
    ("in a refresh", "{messages_in_a_refresh:.0f}"),
    ("statistics MiB", lambda row: f"{row['statistics_bytes'] / MIB:.1f}"),
    ("outcomes MiB", lambda row: f"{row['outcome_bytes'] / MIB:.1f}"),
    ("extra a step", "{extra:.1%}"),
    ("busiest", "{busiest:.1%}"),
    ("idlest", "{idlest:.1%}"),
    ("refresh s", "{refresh_seconds:.2f}"),
    ("of it inverses s", "{inverse_seconds:.2f}"),
]
ON_PAPER: list[Column] = [
    ("processes", "{processes}"),
    ("gradients MB a step", lambda row: f"{row['gradient_bytes_a_step'] / 1e6:.1f}"),
    ("extra MB a step", lambda row: f"{row['extra_bytes_a_step'] / 1e6:.2f}"),
    ("extra", "{extra:.1%}"),
    ("messages in a refresh", "{messages_in_a_refresh}"),
    ("ms a step", "{milliseconds_a_step:.2f}"),
    ("busiest", "{busiest:.2%}"),
    ("its 10⁹ operations a step", lambda row: f"{row['operations_of_the_busiest_a_step'] / 1e9:.2f}"),
]


@dataclass(frozen=True)
class Options:
    """The options of the benchmark."""

    model: Annotated[str, choice(MODELS)] = "resnet50"
    ranks: tuple[PositiveInt, ...] = (1, 2, 4)
    batch_size: PositiveInt = 2  # of each rank
    image_size: PositiveInt = 64
    bandwidth: PositiveFloat = 50e9  # bytes a second of a GPU, on paper
    latency: PositiveFloat = 50e-6  # seconds of a message, on paper
    out: Path = Path("results/distributed")  # folder for results.json


def train(rank: int, ranks: int, options: Options, folder: str) -> None:
    """Train plain, then whitened, as one of several processes, and write the counts to a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store{ranks}", rank=rank, world_size=ranks)
    result = {"plain": steps(options, ranks, False), "whitened": steps(options, ranks, True)}
    Path(folder, f"{ranks}-{rank}.json").write_text(json.dumps(result))
    dist.destroy_process_group()


def steps(options: Options, ranks: int, is_whitened: bool) -> list[dict[str, float]]:
    """Train for twenty steps; return the counts of each."""
    torch.manual_seed(0)
    model = MODELS[options.model]()
    if is_whitened:
        whiten(model)
    count: defaultdict[str, float] = defaultdict(int)

    def counted(call: Callable[..., Any], kind: str) -> Callable[..., Any]:
        def wrapped(tensor: Any, *arguments: Any, **more: Any) -> Any:
            count[f"{kind}s"] += 1
            count[f"{kind}_bytes"] += tensor.nbytes if isinstance(tensor, Tensor) else 0
            return call(tensor, *arguments, **more)

        return wrapped

    def gradients(state: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        count["gradient_bytes"] += bucket.buffer().nbytes
        work = all_reduce(bucket.buffer().div_(ranks), async_op=True)
        return work.get_future().then(lambda done: done.value()[0])

    all_reduce, refresh, inverses = dist.all_reduce, schedule.refresh_transforms, update.invert
    wrapped = DistributedDataParallel(model)
    wrapped.register_comm_hook(None, gradients)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def timed(due: Any, group: Any) -> None:
        begun = time.perf_counter()
        refresh(due, group)
        count["refresh_seconds"] += time.perf_counter() - begun

    def invert(factors: Any) -> Any:
        factors = list(factors)
        count["operations"] += sum(update.cost(factor) for factor in factors)
        begun = time.perf_counter()
        outcomes = list(inverses(factors))
        count["inverse_seconds"] += time.perf_counter() - begun
        return outcomes

    lines = []
    with (
        patch.object(dist, "all_reduce", counted(dist.all_reduce, "all_reduce")),
        patch.object(dist, "broadcast", counted(dist.broadcast, "broadcast")),
        patch.object(schedule, "refresh_transforms", timed),
        patch.object(update, "invert", invert),
    ):
        for step in range(1, LAST + 1):
            count.clear()
            generator = torch.Generator().manual_seed(step * ranks + dist.get_rank())
            images = torch.randn(options.batch_size, 3, options.image_size, options.image_size, generator=generator)
            optimizer.zero_grad()
            F.cross_entropy(wrapped(images), torch.arange(options.batch_size) % 10).backward()
            optimizer.step()
            lines.append({"step": step, **count})
    return lines


def measure(options: Options) -> dict[int, list[dict[str, list[dict[str, float]]]]]:
    """Count in every rank, for each number of ranks."""
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for ranks in options.ranks:
            start_processes(train, (ranks, options, folder), nprocs=ranks, start_method="forkserver")
            files = [Path(folder, f"{ranks}-{rank}.json") for rank in range(ranks)]
            results[ranks] = [json.loads(file.read_text()) for file in files]
    return results


def summarise(results: dict[int, list[dict[str, list[dict[str, float]]]]]) -> list[dict[str, float]]:
    """One row for each number of ranks, about the steps after the tenth, with a refresh in the last."""
    rows = []
    for ranks, everyone in results.items():
        first, plain = everyone[0]["whitened"], everyone[0]["plain"]
        due, rest = first[-1], first[10:-1]
        sent = due.get("all_reduce_bytes", 0) + due.get("broadcast_bytes", 0)
        gradients = statistics.mean(line.get("gradient_bytes", 0) for line in plain[10:])
        loads = [lines["whitened"][-1].get("operations", 0) for lines in everyone]
        rows.append(
            {
                "ranks": ranks,
                "gradient_bytes_a_step": gradients,
                "messages_in_other_steps": sum(line.get("all_reduces", 0) + line.get("broadcasts", 0) for line in rest),
                "messages_in_a_refresh": due.get("all_reduces", 0) + due.get("broadcasts", 0),
                "statistics_bytes": due.get("all_reduce_bytes", 0),
                "outcome_bytes": due.get("broadcast_bytes", 0),
                "extra": sent / 10 / gradients,
                "busiest": max(loads) / sum(loads),
                "idlest": min(loads) / sum(loads),
                "operations": sum(loads),
                "refresh_seconds": statistics.median(line["refresh_seconds"] for line in first if "operations" in line),
                "inverse_seconds": statistics.median(line["inverse_seconds"] for line in first if "operations" in line),
            }
        )
    return rows


class Transformer(nn.Module):
    """The linear layers of a decoder of 7 billion parameters: 32 blocks, width 4096, inner width 11008."""

    def __init__(self) -> None:
        super().__init__()
        sizes = [(4096, 4096)] * 4 + [(4096, 11008)] * 2 + [(11008, 4096)]
        self.layers = nn.ModuleList(nn.Linear(*size, bias=False) for _ in range(32) for size in sizes)


def on_paper(model: nn.Module, options: Options, interval: int = 10) -> list[dict[str, float]]:
    """Predict what R processes send and compute, from the sizes of a model's gradients and factors.

    A ring sends 2 (R − 1) / R of what it sums; of what is sent round every process receives the others' part:

        bytes a step = [2 (R − 1) / R · statistics + (R − 1) / R · outcomes] / interval
    """
    factors = [module for module in model.modules() if isinstance(module, WhiteningFactor)]
    gradients = sum(parameter.nbytes for parameter in model.parameters())
    shared = [module for module in model.modules() if isinstance(module, FeatureCovariance)]
    means = sum(2 * one.running_count.nbytes + one.running_mean.nbytes for one in shared)  # two counts
    triangles = sum(one.running_covariance[:, 0].nbytes * (one.running_mean.shape[1] + 1) // 2 for one in shared)
    outcomes = sum(4 * part.numel() for factor in factors for part in collectives.packed_shapes(factor))
    costs = [update.cost(factor) for factor in factors]
    rows = []
    for processes in GPUS:
        ring = (processes - 1) / processes
        owners = collectives.share(costs, processes)
        loads = [0] * processes
        for cost, owner in zip(costs, owners, strict=True):
            loads[owner] += cost
        sent = 2 * ring * (means + triangles) + ring * outcomes
        messages = 4 + len(set(owners))
        rows.append(
            {
                "processes": processes,
                "gradient_bytes_a_step": 2 * ring * gradients,
                "extra_bytes_a_step": sent / interval,
                "extra": sent / interval / (2 * ring * gradients),
                "messages_in_a_refresh": messages,
                "milliseconds_a_step": 1e3 * (sent / options.bandwidth + messages * options.latency) / interval,
                "operations_of_the_busiest_a_step": max(loads) / interval,
                "busiest": max(loads) / sum(costs),
                "statistics_bytes": means + triangles,
                "outcome_bytes": outcomes,
                "state_bytes": sum(buffer.nbytes for factor in factors for buffer in factor.buffers()),
            }
        )
    return rows


def paper_models(options: Options) -> dict[str, nn.Module]:
    """Models of which only the sizes matter, and which have no memory."""
    with torch.device("meta"):
        decoder = whiten(Transformer().bfloat16(), FeatureWhitening(block_size=1024))
        return {options.model: whiten(MODELS[options.model]()), "7B decoder, block_size=1024": decoder}


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; return the exit status."""
    options = read(Options(), "python -m benchmarks.distributed", __doc__, arguments)
    print(describe())
    rows = summarise(measure(options))
    batch = f"{options.batch_size} images a rank"
    result: dict[str, Any] = {"counted": rows}
    title = f"{options.model}, {batch}, one thread a rank; steps 11 to {LAST}, a refresh in the last"
    show(result, title, cells(COUNTED, rows))
    print(on_paper.__doc__.split("\n\n", 1)[1].rstrip() if on_paper.__doc__ else "")
    paper = {name: on_paper(model, options) for name, model in paper_models(options).items()}
    for name, predicted in paper.items():
        speed = f"{options.bandwidth / 1e9:g} GB/s and {1e6 * options.latency:g} µs a message"
        title = f"{name}: on paper, {speed}; state {predicted[0]['state_bytes'] / 1e9:.2f} GB on each"
        show(result, title, cells(ON_PAPER, predicted))
    return write(options, result | {"paper": paper})


if __name__ == "__main__":
    sys.exit(main())
