"""Do normalizations that whiten help where classes are new? Prototypical networks (Snell et al., arXiv 1703.05175).

A network of four convolutions learns from episodes over some classes to put images of one class near their mean; it
is tested on episodes over classes that it has never seen, whose means follow from one image each, or from five. Initial
weights and episodes are the same for every normalization.
"""

import argparse
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Generator, Tensor, nn
from tqdm import tqdm

from .data import CLASSES, Images
from .environment import describe, environment
from .norms import NORMS
from .output import aligned, write
from .timing import steady_allocator
from .training import Curve, fit, positive

EPISODES = {"digits": 600, "crops": 250}
SHOTS, QUERIES = 5, 10  # images of a class in an episode of training: of its mean, and to be classified
TEST_QUERIES = 15
Runs = dict[tuple[str, int], dict]  # by normalization and seed: the curve, and accuracies by shots


class Prototypes(nn.Module):
    """Classifies images by squared Euclidean distance to the means of others of their class, in what it embeds.

    Shape: ``(W, S + Q, 3, H, W)``, W classes of S images for their mean and Q more -> ``(W Q, W)``.
    """

    def __init__(self, norm_layer: Callable[[int], nn.Module], shots: int) -> None:
        super().__init__()
        self.shots, blocks = shots, []
        for channels in (3, 64, 64, 64):
            convolution = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
            blocks.append(nn.Sequential(convolution, norm_layer(64), nn.ReLU(), nn.MaxPool2d(2)))
        self.encoder = nn.Sequential(*blocks, nn.Flatten())

    def forward(self, images: Tensor) -> Tensor:
        return logits(self.encoder(images.flatten(0, 1)).view(*images.shape[:2], -1), self.shots)


def logits(embedded: Tensor, shots: int) -> Tensor:
    """``(W, S + Q, D) -> (W Q, W)``: minus the squared distances to the means of each class's first S."""
    means, queries = embedded[:, :shots].mean(1), embedded[:, shots:].flatten(0, 1)
    return -(queries.unsqueeze(1) - means).square().sum(-1)


def episodes(labels: Tensor, ways: int, images: int, number: int, generator: Generator) -> Iterator[Tensor]:
    """Indices ``(ways, images)``: of each episode other classes, and of a class other images, none of them twice."""
    members = [(labels == label).nonzero()[:, 0] for label in labels.unique()]
    for _ in range(number):
        chosen = torch.randperm(len(members), generator=generator)[:ways].tolist()
        yield torch.stack([members[c][torch.randperm(len(members[c]), generator=generator)[:images]] for c in chosen])


def train(network: Prototypes, data: Images, options: argparse.Namespace, number: int, label: str, run: dict) -> None:
    """Train on so many episodes, which depend on the seed alone."""
    generator = Generator().manual_seed(run["seed"])
    images, labels = data.train
    targets = torch.arange(options.ways).repeat_interleave(QUERIES)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for indices in episodes(labels, options.ways, SHOTS + QUERIES, number, generator):
            inputs = data.augment(images[indices.flatten()], generator)
            yield inputs.unflatten(0, indices.shape), targets

    fit(network, batches(), number, optimizer="adamw", lr=options.lr, label=label, curve=run["curve"])


@torch.no_grad()
def test(network: Prototypes, data: Images, options: argparse.Namespace, shots: int, seed: int) -> dict[str, float]:
    """Mean accuracy over episodes of the held-out classes, and half its 95 % confidence interval."""
    network.eval()
    images, labels = data.test
    # By running statistics an image is embedded the same whatever the episode: once is enough.
    embedded = torch.cat([network.encoder(part) for part in images.split(200)])
    targets = torch.arange(options.ways).repeat_interleave(TEST_QUERIES)
    drawn = episodes(labels, options.ways, shots + TEST_QUERIES, options.test_episodes, Generator().manual_seed(seed))
    right = [(logits(embedded[indices], shots).argmax(1) == targets).float().mean() for indices in drawn]
    accuracies = torch.stack(right).double()
    return {"accuracy": accuracies.mean().item(), "confidence": 1.96 * accuracies.std().item() / len(right) ** 0.5}


def run(options: argparse.Namespace, dataset: str, runs: Runs) -> None:
    """Fill `runs`: at each seed the normalizations take turns."""
    for seed in options.seeds:
        data = CLASSES[dataset](seed)
        for name in options.norms:
            torch.manual_seed(seed)
            layer = NORMS[name][1]
            network = Prototypes(partial(layer, step_size=options.step_size) if "SWBN" in name else layer, SHOTS)
            one = runs[name, seed] = {"norm": name, "seed": seed, "curve": Curve(), "shots": {}}
            label = f"{dataset}, {name:8}  seed {seed}"
            train(network, data, options, options.episodes or EPISODES[dataset], label, one)
            for shots in tqdm(options.shots, desc="test", unit="table", leave=False, dynamic_ncols=True):
                one["shots"][shots] = test(network, data, options, shots, seed)


def summarise(runs: Runs, shots: list[int]) -> list[dict]:
    """One row a run; what an accuracy is ahead of BN's with the same seed, if there is one."""
    rows = []
    for (name, seed), one in runs.items():
        row = {"norm": name, "seed": seed, "training_loss": one["curve"].final_loss}
        row["seconds"] = one["curve"].seconds[-1] if one["curve"].seconds else 0.0
        for count in shots:
            tested, plain = one["shots"].get(count, {}), runs.get(("BN", seed), {"shots": {}})["shots"].get(count, {})
            row[f"accuracy_{count}"] = tested.get("accuracy", float("nan"))
            row[f"confidence_{count}"] = tested.get("confidence", float("nan"))
            row[f"ahead_{count}"] = row[f"accuracy_{count}"] - plain.get("accuracy", float("nan"))
        rows.append(row)
    return rows


def medians(rows: list[dict]) -> list[dict]:
    """The median over seeds of every figure, of each normalization."""
    summary = []
    for name in dict.fromkeys(row["norm"] for row in rows):
        chosen = [row for row in rows if row["norm"] == name]
        figures = {
            key: statistics.median(row[key] for row in chosen) for key in chosen[0] if key not in ("norm", "seed")
        }
        summary.append({"norm": name, "seed": "median", **figures})
    return summary


def table(rows: list[dict], ways: int, shots: list[int]) -> str:
    """Per cent; the confidence interval of a median is no figure."""
    heads = [head for count in shots for head in (f"{ways}-way {count}-shot %", "ahead of BN")]
    lines = [["", "seed", "seconds", "training loss", *heads]]
    for row in rows:
        cells = [row["norm"], str(row["seed"]), f"{row['seconds']:.1f}", f"{row['training_loss']:.3f}"]
        for count in shots:
            spread = "" if row["seed"] == "median" else f" ± {100 * row[f'confidence_{count}']:.1f}"
            cells += [f"{100 * row[f'accuracy_{count}']:.1f}{spread}", f"{100 * row[f'ahead_{count}']:+.1f}"]
        lines.append(cells)
    return aligned(lines)


def plot(results: dict[str, list[dict]], ways: int, shots: list[int]) -> Figure:
    """A panel for each data set: accuracies of every seed with their confidence, and the medians."""
    figure = Figure(figsize=(6 * len(results), 4.5), layout="constrained")
    panels = figure.subplots(1, len(results), squeeze=False)[0]
    for panel, (dataset, rows) in zip(panels, results.items(), strict=True):
        names = list(dict.fromkeys(row["norm"] for row in rows))
        summary = medians(rows)
        for index, count in enumerate(shots):
            places = Counter[str]()
            for row in rows:
                x = names.index(row["norm"]) + 0.08 * places[row["norm"]]
                places[row["norm"]] += 1
                accuracy, spread = 100 * row[f"accuracy_{count}"], 100 * row[f"confidence_{count}"]
                panel.errorbar(x, accuracy, spread, fmt="o", markersize=3, color=f"C{index}", alpha=0.6)
            middles = [100 * row[f"accuracy_{count}"] for row in summary]
            panel.plot(range(len(names)), middles, "_", markersize=24, color=f"C{index}", label=f"{count}-shot")
        panel.set_xticks(range(len(names)), names)
        panel.set_title(f"{dataset}: {ways}-way, classes never seen")
        panel.grid(alpha=0.3)
        panel.legend()
    panels[0].set_ylabel("accuracy, per cent")
    return figure


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; a wrong option ends the program with one line and status 2."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fewshot", description=__doc__.split("\n\n")[0])
    parser.add_argument("--dataset", choices=CLASSES, nargs="+", default=list(CLASSES))
    parser.add_argument("--norms", choices=NORMS, nargs="+", default=[name for name in NORMS if name != "DBN"])
    parser.add_argument("--ways", type=positive(int), default=5, help="classes of an episode")
    parser.add_argument("--shots", type=positive(int), nargs="+", default=[1, 5], help="of tests; training has 5")
    parser.add_argument("--episodes", type=positive(int), help="of training; default: 600 for digits, 250 for crops")
    parser.add_argument("--test-episodes", type=positive(int), default=600)
    parser.add_argument("--lr", type=positive(float), default=0.001, help="AdamW's, at the top of one cycle")
    parser.add_argument("--step-size", type=positive(float), default=0.01, help="SWBN's, at the same")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("results/fewshot"), help="folder for the results")
    options = parser.parse_args(arguments)
    for name in options.dataset:
        data = CLASSES[name](0)
        if not 2 <= options.ways <= data.num_classes:
            parser.error(f"--ways {options.ways}: {name} has 2 to {data.num_classes} classes for an episode")
        images = min(data.test[1].unique(return_counts=True)[1].tolist())
        if max(options.shots) + TEST_QUERIES > images:
            parser.error(f"--shots {max(options.shots)}: {name} has {images} images of a class, {TEST_QUERIES} to ask")
    if options.test_episodes < 2:
        parser.error("--test-episodes 1: an interval takes at least 2")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; return the exit status: 130 where Ctrl-C cut it short."""
    options = parse(arguments)
    steady_allocator()
    print(describe())
    measured: dict[str, Runs] = {}
    interrupted = False
    try:
        for dataset in options.dataset:
            run(options, dataset, measured.setdefault(dataset, {}))
    except KeyboardInterrupt:
        interrupted = True
        print("\ninterrupted: what follows is what was measured until then", file=sys.stderr)
    chosen = {key: value for key, value in vars(options).items() if key != "out"}
    result = {"environment": environment(), "options": chosen, "interrupted": interrupted}
    rows = {dataset: summarise(runs, options.shots) for dataset, runs in measured.items()}
    for dataset, runs in measured.items():
        summary = medians(rows[dataset])
        number = options.episodes or EPISODES[dataset]
        print(f"\n{dataset}, {number} episodes, adamw, lr {options.lr:g}, SWBN's step size {options.step_size:g}")
        shown = [*rows[dataset], *(summary if len(options.seeds) > 1 else [])]
        print(table(shown, options.ways, options.shots))
        curves = [{"norm": norm, "seed": seed, **vars(one["curve"])} for (norm, seed), one in runs.items()]
        result[dataset] = {"rows": rows[dataset], "medians": summary, "curves": curves}
    print(f"±: 95 % over {options.test_episodes} test episodes, the same for every normalization with one seed.")
    write(options.out, result, {"fewshot": lambda: plot(rows, options.ways, options.shots)})
    return 130 if interrupted else 0


if __name__ == "__main__":
    sys.exit(main())
