"""The defaults under the optimizers that people use: never behind, at the plain network's best learning rate."""

import statistics
import warnings
from functools import cache, partial
from itertools import islice

import pytest
import torch
import torch.nn.functional as F
from torch import nn, optim

from whiten_layers import FeatureWhitening, GradientTransform, WhitenedLinear, unwhiten, whiten


class Lion(optim.Optimizer):
    """The sign of an interpolated momentum (arXiv 2302.06675, algorithm 2), without weight decay."""

    def __init__(self, parameters, lr, betas=(0.9, 0.99)):
        super().__init__(parameters, {"lr": lr, "betas": betas})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            first, second = group["betas"]
            for p in group["params"]:
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                p.sub_(torch.lerp(p.grad, momentum, first).sign(), alpha=group["lr"])
                momentum.lerp_(p.grad, 1 - second)


class SOAP(optim.Optimizer):
    """Adam in the eigenbases of Shampoo's two factors (arXiv 2409.11321), computed at every step; Adam for biases."""

    def __init__(self, parameters, lr, betas=(0.95, 0.95), eps=1e-8):
        super().__init__(parameters, {"lr": lr, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            first, second = group["betas"]
            for p in group["params"]:
                gradient, state = p.grad.reshape(len(p), -1), self.state[p]
                if not state:
                    state.update(step=0, momentum=torch.zeros_like(gradient), square=torch.zeros_like(gradient))
                    state["factors"] = [torch.eye(size) for size in gradient.shape]
                state["step"] += 1
                if p.dim() == 2:
                    for factor, moment in zip(
                        state["factors"], (gradient @ gradient.mT, gradient.mT @ gradient), strict=True
                    ):
                        factor.lerp_(moment / moment.trace(), 1 - second)
                left, right = (torch.linalg.eigh(factor).eigenvectors for factor in state["factors"])
                state["momentum"].lerp_(gradient, 1 - first)
                state["square"].lerp_((left.mT @ gradient @ right).square(), 1 - second)
                step = (left.mT @ state["momentum"] @ right) / (state["square"].sqrt() + group["eps"])
                scale = (1 - second ** state["step"]) ** 0.5 / (1 - first ** state["step"])
                p.sub_((left @ step @ right.mT).view_as(p), alpha=group["lr"] * scale)


class Muon:
    """torch's Muon for the weights, AdamW for the biases, which it does not take."""

    def __init__(self, parameters, lr):
        parts = list(parameters)
        self.methods = [
            optim.Muon([p for p in parts if p.dim() == 2], lr=lr, weight_decay=0.0),
            optim.AdamW([p for p in parts if p.dim() != 2], lr=lr / 10, weight_decay=0.0),
        ]

    def zero_grad(self):
        for method in self.methods:
            method.zero_grad()

    def step(self):
        for method in self.methods:
            method.step()


MARKS = {  # of those whose ratio is near 1, so that many seeds are needed
    "Muon": [pytest.mark.slow, pytest.mark.skipif(not hasattr(optim, "Muon"), reason="this torch has no Muon")],
    "SOAP": [pytest.mark.slow],
}
# Each with the best of the learning rates 1, 2 and 5 times powers of ten for the plain network.
OPTIMIZERS = {
    "SGD": (optim.SGD, 0.1),
    "momentum": (partial(optim.SGD, momentum=0.9), 0.1),
    "nesterov": (partial(optim.SGD, momentum=0.9, nesterov=True), 0.05),
    "RMSprop": (optim.RMSprop, 0.001),
    "Adam": (optim.Adam, 0.01),
    "AdamW": (optim.AdamW, 0.01),
    "Adafactor": (optim.Adafactor, 0.01),
    "Lion": (Lion, 0.001),
    "SOAP": (SOAP, 0.01),
    "Muon": (Muon, 0.02),
}
# Limits of the ratio to plain's loss, by output power, where the optimizer whitens itself; elsewhere it is 0.7.
NEAR_ONE = {("Muon", 0.0): 1.05, ("Muon", 0.5): 1.05, ("SOAP", 0.0): 1.05, ("SOAP", 0.5): 1.2}


def batches(seed):
    """A teacher on correlated inputs that are far from zero mean; the deviations are 1, ½, ⅓, …"""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.linalg.qr(torch.randn(32, 32, generator=generator)).Q / torch.arange(1, 33).unsqueeze(1)
    first, second = torch.randn(32, 32, generator=generator), torch.randn(32, 4, generator=generator) / 32**0.5
    while True:
        varying = torch.randn(64, 32, generator=generator) @ mixing
        yield 1 + varying, (varying @ first).tanh() @ second


def final_loss(make, lr, transform, seed, steps=200):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
    if transform is not None:
        whiten(model, transform)
    method, losses = make(model.parameters(), lr=lr), []
    for x, y in islice(batches(seed), steps):
        method.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        method.step()
        losses.append(loss.item())
    return statistics.fmean(losses[-20:])


@cache
def plain_loss(name, seed):
    make, lr = OPTIMIZERS[name]
    return final_loss(make, lr, None, seed)


@pytest.mark.parametrize(
    "name, output_power",
    [
        pytest.param(name, output_power, marks=MARKS.get(name, ()))
        for name in OPTIMIZERS
        for output_power in ([0.0, 0.5] if name in ("SGD", "AdamW", *MARKS) else [0.0])
    ],
)
def test_the_whitened_network_is_ahead(name, output_power):
    """Not by much where the optimizer whitens itself: Muon and SOAP do. SOAP with both sides is behind.

    Those two are near 1, so they need more seeds: a seed's ratio scatters by 0.07 under Muon, and by 0.17 under Muon
    with both sides and under SOAP. Means of 36 seeds were 0.98 and 1.03 (SOAP; two versions whose sums have another
    order), 1.11 (SOAP with both sides), 0.97 (Muon), 0.91 and 1.01 (Muon with both sides; gradients mixed from 1.25 and
    from 1 times the usual length on).
    """
    make, lr = OPTIMIZERS[name]
    case = name, output_power
    seeds = {"SOAP": 36, "Muon": 36 if output_power else 9}.get(name, 3)
    ratios = [
        final_loss(make, lr, FeatureWhitening(output_power=output_power), seed) / plain_loss(name, seed)
        for seed in range(seeds)
    ]
    assert statistics.geometric_mean(ratios) < NEAR_ONE.get(case, 0.7)


def test_lbfgs_is_warned_of():
    """Where it diverges on its own rounding decides, so there is no loss to compare: the user has to know."""
    model = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 4))
    x, y = next(batches(0))

    def take_step(method):
        def closure():
            method.zero_grad()
            loss = F.mse_loss(model(x), y)
            loss.backward()
            return loss

        method.step(closure)

    WhitenedLinear(3, 4)  # of another model
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        take_step(optim.LBFGS(model.parameters()))
    whiten(model)
    with pytest.warns(UserWarning, match=r"LBFGS trains whitened layers, and may diverge.*unwhiten"):
        take_step(optim.LBFGS(model.parameters()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        take_step(optim.AdamW(model.parameters()))
        unwhiten(model)
        take_step(optim.LBFGS(model.parameters()))


def test_a_step_of_an_optimizer_is_compiled_as_before(monkeypatch):
    monkeypatch.setattr(GradientTransform, "any_scales", False)  # as long as none scales what an optimizer steps by
    model = whiten(nn.Linear(3, 2))
    optimizer = optim.AdamW(model.parameters(), 0.1)
    model(torch.randn(5, 3)).square().sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        explained = torch._dynamo.explain(optimizer.step)()
    assert not any("whiten" in str(reason) for reason in explained.break_reasons)
