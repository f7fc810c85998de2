"""The optimizer, and the learning rate as a function of the step."""

import math
from bisect import bisect_right
from collections.abc import Callable

from torch import nn
from torch.optim import Optimizer

from ..training import OPTIMIZERS
from .options import OptimizationOptions, Schedule, given

# Factors of --lr where a part in [0, 1) of what follows the warm-up is done; "step" goes by milestones instead.
SCHEDULES: dict[Schedule, Callable[[float], float] | None] = {
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
    "linear": lambda done: 1 - done,
    "constant": lambda done: 1.0,
    "step": None,
}


def make_optimizer(network: nn.Module, options: OptimizationOptions) -> Optimizer:
    """Make the optimizer; norms and biases may have a weight decay of their own."""
    decay, of_norms = options.weight_decay, options.norm_weight_decay
    parts: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for parameter in network.parameters():
        parts[parameter.ndim > 1].append(parameter)
    groups = [
        {"params": parts[True], "weight_decay": decay},
        {"params": parts[False], "weight_decay": decay if of_norms is None else of_norms},
    ]
    more = {"momentum": options.momentum, "nesterov": options.nesterov or None}  # None where the optimizer has none
    more = {name: value for name, value in more.items() if value is not None}
    return OPTIMIZERS[options.optimizer](groups, lr=given(options.lr), **more)


def factor(step: int, steps: int, options: OptimizationOptions) -> float:
    """The factor of the learning rate in a step of the run, counted from 0, of `steps` an epoch."""
    warmup = options.warmup_epochs * steps
    if step < warmup:
        return (step + 1) / (warmup + 1)
    shape = SCHEDULES[options.schedule]
    if shape is None:
        return given(options.gamma) ** bisect_right(sorted(given(options.milestones)), step // steps)
    return shape((step - warmup) / (options.epochs * steps - warmup))


def set_rate(optimizer: Optimizer, step: int, steps: int, options: OptimizationOptions) -> None:
    """Give the optimizer a step's learning rate: a function of the step has no state that a checkpoint could miss."""
    rate = given(options.lr) * factor(step, steps, options)
    for group in optimizer.param_groups:
        group["lr"] = rate
