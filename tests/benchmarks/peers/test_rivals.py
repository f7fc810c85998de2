"""The rivals that are written from their formulas: each against a slow truth."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

if not hasattr(torch.optim, "Muon"):
    pytest.skip("this torch has no Muon", allow_module_level=True)

from benchmarks.peers import deconvolution
from benchmarks.peers.curvature import DECAY, FOOF, INTERVAL, KFAC, MAC, Watched
from benchmarks.peers.deconvolution import Deconvolution, deconvolve
from benchmarks.peers.methods import METHODS, FlatMuon, matrices


def step(layer, precondition, samples=32, shape=(6,), lr=0.1):
    """One batch through a layer; return its inputs, the output's gradient and the plain and the new weight gradient."""
    x = torch.randn(samples, *shape, dtype=torch.float64)
    x[:, 0] *= 3
    layer.zero_grad()
    output = layer(x)
    upstream = torch.randn_like(output)
    output.backward(upstream)
    plain = layer.weight.grad.clone()
    precondition(lr)
    return x, upstream, plain, layer.weight.grad.clone()


@pytest.fixture
def linear():
    torch.manual_seed(0)
    return nn.Linear(6, 4, dtype=torch.float64)


def test_averages_are_means_at_first_and_then_forget():
    watched = Watched(nn.Linear(1, 1))
    values = torch.arange(40, dtype=torch.float64).square()
    for watched.observed, value in enumerate(values, 1):
        average = watched.average("name", value)
        if watched.observed <= 20:
            torch.testing.assert_close(average, values[: watched.observed].mean())
    weights = (1 - DECAY) * DECAY ** torch.arange(20).flip(0)
    torch.testing.assert_close(average, DECAY**20 * values[:20].mean() + (weights * values[20:]).sum())


def test_kfac_counts_the_terms_of_the_loss():
    """A mean over samples and positions has N · L of them."""
    torch.manual_seed(0)
    layer = nn.Linear(6, 4, dtype=torch.float64)
    precondition = KFAC(layer)
    layer(torch.randn(5, 6, dtype=torch.float64))
    assert precondition.terms == 5
    network = nn.Sequential(nn.Linear(6, 4), nn.Conv1d(3, 2, 1))
    precondition = KFAC(network)
    network(torch.randn(5, 3, 6))
    assert precondition.terms == 20


def test_foof_multiplies_by_the_inverse_of_the_damped_moment(linear):
    foof = FOOF(linear, damping=0.2)
    x, _, plain, mapped = step(linear, foof)
    moment = x.T @ x / len(x)
    for batch in range(1, INTERVAL + 1):
        expected = plain @ torch.linalg.inv(moment + 0.2 * moment.trace() / 6 * torch.eye(6, dtype=torch.float64))
        torch.testing.assert_close(mapped, expected)
        x, _, plain, mapped = step(linear, foof)
        if batch == INTERVAL:
            moment = (moment + x.T @ x / len(x)) / 2
            expected = plain @ torch.linalg.inv(moment + 0.2 * moment.trace() / 6 * torch.eye(6, dtype=torch.float64))
            torch.testing.assert_close(mapped, expected)


def test_kfac_solves_with_the_kronecker_product_of_its_damped_moments(linear):
    x, upstream, plain, mapped = step(linear, KFAC(linear, damping=0.01, clip=math.inf))
    inputs, outputs = x.T @ x / 32, 32 * upstream.T @ upstream  # the upstream gradient is that of a mean over 32
    ratio = math.sqrt(inputs.trace() / 6 / (outputs.trace() / 4))
    inputs += ratio * 0.1 * torch.eye(6, dtype=torch.float64)
    outputs += 0.1 / ratio * torch.eye(4, dtype=torch.float64)
    expected = torch.linalg.solve(torch.kron(outputs, inputs), plain.flatten()).view(4, 6)
    torch.testing.assert_close(mapped, expected)


def test_kfac_limits_the_step_of_all_layers_together():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    found = []
    for clip in (math.inf, 1e-6):
        precondition = KFAC(network, clip=clip)
        network.zero_grad()
        network(torch.linspace(-1, 1, 48, dtype=torch.float64).sin().view(8, 6)).square().mean().backward()
        plain = [network[place].weight.grad.clone() for place in (0, 2)]
        precondition(0.5)
        found.append([network[place].weight.grad.clone() for place in (0, 2)])
    free, clipped = found
    product = sum((new * old).sum() for new, old in zip(clipped, plain, strict=True)).item()
    whole = sum((new * old).sum() for new, old in zip(free, plain, strict=True)).item()
    assert 0.25 * whole > 1e-6
    ratio = clipped[0] / free[0]
    torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio))
    assert 0.25 * product * ratio.mean().item() == pytest.approx(1e-6)


def test_mac_inverts_the_moment_of_the_mean(linear):
    x, _, plain, mapped = step(linear, MAC(linear, damping=0.7))
    mean = x.mean(0)
    inverse = torch.linalg.inv(torch.outer(mean, mean) + 0.7 * torch.eye(6, dtype=torch.float64))
    torch.testing.assert_close(mapped, 0.7 * plain @ inverse)


@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize("rival", [FOOF, KFAC, MAC])
def test_a_convolution_is_a_linear_layer_on_patches(rival, dims):
    """K-FAC's outputs are summed over positions: E[δ δᵀ] is larger by their number than a linear layer's."""
    torch.manual_seed(0)
    kind = (nn.Conv1d, nn.Conv2d)[dims - 1]
    layer = kind(3, 4, 3, stride=2, padding=1, dtype=torch.float64)
    x, upstream, plain, mapped = step(layer, rival(layer), 8, (3, *[7] * dims))
    images, kernel = (x, (3, 3)) if dims == 2 else (x.unsqueeze(2), (1, 3))
    padding, stride = ((1, 1), (2, 2)) if dims == 2 else ((0, 1), (1, 2))
    rows = F.unfold(images, kernel, padding=padding, stride=stride).mT.flatten(0, 1)
    linear = nn.Linear(rows.shape[1], 4, dtype=torch.float64)
    precondition = rival(linear)
    gradients = upstream.flatten(2).mT.flatten(0, 1)
    linear(rows).backward(gradients)
    torch.testing.assert_close(linear.weight.grad.view_as(plain), plain)
    if rival is KFAC:
        linear.register_forward_hook(lambda *_: setattr(precondition, "terms", 8))
    precondition(0.1)
    torch.testing.assert_close(linear.weight.grad.view_as(mapped), mapped)


def test_evaluation_is_not_watched(linear):
    foof = FOOF(linear)
    with torch.no_grad():
        linear(torch.full((2, 6), math.nan, dtype=torch.float64))
    assert step(linear, foof)[3].isfinite().all()


def test_muon_takes_a_convolution_as_a_matrix():
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(4, 3, 3, 3))
    matrix = nn.Parameter(weight.detach().flatten(1).clone())
    of_weight, of_matrix = FlatMuon([weight], lr=0.1), torch.optim.Muon([matrix], lr=0.1)
    before = weight.detach().clone()
    for _ in range(3):
        weight.grad = torch.randn_like(weight)
        matrix.grad = weight.grad.flatten(1)
        of_weight.step()
        of_matrix.step()
    torch.testing.assert_close(weight.flatten(1), matrix, rtol=0, atol=0)
    assert not torch.equal(weight, before)


def test_the_last_layer_is_no_hidden_one():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 5), nn.Linear(5, 2))
    assert [weight.shape for weight in matrices(network, (2, 4))] == [(4, 3, 3, 3), (5, 4)]
    training = METHODS["muon"].make(network, 0.1, 0.0)
    trained = [p for optimizer in training.optimizers for group in optimizer.param_groups for p in group["params"]]
    assert sum(p.numel() for p in trained) == sum(p.numel() for p in network.parameters())


def test_the_inverse_root_is_that_of_the_eigenvalues(monkeypatch):
    torch.manual_seed(0)
    rows = torch.randn(3, 200, 5, dtype=torch.float64) * torch.tensor([1, 2, 3, 1, 2])
    covariance = rows.mT @ rows / 200
    values, vectors = torch.linalg.eigh(covariance)
    expected = (vectors * values.rsqrt().unsqueeze(-2)) @ vectors.mT
    monkeypatch.setattr(deconvolution, "ITERATIONS", 12)
    torch.testing.assert_close(deconvolution.inverse_root(covariance), expected)


@pytest.mark.parametrize(
    "plain",
    [lambda: nn.Linear(8, 8), lambda: nn.Conv2d(4, 8, 3, padding=1, bias=False), lambda: nn.Conv1d(4, 8, 3, stride=2)],
    ids=["linear", "conv2d", "conv1d"],
)
def test_deconvolution_whitens_rows(plain, monkeypatch):
    """As the plain layer on patches from which the mean is taken, and which the root whitens."""
    monkeypatch.setattr(deconvolution, "ITERATIONS", 15)
    torch.manual_seed(0)
    layer = Deconvolution(plain().double()).double()
    shapes = {nn.Linear: (500, 8), nn.Conv2d: (60, 4, 5, 5), nn.Conv1d: (100, 4, 15)}
    x = torch.randn(*shapes[type(layer.layer)], dtype=torch.float64)
    x = x * torch.arange(1, x.shape[1] + 1).view(-1, *[1] * (x.dim() - 2)) + 5
    output = layer(x)
    rows = deconvolution.input_rows(layer.layer, x)
    centred = rows - rows.mean(0)
    values, vectors = torch.linalg.eigh(centred.T @ centred / len(rows))
    whitened = centred @ (vectors * values.rsqrt()) @ vectors.T
    expected = whitened @ layer.layer.weight.flatten(1).T + layer.layer.bias
    torch.testing.assert_close(
        deconvolution.input_rows(nn.Linear(1, 1), output) if output.dim() == 2 else output.flatten(2).mT.flatten(0, 1),
        expected,
        rtol=1e-4,
        atol=1e-4,
    )  # ε is 1e-5
    for _ in range(200):
        layer(x)
    torch.testing.assert_close(layer.eval()(x), layer.train()(x), rtol=1e-6, atol=1e-6)


def test_deconvolution_takes_out_batch_normalizations_and_is_trained():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 20, 3), nn.BatchNorm2d(20), nn.ReLU(), nn.Flatten(), nn.Linear(720, 2))
    deconvolve(network)
    assert [type(module).__name__ for module in network] == [
        "Deconvolution",
        "Identity",
        "ReLU",
        "Flatten",
        "Deconvolution",
    ]
    assert network[4].root.shape == (45, 16, 16)
    network(torch.randn(9, 3, 8, 8)).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
