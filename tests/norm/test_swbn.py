"""The matrix that learns: where its steps lead, and how far each goes."""

import pytest
import torch
from torch import nn

from whiten_layers.norm import StochasticWhiteningBatchNorm1d, StochasticWhiteningBatchNorm2d, follow_learning_rate
from whiten_layers.norm.swbn import whitening_step

from .cases import CHANNELS, draw


def correlation(x):
    return x.T.corrcoef()


def test_kl_steps_follow_the_closed_form():
    x, step = draw((200, CHANNELS)), 2e-4
    layer = StochasticWhiteningBatchNorm1d(CHANNELS, eps=0.0, step_size=step, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(correlation(x))
    with torch.no_grad():
        for batch in range(1, 5001):
            layer(x)
            if batch % 1000 == 0:
                # dw/dt = −α (σ w² − 1) w has w² = 1 / (σ + (1 − σ) e^(−2αt)); steps stray from it by O(α).
                learned = torch.linalg.vecdot(vectors.T, (layer.whitening[0] @ vectors).T)
                expected = (values + (1 - values) * torch.exp(torch.tensor(-2 * step * batch))) ** -0.5
                torch.testing.assert_close(learned, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("criterion, steps, size", [("kl", 400, 0.2), ("frobenius", 4000, 0.002)])
def test_steps_lead_to_white_outputs(criterion, steps, size):
    x = draw((200, CHANNELS))
    target = correlation(x)
    matrix = torch.eye(CHANNELS, dtype=torch.float64)[None]
    distances = []
    for _ in range(steps):
        residual = matrix @ target @ matrix.mT - torch.eye(CHANNELS, dtype=torch.float64)
        distances.append(float(residual.norm()))
        matrix = whitening_step(matrix, target[None], torch.tensor(size), criterion)
    assert torch.equal(matrix, matrix.mT)
    # The KL criterion's steps shrink as it comes near; the norm's gradient does not, and the end is a step's size.
    assert distances[-1] < (1e-6 if criterion == "kl" else 0.05) * distances[0]
    assert distances[steps // 2] < distances[0]


@pytest.mark.parametrize("criterion", ["kl", "frobenius"])
def test_the_matrix_stays_symmetric_and_a_white_batch_moves_it_nowhere(criterion):
    layer = StochasticWhiteningBatchNorm2d(5, criterion=criterion, step_size=0.05, group_size=3)
    for seed in range(20):
        layer(draw((8, 5, 3, 3), seed, torch.float32))
        assert torch.equal(layer.whitening, layer.whitening.mT)
    identity = torch.eye(4, dtype=torch.float64)[None]
    assert torch.equal(whitening_step(identity, identity, torch.tensor(0.1), criterion), identity)


def test_step_sizes_follow_the_learning_rate():
    model = nn.Sequential(
        nn.Linear(4, 6), StochasticWhiteningBatchNorm1d(6, step_size=0.01), nn.Linear(6, 3), nn.BatchNorm1d(3)
    )
    groups = [{"params": model[0].parameters(), "lr": 0.2}, {"params": model[1:].parameters(), "lr": 1.0}]
    optimizer = torch.optim.SGD(groups)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    handle = follow_learning_rate(model, optimizer)
    sizes = []
    for _ in range(4):
        optimizer.step()
        sizes.append(float(model[1].step_size))
        schedule.step()
    assert sizes == pytest.approx([0.01, 0.005, 0.0025, 0.00125])
    handle.remove()
    optimizer.step()
    assert float(model[1].step_size) == pytest.approx(0.00125)
    one_cycle = torch.optim.SGD(model.parameters(), 0.1)
    torch.optim.lr_scheduler.OneCycleLR(one_cycle, 0.5, total_steps=10)
    follow_learning_rate(model, one_cycle)
    assert float(model[1].step_size) == pytest.approx(0.01 / 25)  # where the cycle begins
    assert "criterion='kl', step_size=0.01" in str(model[1])
    model[1].reset_parameters()
    assert float(model[1].step_size) == pytest.approx(0.01)
    still = torch.optim.SGD(model.parameters(), 0.0)
    follow_learning_rate(model, still)
    assert float(model[1].step_size) == 0


def test_a_scheduler_made_later_is_seen():
    model = nn.Sequential(StochasticWhiteningBatchNorm1d(6, step_size=0.01))
    optimizer = torch.optim.SGD(model.parameters(), torch.tensor(0.1))
    follow_learning_rate(model, optimizer)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.5, total_steps=10)
    sizes = []
    for _ in range(9):
        optimizer.step()
        sizes.append(float(model[0].step_size))
        schedule.step()
    assert max(sizes) == pytest.approx(0.01, rel=0.1)


@pytest.mark.parametrize("criterion", ["kl", "frobenius"])
def test_a_dead_channel_does_not_grow(criterion):
    layer = StochasticWhiteningBatchNorm1d(5, criterion=criterion, step_size=0.05)
    for seed in range(200):
        x = draw((20, 5), seed, torch.float32)
        x[:, 2] = 3.0
        layer(x)
    assert layer.whitening[0, 2].tolist() == pytest.approx([0, 0, 1, 0, 0], abs=1e-3)


def test_what_was_learned_outlives_the_running_statistics():
    layer = StochasticWhiteningBatchNorm1d(5, step_size=0.05)
    layer(draw((20, 5), dtype=torch.float32))
    learned = layer.whitening.clone()
    layer.reset_running_stats()
    assert torch.equal(layer.whitening, learned) and layer.running_mean.abs().max() == layer.num_batches_tracked == 0
    layer.reset_parameters()
    assert torch.equal(layer.whitening[0], torch.eye(5))
