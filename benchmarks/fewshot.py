"""Do normalizations that whiten help where classes are new? Prototypical networks (Snell et al., arXiv 1703.05175).

A network of four convolutions is trained on episodes over some classes to map the images of a class close to their
mean. It is tested on episodes over other classes, whose means are taken of one image each, or of five. Initial weights
and episodes are the same for every normalization.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
from matplotlib.figure import Figure
from torch import Generator, Tensor, nn
from tqdm import tqdm

from .data import CLASSES, Images
from .environment import describe
from .norms import NORMS
from .options import PositiveFloat, PositiveInt, choice, read, reject
from .output import annotate, interruptible, medians, show, write
from .timing import steady_allocator
from .training import Curve, fit

PROGRAM = "python -m benchmarks.fewshot"
EPISODES = {"digits": 600, "crops": 250}
SHOTS, QUERIES = 5, 10  # images of a class in an episode of training: of its mean, and to be classified
TEST_QUERIES = 15
Runs = dict[tuple[str, int], dict]  # by normalization and seed: the curve, and accuracies by shots


@dataclass(frozen=True)
class Options:
    """The options of the benchmark."""

    dataset: tuple[Annotated[str, choice(CLASSES)], ...] = tuple(CLASSES)
    norms: tuple[Annotated[str, choice(NORMS)], ...] = tuple(name for name in NORMS if name != "DBN")
    ways: PositiveInt = 5  # classes of an episode
    shots: tuple[PositiveInt, ...] = (1, 5)  # of tests; training has 5
    episodes: PositiveInt | None = None  # of training; None is 600 for digits and 250 for crops
    test_episodes: PositiveInt = 600
    lr: PositiveFloat = 0.001  # AdamW's, at the top of one cycle
    step_size: PositiveFloat = 0.01  # SWBN's, at the same
    seeds: tuple[int, ...] = (0, 1, 2)
    out: Path = Path("results/fewshot")  # folder for the results


class Prototypes(nn.Module):
    """Classifies images by the squared Euclidean distance of their embeddings to the mean embeddings of the classes.

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
    """Draw for each episode some classes, and some images of each class, none of them twice.

    Yields:
        Indices ``(ways, images)``.
    """
    members = [(labels == label).nonzero()[:, 0] for label in labels.unique()]
    for _ in range(number):
        chosen = torch.randperm(len(members), generator=generator)[:ways].tolist()
        yield torch.stack([members[c][torch.randperm(len(members[c]), generator=generator)[:images]] for c in chosen])


def train(network: Prototypes, data: Images, options: Options, number: int, label: str, run: dict) -> None:
    """Train on `number` episodes, which depend on the seed alone."""
    generator = Generator().manual_seed(run["seed"])
    images, labels = data.train
    targets = torch.arange(options.ways).repeat_interleave(QUERIES)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for indices in episodes(labels, options.ways, SHOTS + QUERIES, number, generator):
            inputs = data.augment(images[indices.flatten()], generator)
            yield inputs.unflatten(0, indices.shape), targets

    fit(network, batches(), number, optimizer="adamw", lr=options.lr, label=label, curve=run["curve"])


@torch.no_grad()
def test(network: Prototypes, data: Images, options: Options, shots: int, seed: int) -> dict[str, float]:
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


def run(options: Options, dataset: str, runs: Runs) -> None:
    """Fill `runs`; with each seed the normalizations take turns."""
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


def summarise(runs: Runs, shots: Sequence[int]) -> list[dict]:
    """One row for each run; "ahead" is the lead over the accuracy of BN with the same seed."""
    rows = []
    for (name, seed), one in runs.items():
        row: dict[str, Any] = {"norm": name, "seed": seed, "training_loss": one["curve"].final_loss}
        row["seconds"] = one["curve"].seconds[-1] if one["curve"].seconds else 0.0
        for count in shots:
            tested, plain = one["shots"].get(count, {}), runs.get(("BN", seed), {"shots": {}})["shots"].get(count, {})
            row[f"accuracy_{count}"] = tested.get("accuracy", float("nan"))
            row[f"confidence_{count}"] = tested.get("confidence", float("nan"))
            row[f"ahead_{count}"] = row[f"accuracy_{count}"] - plain.get("accuracy", float("nan"))
        rows.append(row)
    return rows


def lines(rows: list[dict], ways: int, shots: Sequence[int]) -> list[list[str]]:
    """The lines of the table of `summarise`'s rows, in per cent; a median has no confidence interval."""
    heads = [head for count in shots for head in (f"{ways}-way {count}-shot %", "ahead of BN")]
    lines = [["", "seed", "seconds", "training loss", *heads]]
    for row in rows:
        cells = [row["norm"], str(row["seed"]), f"{row['seconds']:.1f}", f"{row['training_loss']:.3f}"]
        for count in shots:
            spread = "" if row["seed"] == "median" else f" ± {100 * row[f'confidence_{count}']:.1f}"
            cells += [f"{100 * row[f'accuracy_{count}']:.1f}{spread}", f"{100 * row[f'ahead_{count}']:+.1f}"]
        lines.append(cells)
    return lines


def plot(results: dict[str, list[dict]], ways: int, shots: Sequence[int]) -> Figure:
    """Draw a panel for each data set: accuracies of every seed with their confidence, and the medians."""
    figure = Figure(figsize=(6 * len(results), 4.5), layout="constrained")
    panels = figure.subplots(1, len(results), squeeze=False)[0]
    for panel, (dataset, rows) in zip(panels, results.items(), strict=True):
        names = list(dict.fromkeys(row["norm"] for row in rows))
        summary = medians(rows, ["norm"])
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
        annotate(panel, y="accuracy, per cent")
    return figure


def check(options: Options) -> None:
    """Reject options that a data set has too few classes or images for."""
    for name in options.dataset:
        data = CLASSES[name](0)
        if not 2 <= options.ways <= data.num_classes:
            reject(PROGRAM, f"--ways {options.ways}: {name} has 2 to {data.num_classes} classes for an episode")
        images = min(data.test[1].unique(return_counts=True)[1].tolist())
        most = max(options.shots)
        if most + TEST_QUERIES > images:
            reject(PROGRAM, f"--shots {most}: {name} has {images} images of a class, {TEST_QUERIES} to ask")
    if options.test_episodes < 2:
        reject(PROGRAM, "--test-episodes 1: an interval takes at least 2")


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; return the exit status: 130 where Ctrl-C cut it short."""
    options = read(Options(), PROGRAM, __doc__, arguments)
    check(options)
    steady_allocator()
    print(describe())
    measured: dict[str, Runs] = {}
    result: dict[str, Any] = {}
    with interruptible(result):
        for dataset in options.dataset:
            run(options, dataset, measured.setdefault(dataset, {}))
    rows = {dataset: summarise(runs, options.shots) for dataset, runs in measured.items()}
    for dataset, runs in measured.items():
        summary = medians(rows[dataset], ["norm"])
        number = options.episodes or EPISODES[dataset]
        title = f"{dataset}, {number} episodes, adamw, lr {options.lr:g}, SWBN's step size {options.step_size:g}"
        shown = [*rows[dataset], *(summary if len(options.seeds) > 1 else [])]
        show(result, title, lines(shown, options.ways, options.shots))
        curves = [{"norm": norm, "seed": seed, **vars(one["curve"])} for (norm, seed), one in runs.items()]
        result[dataset] = {"rows": rows[dataset], "medians": summary, "curves": curves}
    print(f"±: 95 % over {options.test_episodes} test episodes, the same for every normalization with one seed.")
    return write(options, result, {"fewshot": lambda: plot(rows, options.ways, options.shots)})


if __name__ == "__main__":
    sys.exit(main())
