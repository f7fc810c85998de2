"""What whitening sends and computes where several processes train one model, counted; and from that, on paper, on many.

Trains a network under DistributedDataParallel, plain and whitened with the defaults, in 1, 2 and 4 processes on this
machine. Counted are the bytes and messages of every step (by wrapping what sends), the operations of
every process's inverses, and the seconds of a refresh.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
from whiten_layers.statistics.whitening_factor import WhiteningFactor

from .environment import describe, environment
from .output import aligned, write
from .training import positive

MODELS: dict[str, Callable[[], nn.Module]] = {
    "resnet50": torchvision.models.resnet50,
    "resnet18": torchvision.models.resnet18,
    "cifar-resnet20": whiten_layers.models.resnet20,
}
GPUS = (8, 64, 1024)


def train(rank: int, ranks: int, options: argparse.Namespace, folder: str) -> None:
    """One process: train plain, then whitened; write what was counted."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store{ranks}", rank=rank, world_size=ranks)
    result = {"plain": steps(options, ranks, False), "whitened": steps(options, ranks, True)}
    Path(folder, f"{ranks}-{rank}.json").write_text(json.dumps(result))
    dist.destroy_process_group()


def steps(options: argparse.Namespace, ranks: int, is_whitened: bool) -> list[dict[str, float]]:
    """Train, and count step by step."""
    torch.manual_seed(0)
    model = MODELS[options.model]()
    if is_whitened:
        whiten(model)
    count: Counter[str] = Counter()

    def counted(call: Callable[..., Any], kind: str) -> Callable[..., Any]:
        def wrapped(tensor: Any, *arguments: Any, **more: Any) -> Any:
            count[f"{kind}s"] += 1
            count[f"{kind}_bytes"] += tensor.nbytes if isinstance(tensor, Tensor) else 0
            return call(tensor, *arguments, **more)

        return wrapped

    def gradients(state: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        count["gradient_bytes"] += bucket.buffer().nbytes
        work = kept[0]["all_reduce"](bucket.buffer().div_(ranks), async_op=True)
        return work.get_future().then(lambda done: done.value()[0])

    kept = (
        {name: getattr(dist, name) for name in ("all_reduce", "broadcast")},
        schedule.refresh_transforms,
        update.invert,
    )
    wrapped = DistributedDataParallel(model)
    wrapped.register_comm_hook(None, gradients)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def timed(due: Any, group: Any) -> None:
        begun = time.perf_counter()
        kept[1](due, group)
        count["refresh_seconds"] += time.perf_counter() - begun  # type: ignore[assignment]

    def invert(factors: Any) -> Any:
        factors = list(factors)
        count["operations"] += sum(update.cost(factor) for factor in factors)
        begun = time.perf_counter()
        outcomes = list(kept[2](factors))
        count["inverse_seconds"] += time.perf_counter() - begun  # type: ignore[assignment]
        return outcomes

    lines = []
    dist.all_reduce, dist.broadcast = (counted(call, name) for name, call in kept[0].items())
    schedule.refresh_transforms, update.invert = timed, invert
    try:
        for step in range(1, 21):
            count.clear()
            generator = torch.Generator().manual_seed(step * ranks + dist.get_rank())
            images = torch.randn(options.batch_size, 3, options.image_size, options.image_size, generator=generator)
            optimizer.zero_grad()
            F.cross_entropy(wrapped(images), torch.arange(options.batch_size) % 10).backward()
            optimizer.step()
            lines.append({"step": step, **count})
    finally:
        dist.all_reduce, dist.broadcast = kept[0].values()
        schedule.refresh_transforms, update.invert = kept[1:]
    return lines


def measure(options: argparse.Namespace) -> dict[int, list[dict[str, list[dict[str, float]]]]]:
    """The counts of every rank, by the number of ranks."""
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for ranks in options.ranks:
            start_processes(train, (ranks, options, folder), nprocs=ranks, start_method="forkserver")
            files = [Path(folder, f"{ranks}-{rank}.json") for rank in range(ranks)]
            results[ranks] = [json.loads(file.read_text()) for file in files]
    return results


def table(results: dict[int, list[dict[str, list[dict[str, float]]]]]) -> list[dict[str, float]]:
    """A row for each number of ranks, of one interval: ten steps with one refresh at the end."""
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


def on_paper(model: nn.Module, options: argparse.Namespace, interval: int = 10) -> list[dict[str, float]]:
    """What R processes send and compute, from the sizes of a model's gradients and factors.

    A ring sends 2 (R − 1) / R of what it sums; of what is sent round every process receives the others' part:

        bytes a step = [2 (R − 1) / R · statistics + (R − 1) / R · outcomes] / interval
    """
    factors = [module for module in model.modules() if isinstance(module, WhiteningFactor)]
    gradients = sum(parameter.nbytes for parameter in model.parameters())
    means = sum(factor.running_count.nbytes + factor.mean.nbytes for factor in factors)
    triangles = sum(factor.running_covariance[:, 0].nbytes * (factor.mean.shape[1] + 1) // 2 for factor in factors)
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


def paper_models(options: argparse.Namespace) -> dict[str, nn.Module]:
    """Models of which the sizes alone are wanted."""
    with torch.device("meta"):
        decoder = whiten(Transformer().bfloat16(), FeatureWhitening(block_size=1024))
        return {options.model: whiten(MODELS[options.model]()), "7B decoder, block_size=1024": decoder}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; a wrong option ends the program with one line and status 2."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.distributed", description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", choices=MODELS, default="resnet50")
    parser.add_argument("--ranks", type=positive(int), nargs="+", default=[1, 2, 4])
    parser.add_argument("--batch-size", type=positive(int), default=2, help="of each rank")
    parser.add_argument("--image-size", type=positive(int), default=64)
    parser.add_argument("--bandwidth", type=positive(float), default=50e9, help="bytes a second of a GPU, on paper")
    parser.add_argument("--latency", type=positive(float), default=50e-6, help="seconds of a message, on paper")
    parser.add_argument("--out", type=Path, default=Path("results/distributed"), help="folder for results.json")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; return the exit status."""
    options = parse(arguments)
    print(describe())
    rows = table(measure(options))
    heads = "ranks,gradients MiB a step,messages in other steps,in a refresh,statistics MiB,outcomes MiB,extra a step"
    lines = [f"{heads},busiest,idlest,refresh s,of it inverses s".split(",")]
    for row in rows:
        mebibytes = [row[key] / 2**20 for key in ("gradient_bytes_a_step", "statistics_bytes", "outcome_bytes")]
        lines.append(
            [
                str(row["ranks"]),
                f"{mebibytes[0]:.1f}",
                f"{row['messages_in_other_steps']:.0f}",
                f"{row['messages_in_a_refresh']:.0f}",
                f"{mebibytes[1]:.1f}",
                f"{mebibytes[2]:.1f}",
                f"{row['extra']:.1%}",
                f"{row['busiest']:.1%}",
                f"{row['idlest']:.1%}",
                f"{row['refresh_seconds']:.2f}",
                f"{row['inverse_seconds']:.2f}",
            ]
        )
    print(
        f"{options.model}, {options.batch_size} images a rank, one thread a rank; steps 11 to 20, a refresh in the last"
    )
    print(aligned(lines))
    print(on_paper.__doc__.split("\n\n", 1)[1].rstrip() if on_paper.__doc__ else "")
    paper = {}
    for name, model in paper_models(options).items():
        paper[name] = on_paper(model, options)
        heads = "processes,gradients MB a step,extra MB a step,extra,messages in a refresh,ms a step,busiest,its 10⁹"
        lines = [f"{heads} operations a step".split(",")]
        for row in paper[name]:
            lines.append(
                [
                    str(row["processes"]),
                    f"{row['gradient_bytes_a_step'] / 1e6:.1f}",
                    f"{row['extra_bytes_a_step'] / 1e6:.2f}",
                    f"{row['extra']:.1%}",
                    str(row["messages_in_a_refresh"]),
                    f"{row['milliseconds_a_step']:.2f}",
                    f"{row['busiest']:.2%}",
                    f"{row['operations_of_the_busiest_a_step'] / 1e9:.2f}",
                ]
            )
        print(
            f"{name}: on paper, {options.bandwidth / 1e9:g} GB/s and {1e6 * options.latency:g} µs a message; ", end=""
        )
        print(f"state {paper[name][0]['state_bytes'] / 1e9:.2f} GB on each")
        print(aligned(lines))
    result = {
        "environment": environment(),
        "options": vars(options) | {"out": str(options.out)},
        "table": rows,
        "paper": paper,
    }
    write(options.out, result, {})
    return 0


if __name__ == "__main__":
    sys.exit(main())
