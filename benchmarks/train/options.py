"""The command line: a wrong option ends the program with one line and status 2."""

import argparse
import importlib.util
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
import whiten_layers.models

from whiten_layers.conversion.convert_batchnorm import NORMS

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
WITH_MOMENTUM = ("sgd", "rmsprop")
# What may differ between a run and its resumption: where things are, and who does the work.
NOT_OF_THE_RUN = ("preset", "data", "download", "out", "resume", "workers", "device", "tensorboard")


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the forty of the usage."""

    def error(self, message: str) -> NoReturn:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # under torchrun they all find the same
            print(f"{self.prog}: {message} (--help lists what there is)", file=sys.stderr)
        sys.exit(2)


def within(kind: type, low: float, high: float, *, named: str) -> Callable[[str], Any]:
    """An argparse type: an int or float of at least `low` and below `high`."""

    def parse(text: str) -> Any:
        value = kind(text)
        if not low <= value < high:
            raise ValueError
        return value

    parse.__name__ = named  # as argparse names it in its message
    return parse


not_negative = within(float, 0, math.inf, named="number of at least 0")
fraction = within(float, 0, 1, named="number in [0, 1)")
count = within(int, 0, 2**63, named="int of at least 0")


def _parser() -> Parser:
    models = whiten_layers.models.__all__
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
    group.add_argument("--crop-size", type=positive(int), help="of ImageNet's images (default: 224)")
    group.add_argument("--workers", type=count, help="processes that load images (default: one a core, at most 8)")

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
    group.add_argument("--lr", type=positive(float), help="the highest one (default: 0.1 of sgd, else 0.001)")
    group.add_argument("--momentum", type=fraction, help="of sgd and rmsprop (default: 0.9)")
    group.add_argument("--nesterov", action=switch, default=False, help="of sgd")
    group.add_argument("--weight-decay", type=not_negative, default=5e-4)
    group.add_argument("--norm-weight-decay", type=not_negative, help="of norms and biases (default: the same)")
    group.add_argument("--schedule", choices=SCHEDULES, default="cosine")
    group.add_argument("--milestones", type=positive(int), nargs="+", metavar="EPOCH", help="of --schedule step")
    group.add_argument("--gamma", type=positive(float), help="factor at a milestone (default: 0.1)")
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
        preset = PRESETS[chosen.preset]
        parser.set_defaults(**preset)
        chosen = parser.parse_args(arguments)
        # What it says of a schedule or an optimizer goes with them.
        if chosen.schedule != preset["schedule"] and chosen.milestones == preset.get("milestones"):
            chosen.milestones = None
        if chosen.optimizer != "sgd":
            chosen.nesterov = chosen.nesterov and not preset.get("nesterov")
    _check(parser, chosen)
    for name, value in _defaults(chosen).items():
        if getattr(chosen, name) is None:
            setattr(chosen, name, value)
    return chosen


def _started(which: str) -> int:
    """How many processes torchrun has started, in all or on this machine."""
    return int(os.environ.get(which, "1"))


def _defaults(options: argparse.Namespace) -> dict[str, Any]:
    """Of the options that depend on others."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {
        "lr": 0.1 if options.optimizer == "sgd" else 1e-3,
        "momentum": 0.9 if options.optimizer in WITH_MOMENTUM else None,
        "gamma": 0.1 if options.schedule == "step" else None,
        "crop_size": 224 if options.dataset == "imagenet" else None,
        "out": Path("results/train") / f"{options.dataset}-{options.model}",
        "workers": min(8, cores // _started("LOCAL_WORLD_SIZE")),
    }


def _check(parser: Parser, options: argparse.Namespace) -> None:
    """What one option demands of another."""
    if not options.model.startswith("whitened_"):
        given = vars(_transform_parser().parse_args([]))
        named = [name for name, default in [*given.items(), ("psi", None)] if getattr(options, name) is not default]
        if named:
            parser.error(f"--{named[0].replace('_', '-')}: {options.model} is not whitened; --model whitened_… is")
    for name, applies, where in (
        ("momentum", options.optimizer in WITH_MOMENTUM, "--optimizer sgd and rmsprop"),
        ("nesterov", options.optimizer == "sgd" and options.momentum != 0, "--optimizer sgd and a --momentum above 0"),
        ("milestones", options.schedule == "step", "--schedule step"),
        ("gamma", options.schedule == "step", "--schedule step"),
        ("crop_size", options.dataset == "imagenet", "--dataset imagenet"),
        ("download", options.dataset in ("cifar10", "cifar100"), "--dataset cifar10 and cifar100"),
        ("auto_augment", options.dataset not in ("digits", "crops"), "--dataset cifar10, cifar100 and imagenet"),
    ):
        if getattr(options, name) is not None and getattr(options, name) is not False and not applies:
            parser.error(f"--{name.replace('_', '-')}: only for {where}")
    try:
        transform_from(options)
    except ValueError as error:
        parser.error(str(error))
    here, gpus = _started("LOCAL_WORLD_SIZE"), torch.cuda.device_count()
    if options.device == "cuda" and not gpus:
        parser.error("--device cuda: there is none; take --device cpu")
    if options.device != "cpu" and 0 < gpus < here:
        parser.error(f"{here} processes for {gpus} GPUs; start fewer, or take --device cpu")
    parts = _started("WORLD_SIZE") * options.accumulate
    if options.batch_size % parts or options.batch_size < 2 * parts:
        parser.error(
            f"--batch-size {options.batch_size}: has to be twice as many as processes × --accumulate "
            f"({parts}) or another multiple, so that each normalizes over several images"
        )
    if options.schedule == "step" and not options.milestones:
        parser.error("--schedule step: needs --milestones EPOCH …")
    for milestone in options.milestones or []:
        if milestone >= options.epochs:
            parser.error(f"--milestones {milestone}: the run has {options.epochs} epochs; give earlier ones")
    if options.warmup_epochs >= options.epochs:
        parser.error(f"--warmup-epochs {options.warmup_epochs}: the run has {options.epochs} epochs; give fewer")
    if options.tensorboard and importlib.util.find_spec("tensorboard") is None:
        parser.error("--tensorboard: it is not installed; pip install 'whiten-layers[tensorboard]'")


def _transform_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    add_transform_options(parser)
    return parser


def of_the_run(options: argparse.Namespace) -> dict[str, Any]:
    """The options that a resumed run must share with the one that it goes on with."""
    return {name: value for name, value in vars(options).items() if name not in NOT_OF_THE_RUN}
