"""The command line: presets, defaults that depend on other options, and checks across options."""

import importlib.util
import os
from dataclasses import replace
from pathlib import Path

import torch
import whiten_layers.models

from ..options import Wrong, dashed, leaves, one_of, read, reject
from ..transforms import TransformOptions
from .options import OptimizationOptions, Options
from .presets import PRESETS
from .video_splits import VIDEOS

PROGRAM = "python -m benchmarks.train"
DESCRIPTION = f"""Train a network of the library, whitened or plain.

The same command under torchrun trains in several processes, which share each batch. Every epoch ends with a test and a
checkpoint; after SIGTERM, Ctrl-C (both save) or worse the same command with --resume continues as if nothing had
happened, bit for bit. What an augmentation draws depends on --seed, the epoch and the image alone.

Presets: {", ".join(PRESETS)}"""
WITH_MOMENTUM = ("sgd", "rmsprop")
WITH_POLICIES = ("cifar10", "cifar100", "imagenet")
OF_VIDEOS = [name for name in whiten_layers.models.__all__ if hasattr(whiten_layers.models.video, name)]


def parse(arguments: list[str] | None = None) -> Options:
    """Read the command line; a wrong option ends the program with one line and status 2."""
    options = read(Options(), PROGRAM, DESCRIPTION, arguments)
    if options.preset is not None:
        known = one_of(PRESETS, options.preset)
        if isinstance(known, Wrong):
            reject(PROGRAM, f"argument --preset: {known}")
        preset = PRESETS[known]
        options = read(preset, PROGRAM, DESCRIPTION, arguments)
        options = replace(options, optimization=_without_rest(options.optimization, preset.optimization))
    _check(options)
    return _filled(options)


def _without_rest(options: OptimizationOptions, preset: OptimizationOptions) -> OptimizationOptions:
    """Drop what a preset says of a schedule or an optimizer, where the command line names another one."""
    if options.schedule != preset.schedule and options.milestones == preset.milestones:
        options = replace(options, milestones=None)
    if options.optimizer != preset.optimizer and preset.nesterov:
        options = replace(options, nesterov=False)
    return options


def _started(which: str) -> int:
    """How many processes torchrun has started, in all or on this machine."""
    return int(os.environ.get(which, "1"))


def _filled(options: Options) -> Options:
    """Fill in the options whose default depends on other options."""
    images, rate, machine = options.images, options.optimization, options.machine
    if images.dataset == "imagenet" or images.dataset in VIDEOS:
        images = replace(images, crop_size=images.crop_size or 224)
    if images.dataset in VIDEOS:
        images = replace(images, split=images.split or 1, clip=images.clip or "rgb")
        images = replace(images, frames=images.frames or 16, frame_interval=images.frame_interval or 1)
    if rate.momentum is None and rate.optimizer in WITH_MOMENTUM:
        rate = replace(rate, momentum=0.9)
    if rate.schedule == "step":
        rate = replace(rate, gamma=rate.gamma or 0.1)
    rate = replace(rate, lr=rate.lr or (0.1 if rate.optimizer == "sgd" else 1e-3))
    if machine.workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        machine = replace(machine, workers=min(8, cores // _started("LOCAL_WORLD_SIZE")))
    out = options.out or Path("results/train") / f"{images.dataset}-{options.network.model}"
    taught = options.distillation
    if taught.teacher is not None:
        weight = 0.5 if taught.distill_weight is None else taught.distill_weight
        taught = replace(taught, distill_weight=weight, temperature=taught.temperature or 4.0)
    return replace(options, out=out, images=images, distillation=taught, optimization=rate, machine=machine)


def _check(options: Options) -> None:
    """Reject an option that another one does not allow."""
    images, model, rate, machine = options.images, options.network.model, options.optimization, options.machine
    is_video = images.dataset in VIDEOS
    if is_video and importlib.util.find_spec("av") is None:
        reject(PROGRAM, f"--dataset {images.dataset}: PyAV is not installed; pip install 'whiten-layers[video]'")
    if is_video != (model in OF_VIDEOS):
        kind = "videos" if is_video else "images"
        which = f"one of {', '.join(OF_VIDEOS)}" if is_video else "another one"
        reject(PROGRAM, f"--model {model}: {images.dataset} has {kind}; take {which}")
    if not model.startswith("whitened_"):
        defaults = dict(leaves(TransformOptions()))
        named = [name for name, value in leaves(options.transform) if value is not defaults[name]]
        named += ["psi"] if options.network.psi else []
        if named:
            reject(PROGRAM, f"{dashed(named[0])}: {model} is not whitened; --model whitened_… is")
    values = dict(leaves(options))
    for name, applies, where in (
        ("momentum", rate.optimizer in WITH_MOMENTUM, "--optimizer sgd and rmsprop"),
        ("nesterov", rate.optimizer == "sgd" and rate.momentum != 0, "--optimizer sgd and a --momentum above 0"),
        ("milestones", rate.schedule == "step", "--schedule step"),
        ("gamma", rate.schedule == "step", "--schedule step"),
        ("crop_size", images.dataset == "imagenet" or is_video, "--dataset imagenet, ucf101 and hmdb51"),
        ("split", is_video, "--dataset ucf101 and hmdb51"),
        ("clip", is_video, "--dataset ucf101 and hmdb51"),
        ("frames", is_video, "--dataset ucf101 and hmdb51"),
        ("frame_interval", is_video, "--dataset ucf101 and hmdb51"),
        ("mixup", not is_video or not images.mixup, "images"),
        ("cutmix", not is_video or not images.cutmix, "images"),
        ("random_erasing", not is_video or not images.random_erasing, "images"),
        ("distill_weight", options.distillation.teacher is not None, "a run with a --teacher"),
        ("temperature", options.distillation.teacher is not None, "a run with a --teacher"),
        ("download", images.dataset in ("cifar10", "cifar100"), "--dataset cifar10 and cifar100"),
        ("auto_augment", images.dataset in WITH_POLICIES, "--dataset cifar10, cifar100 and imagenet"),
    ):
        if values[name] is not None and values[name] is not False and not applies:
            reject(PROGRAM, f"{dashed(name)}: only for {where}")
    try:
        options.transform.make()
    except ValueError as error:
        reject(PROGRAM, str(error))
    here, gpus = _started("LOCAL_WORLD_SIZE"), torch.cuda.device_count()
    if machine.device == "cuda" and not gpus:
        reject(PROGRAM, "--device cuda: there is none; take --device cpu")
    if machine.device != "cpu" and 0 < gpus < here:
        reject(PROGRAM, f"{here} processes for {gpus} GPUs; start fewer, or take --device cpu")
    parts = _started("WORLD_SIZE") * rate.accumulate
    if rate.batch_size % parts or rate.batch_size < 2 * parts:
        reject(
            PROGRAM,
            f"--batch-size {rate.batch_size}: has to be twice as many as processes × --accumulate "
            f"({parts}) or another multiple, so that each normalizes over several images",
        )
    if rate.schedule == "step" and not rate.milestones:
        reject(PROGRAM, "--schedule step: needs --milestones EPOCH …")
    for milestone in rate.milestones or []:
        if milestone >= rate.epochs:
            reject(PROGRAM, f"--milestones {milestone}: the run has {rate.epochs} epochs; give earlier ones")
    if rate.warmup_epochs >= rate.epochs:
        reject(PROGRAM, f"--warmup-epochs {rate.warmup_epochs}: the run has {rate.epochs} epochs; give fewer")
    if machine.tensorboard and importlib.util.find_spec("tensorboard") is None:
        reject(PROGRAM, "--tensorboard: it is not installed; pip install 'whiten-layers[tensorboard]'")
