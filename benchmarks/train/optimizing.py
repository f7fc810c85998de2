"""Optimizers, and the learning rate as a function of the step."""

import argparse
import math
from bisect import bisect_right
from collections.abc import Callable

from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

Groups = list[dict]
OPTIMIZERS: dict[str, Callable[[Groups, argparse.Namespace], Optimizer]] = {
    "sgd": lambda groups, o: SGD(groups, o.lr, momentum=o.momentum, nesterov=o.nesterov),
    "adam": lambda groups, o: Adam(groups, o.lr),
    "adamw": lambda groups, o: AdamW(groups, o.lr),
    "rmsprop": lambda groups, o: RMSprop(groups, o.lr, momentum=o.momentum),
}
# Factors of --lr where a part in [0, 1) of what follows the warm-up is done; "step" goes by milestones instead.
SCHEDULES: dict[str, Callable[[float], float] | None] = {
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
    "linear": lambda done: 1 - done,
    "constant": lambda done: 1.0,
    "step": None,
}


def make_optimizer(network: nn.Module, options: argparse.Namespace) -> Optimizer:
    """The optimizer of the options; norms and biases may have a weight decay of their own."""
    decay, of_norms = options.weight_decay, options.norm_weight_decay
    parts: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for parameter in network.parameters():
        parts[parameter.ndim > 1].append(parameter)
    groups = [
        {"params": parts[True], "weight_decay": decay},
        {"params": parts[False], "weight_decay": decay if of_norms is None else of_norms},
    ]
    return OPTIMIZERS[options.optimizer](groups, options)


def factor(step: int, steps: int, options: argparse.Namespace) -> float:
    """What the learning rate is multiplied by in a step of the run, counted from 0, of `steps` an epoch."""
    warmup = options.warmup_epochs * steps
    if step < warmup:
        return (step + 1) / (warmup + 1)
    shape = SCHEDULES[options.schedule]
    if shape is None:
        return options.gamma ** bisect_right(sorted(options.milestones), step // steps)
    return shape((step - warmup) / (options.epochs * steps - warmup))


def set_rate(optimizer: Optimizer, step: int, steps: int, options: argparse.Namespace) -> None:
    """Give the optimizer a step's learning rate: a function of the step has no state that a checkpoint could miss."""
    rate = options.lr * factor(step, steps, options)
    for group in optimizer.param_groups:
        group["lr"] = rate
