"""The founding equality: transforming the gradient is training on whitened samples."""

import pytest
import torch
from torch import nn

from whiten_layers import FeatureWhitening, whiten

from . import reference
from .helpers import mostly_slow

DAMPING = 0.1

NETWORKS = {
    "linear": (lambda: [nn.Linear(6, 8), nn.Linear(8, 3)], (15, 6), 20),
    "linear without bias": (lambda: [nn.Linear(6, 8, bias=False), nn.Linear(8, 3)], (15, 6), 20),
    "conv": (
        lambda: [
            nn.Conv2d(4, 6, 3, stride=2, padding=1),
            nn.Conv2d(6, 4, (3, 2), padding=2, dilation=2, groups=2),
            nn.Conv2d(4, 3, 2, bias=False),
        ],
        (3, 4, 7, 8),
        20,
    ),
    "conv1d": (lambda: [nn.Conv1d(3, 4, 3, padding=1), nn.ConvTranspose1d(4, 2, 3, stride=2, padding=1)], (4, 3, 9), 8),
    "transposed": (
        lambda: [
            nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2),
            nn.Conv2d(6, 3, 2, stride=2, bias=False),
            nn.ConvTranspose2d(3, 2, (2, 1), dilation=2),
        ],
        (3, 4, 3, 4),
        8,
    ),
    "conv3d": (
        lambda: [nn.Conv3d(2, 4, 2, padding=1), nn.ConvTranspose3d(4, 2, (1, 2, 1), stride=2, bias=False)],
        (2, 2, 3, 3, 2),
        8,
    ),
}

TRANSFORMS = {
    "exact": {},
    "exact by eigh": {"method": "eigh"},
    "about zero": {"center": False},
    "half": {"power": 0.5},
    "half, rescaled": {"power": 0.5, "rescale": True},
    "both sides half": {"power": 0.5, "output_power": 0.5, "rescale": True},
    "both sides whole": {"output_power": 1.0},
    "output side": {"power": 0.0, "output_power": 0.5},
    "Newton–Schulz": {"method": "newton_schulz"},
    "both sides half, Newton–Schulz": {"method": "newton_schulz", "power": 0.5, "output_power": 0.5, "rescale": True},
    # With as many directions as features the recursion is exact at every refresh.
    "recursive": {"method": "recursive", "rank": 36},
    "both sides, recursive": {"method": "recursive", "rank": 36, "output_power": 0.5, "rescale": True},
    "blocks": {"block_size": 3},
    "both sides half in blocks": {"power": 0.5, "output_power": 0.5, "rescale": True, "block_size": 3},
    "blocks, recursive": {"method": "recursive", "rank": 36, "block_size": 3},
}


# Every option for linear layers and convolutions; of the others (`test_conformance` has them all) what differs most.
FEW = ("exact", "half, rescaled", "both sides half", "blocks, recursive")
PAIRS = [(n, t) for n in NETWORKS for t in TRANSFORMS if n in ("linear", "linear without bias", "conv") or t in FEW]
QUICK = [(n, t) for n, t in PAIRS if n != "linear without bias" or t in FEW]


@pytest.mark.parametrize("network, options", mostly_slow(PAIRS, QUICK))
def test_training_follows_the_network_that_whitens_its_samples(network, options):
    (make, shape, steps), options = NETWORKS[network], TRANSFORMS[options]
    torch.manual_seed(0)
    layers = [layer.double() for layer in make()]
    truth = [reference.SampleWhitening(layer) for layer in layers]
    transform = FeatureWhitening.exact(**({"decay": 0.0, "damping": DAMPING} | options))
    model = whiten(nn.Sequential(*layers), transform)
    # D has trace 1: whitened whole and not rescaled, it makes steps that a larger rate lets diverge.
    lr, rescale = 0.02 if transform.output_power < 1 else 0.0005, transform.rescale
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    started = [parameter.detach().clone() for parameter in model.parameters()]

    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        x = x + 0.5 * x.cumsum(-1) + 0.2

        def objective(forwards, x=x):
            for forward in forwards[:-1]:
                x = torch.tanh(forward(x))
            return (forwards[-1](x) - 0.5).square().mean()

        optimizer.zero_grad()
        objective(list(model)).backward()
        optimizer.step()

        objective(truth).backward()
        for layer, whitened in zip(truth, model, strict=True):
            # A number that `test_conformance` has a truth for
            correction = whitened.transform.norms.correction if rescale else 1
            between = reference.precedes_normalization(layer.layer) and transform.method != "recursive"
            with torch.no_grad():
                for parameter in layer.parameters():
                    parameter -= lr * parameter.grad
            # New transforms from this batch, group by group, for the same function.
            identity = torch.eye(layer.seen.shape[-1], dtype=torch.float64)
            means, roots, outputs = [], [], []
            for seen, delta in zip(layer.seen.detach(), layer.result.grad, strict=True):
                mean, covariance = reference.moments(seen, transform.center)
                taps = layer.layer.weight[0, 0].numel()
                covariance = reference.block_diagonal(covariance, transform.block_size, taps)
                means.append(mean if transform.power else torch.zeros_like(mean))
                precision = reference.inverse_power(covariance, transform.power, DAMPING, rescale, between)
                precision = precision * (correction if transform.power else 1)
                roots.append(reference.root(precision) if transform.power else identity)
                _, moment = reference.moments(delta, center=False)
                moment = reference.block_diagonal(moment / moment.trace(), transform.block_size)
                precision = reference.inverse_power(moment, transform.output_power, DAMPING, rescale, between)
                precision = precision * (1 if transform.power else correction)
                outputs.append(
                    reference.root(precision).T if transform.output_power else torch.eye(len(moment)).double()
                )
            layer.reparametrise(torch.stack(roots), torch.stack(means), torch.stack(outputs))

        for layer, whitened in zip(truth, model, strict=True):
            weight, bias = layer.plain()
            torch.testing.assert_close(
                whitened.weight.detach(), weight, rtol=1e-9, atol=1e-9 * weight.abs().max().item()
            )
            if bias is not None:
                torch.testing.assert_close(whitened.bias.detach(), bias, rtol=1e-9, atol=1e-9 * bias.abs().max().item())

    moved = [(a - b.detach()).norm() / b.norm() for a, b in zip(started, model.parameters(), strict=True)]
    assert max(moved) > 0.01  # the equality is not one of standing still
