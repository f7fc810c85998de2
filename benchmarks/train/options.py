"""The command line: a wrong option ends the program with one line and status 2."""

import argparse
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
import whiten_layers.models

from whiten_layers.convert import NORMS

from ..training import add_transform_options, positive, transform_from
from .datasets import AUTO_AUGMENT, DATASETS
from .optimizing import OPTIMIZERS, SCHEDULES
from .presets import PRESETS

PROGRAM = "python -m benchmarks.train"
DESCRIPTION = """Train a network of the library, whitened or plain.

The same command under torchrun trains in several processes, which share each batch. Every epoch ends with a test and a
checkpoint; after SIGTERM, Ctrl-C (both save) or worse the same command with --resume goes on as if nothing had
happened, bit for bit. What an augmentation draws depends on --seed, the epoch and the image alone.
"""
# What may differ between a run and its resumption: where things are, and who does the work.
NOT_OF_THE_RUN = ("preset", "data", "download", "out", "resume", "workers", "device", "tensorboard")


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the forty of the usage."""

    def error(self, message: str) -> NoReturn:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # under torchrun they all find the same
            print(f"{self.prog}: {message} (--help lists what there is)", file=sys.stderr)
        sys.exit(2)


def real(low: float, high: float = math.inf, *, named: str) -> Callable[[str], float]:
    """An argparse type: a number of at least `low` and below `high`."""

    def parse(text: str) -> float:
        value = float(text)
        if not low <= value < high:
            raise ValueError
        return value

    parse.__name__ = named  # as argparse names it in its message
    return parse


not_negative = real(0, named="number of at least 0")
fraction = real(0, 1, named="number in [0, 1)")


def count(text: str) -> int:
    """An argparse type: an int of at least 0."""
    value = int(text)
    if value < 0:
        raise ValueError
    return value


def _parser() -> Parser:
    models = [name for name in whiten_layers.models.__all__ if "resn" in name]
    parser = Parser(
        prog=PROGRAM,
        usage=f"{PROGRAM} [--preset NAME] [--dataset NAME] [--model NAME] [options]",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    switch = argparse.BooleanOptionalAction
    parser.add_argument("--preset", choices=PRESETS, metavar="NAME", help=f"a recipe: {', '.join(PRESETS)}")
    parser.add_argument("--out", type=Path, help="folder of the run (default: results/train/DATASET-MODEL)")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    parser.add_argument("--seed", type=count, default=0)

    group = parser.add_argument_group("data")
    group.add_argument("--dataset", choices=DATASETS, default="digits")
    group.add_argument("--data", type=Path, default=Path("data"), help="torchvision's root of CIFAR; for ImageNet the "
                       "folder of train/ and val/ with a folder of images a class (default: data)")  # fmt: skip
    group.add_argument("--download", action="store_true", help="fetch CIFAR into --data if it is not there")
    group.add_argument("--augment", action=switch, default=True, help="the data set's usual crops and flips")
    group.add_argument("--auto-augment", choices=AUTO_AUGMENT, help="for CIFAR and ImageNet")
    group.add_argument("--random-erasing", type=fraction, default=0.0, metavar="P", help="with this probability")
    group.add_argument("--mixup", type=not_negative, default=0.0, metavar="ALPHA", help="of the beta distribution")
    group.add_argument("--cutmix", type=not_negative, default=0.0, metavar="ALPHA", help="with --mixup: either")
    group.add_argument("--crop-size", type=positive(int), default=224, help="of ImageNet's images (default: 224)")
    group.add_argument("--workers", type=count, help="processes that load images (default: of the cores, at most 8)")

    group = parser.add_argument_group("network")
    group.add_argument("--model", choices=models, default="whitened_resnet20", metavar="NAME", help=", ".join(models))
    group.add_argument("--norm", choices=NORMS, help="in the place of batch normalization")
    group.add_argument("--psi", action="store_true", default=None, help="see whiten(psi=True)")
    add_transform_options(parser)

    group = parser.add_argument_group("optimization")
    group.add_argument("--epochs", type=positive(int), default=20)
    group.add_argument("--batch-size", type=positive(int), default=128, help="of a step, all processes together")
    group.add_argument("--accumulate", type=positive(int), default=1, help="backward passes that a batch is dealt to")
    group.add_argument("--optimizer", choices=OPTIMIZERS, default="sgd")
    group.add_argument("--lr", type=positive(float), help="the highest one (default: 0.1; adam and adamw 0.001)")
    group.add_argument("--momentum", type=fraction, default=0.9, help="of sgd and rmsprop")
    group.add_argument("--nesterov", action=switch, default=False, help="of sgd")
    group.add_argument("--weight-decay", type=not_negative, default=5e-4)
    group.add_argument("--norm-weight-decay", type=not_negative, help="of norms and biases (default: the same)")
    group.add_argument("--schedule", choices=SCHEDULES, default="cosine")
    group.add_argument("--milestones", type=positive(int), nargs="+", metavar="EPOCH", help="of --schedule step")
    group.add_argument("--gamma", type=positive(float), default=0.1, help="factor at a milestone")
    group.add_argument("--warmup-epochs", type=count, default=0, help="in which the rate rises to --lr")
    group.add_argument("--label-smoothing", type=fraction, default=0.0)
    group.add_argument("--clip-norm", type=positive(float), help="of the gradient of all parameters")
    group.add_argument("--ema", type=fraction, metavar="DECAY", help="test an average of the weights, too")

    group = parser.add_argument_group("machine")
    group.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    group.add_argument("--precision", choices=["fp32", "bf16", "fp16"], default="fp32", help="of autocast")
    group.add_argument("--compile", action=switch, default=False)
    group.add_argument("--channels-last", action=switch, default=False)
    group.add_argument("--deterministic", action=switch, default=False, help="on a GPU --resume is bit for bit with it")
    group.add_argument("--tensorboard", action="store_true", help="write scalars (the extra 'tensorboard')")
    return parser


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; what the preset leaves open has the options' own defaults."""
    parser = _parser()
    chosen = parser.parse_args(arguments)
    if chosen.preset:
        parser.set_defaults(**PRESETS[chosen.preset])
        chosen = parser.parse_args(arguments)
    _check(parser, chosen)
    if chosen.lr is None:
        chosen.lr = 1e-3 if chosen.optimizer in ("adam", "adamw") else 0.1
    if chosen.out is None:
        chosen.out = Path("results/train") / f"{chosen.dataset}-{chosen.model}"
    if chosen.workers is None:
        here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        chosen.workers = min(8, (os.cpu_count() or 1) // here)
    return chosen


def _check(parser: Parser, options: argparse.Namespace) -> None:
    """What one option demands of another."""
    if not options.model.startswith("whitened_"):
        given = vars(_transform_parser().parse_args([]))
        named = [name for name in [*given, "psi"] if getattr(options, name) not in (None, False)]
        if named:
            parser.error(f"--{named[0].replace('_', '-')}: {options.model} is not whitened; --model whitened_… is")
    try:
        transform_from(options)
    except ValueError as error:
        parser.error(str(error))
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is none; take --device cpu")
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if options.batch_size % (world * options.accumulate):
        parser.error(f"--batch-size {options.batch_size}: not a multiple of {world} processes × {options.accumulate} "
                     "backward passes (--accumulate)")  # fmt: skip
    if (options.schedule == "step") != bool(options.milestones):
        parser.error("--schedule step and --milestones EPOCH … need each other")
    if options.warmup_epochs >= options.epochs:
        parser.error(f"--warmup-epochs {options.warmup_epochs}: the run has {options.epochs} epochs; give fewer")
    if options.nesterov and not (options.optimizer == "sgd" and options.momentum):
        parser.error("--nesterov: needs --optimizer sgd and a --momentum above 0")
    if options.auto_augment and options.dataset in ("digits", "crops"):
        parser.error(f"--auto-augment: not for {options.dataset}; for cifar10, cifar100 and imagenet")
    if options.download and not options.dataset.startswith("cifar"):
        parser.error(f"--download: not for {options.dataset}; for cifar10 and cifar100")


def _transform_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    add_transform_options(parser)
    return parser


def of_the_run(options: argparse.Namespace) -> dict[str, Any]:
    """The options that a resumed run must share with the one that it goes on with."""
    return {name: value for name, value in vars(options).items() if name not in NOT_OF_THE_RUN}
