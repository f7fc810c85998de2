"""Many steps of two processes, with a fault in one of them now and then: they stay equal, and keep no memory."""

import random

import pytest
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks import soak

from .runs import digest
from .world import run

BAD = ("a NaN", "an Inf", "zeros", "numbers of 1e-30", "wrong labels")
# A copy in training is another model, which refreshes together with the other rank's.
BETWEEN = [name for name in soak.WITHOUT_MARK if name not in ("training of a copy", "a forward pass alone")]


def train(rank, steps):
    with soak.collecting(), soak.tracing(True):
        return train_traced(rank, steps)


def train_traced(rank, steps):
    training = soak.start(soak.Options(steps=steps))
    inner = training.model
    wrapped = DistributedDataParallel(inner)
    chance = random.Random(0)  # the same for both ranks
    for step in range(steps):
        name, on = chance.choice([*BAD, *BETWEEN]), chance.randrange(2)
        is_faulty = chance.random() < 0.1
        images, labels = soak.batch(2 * step + rank)
        if is_faulty and rank == on and name in BETWEEN:
            training.model = inner
            soak.WITHOUT_MARK[name](training, images, labels)
        training.model = wrapped
        if is_faulty and rank == on and name in BAD:
            soak.WITH_MARK[name](training, images, labels)
        else:
            training.losses.append(training.step(images, labels))
        training.faults[name] += is_faulty
        if (step + 1) % (steps // 10) == 0:
            training.model = inner
            training.check(step + 1)
    return digest(nn.ModuleList([inner])), training.weights().tolist(), training.row("", training)


@pytest.mark.parametrize("steps", [150, pytest.param(2000, marks=pytest.mark.slow)])
def test_two_processes_stay_equal_and_keep_no_memory(steps):
    (state, weights, first), (others, their_weights, second) = run(train, 2, steps, timeout=600)
    assert state == others and weights == their_weights
    for row in (first, second):
        assert row["faults"] > 0.05 * steps and row["is_finite"] and row["least"] > 0 and row["loss"] < 0.5
        assert row["grown_kib"] < 300  # losses and checks take some of it
