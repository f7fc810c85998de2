"""Every layer, in every configuration, under every option: the plain layer's numbers, the reference's gradients."""

import copy
import itertools

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from whiten_layers import FeatureWhitening, whiten

from . import reference
from .cases import CASES
from .strategies import layers

OPTIONS = {
    "paper": {"features": "patch", "power": 1.0, "rescale": False, "center": True, "shrink": False},
    "paper, about zero": {"features": "patch", "power": 1.0, "rescale": False, "center": False, "shrink": False},
    "about the mean": {"center": True},
    "not shrunk": {"features": "patch", "output_power": 0.5, "shrink": False},
    "half": {"features": "patch"},
    "half, both sides": {"features": "patch", "output_power": 0.5},
    "half, both sides, about zero": {"features": "patch", "output_power": 0.5, "center": False},
    "output side": {"power": 0.0, "output_power": 1.0, "rescale": False},
    "defaults": {},
    "defaults, both sides": {"output_power": 0.5},
    "kronecker": {"features": "kronecker"},
    "kronecker, one": {"features": "kronecker", "power": 1.0},
    "kronecker, not rescaled": {"features": "kronecker", "power": 1.0, "rescale": False},
    "kronecker, both sides": {"features": "kronecker", "output_power": 0.5},
    "kronecker, about zero": {"features": "kronecker", "center": False},
    "kronecker, about the mean": {"features": "kronecker", "center": True},
    "kronecker, blocks": {"features": "kronecker", "power": 1.0, "block_size": 2, "output_power": 0.5},
    "patch, blocks": {"features": "patch", "block_size": 2},
}
METHODS = {
    "Newton–Schulz": ({"power": 1.0}, "newton_schulz"),
    "Newton–Schulz, half": ({}, "newton_schulz"),
    # Exact: no factor is wider than the rank.
    "recursive": ({"features": "kronecker", "power": 1.0}, "recursive"),
    "recursive, half, in blocks": ({"features": "kronecker", "block_size": 2}, "recursive"),
}
TABLE = {name: (options, "auto") for name, options in OPTIONS.items()} | METHODS


def conforms(plain: nn.Module, inputs: list[torch.Tensor], options: dict, method: str = "auto") -> None:
    """Train a layer and its twin on batches; compare outputs, the input's and the parameters' gradients.

    The reference maps the plain layer's own gradient, in float64, so that all that differs is the map's rounding: of
    a covariance's inverse, ε times its condition number (of any power up to 1 less), and of the result, ε of its type.
    """
    transform = FeatureWhitening(method, update_interval=1, statistics_interval=1, max_rows=None, bound=None, **options)
    twin = whiten(copy.deepcopy(plain), transform)
    truth = reference.Whitening(plain, method, **options)
    precision = torch.finfo(torch.promote_types(plain.weight.dtype, torch.float32))
    rounding = torch.finfo(plain.weight.dtype)
    for number, x in enumerate(inputs):
        results = []
        for layer in (plain, twin):
            layer.zero_grad()
            leaf = x.clone().requires_grad_()
            y = layer(leaf)
            upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(number), dtype=torch.float64).to(y)
            y.backward(upstream)
            results.append((y.detach(), leaf.grad))
        torch.testing.assert_close(*results, rtol=0, atol=0)
        gradients = [parameter.grad.double() for parameter in plain.parameters()]
        transformed = [parameter.grad.double() for parameter in twin.parameters()]
        assert all(gradient.isfinite().all() for gradient in transformed)
        if precision.bits == 64:  # P and Q are symmetric positive definite, with a bias and without
            descent = sum((a * b).sum() for a, b in zip(gradients, transformed, strict=True))
            assert descent > 0 or sum(gradient.square().sum() for gradient in gradients) < 1e-20
        expected = truth.transformed(*gradients) if number > 0 else []
        if number > 0 and truth.is_clear():
            size = max(gradient.abs().max().item() for gradient in expected)
            # A sum over n rows, of the covariance or of the output's moment, rounds by up to n ε.
            roundings = 30 + max(truth.inputs[0].shape[1], truth.outputs[0].shape[1])
            if options.get("shrink", True):
                # Effective rows come from a difference, how samples vary: of its terms it is (N − 1) / n at least.
                roundings *= max(1, truth.inputs[0].shape[1] / max(1, truth.samples[0] - 1))
            tolerance = 1e-9 * size if precision.bits == 64 else roundings * precision.eps * truth.condition * size
            torch.testing.assert_close(transformed, expected, rtol=rounding.eps, atol=tolerance)
        truth.observe(x, upstream)


def quick_or_slow() -> list:
    """Every layer under every option; two of three are slow tests, so that each layer and each option is in both."""
    every = itertools.product(enumerate(CASES), enumerate(TABLE))
    return [
        pytest.param(case, *TABLE[name], id=f"{case.name}-{name}", marks=[pytest.mark.slow] if (i + j) % 3 else [])
        for (i, case), (j, name) in every
    ]


@pytest.mark.parametrize("case, options, method", quick_or_slow())
def test_a_case_of_the_table(case, options, method):
    inputs = [case.make_input(seed) for seed in range(3)]
    conforms(case.make_plain(), inputs, {"damping": 0.1, "decay": 0.9, **options}, method)


def is_computed_rightly(plain: nn.Module, inputs: list[torch.Tensor]) -> bool:
    """Tell whether PyTorch's layer agrees with itself in float64, to the rounding of its type.

    In bfloat16 the CPU's Conv3d with a kernel of (1, 2, 3) and a stride of (1, 1, 2) does not (torch 2.14): it reads
    memory that is not the input's, and returns something else each time.
    """
    exact, size = copy.deepcopy(plain).double(), copy.deepcopy(plain).double()
    for parameter in size.parameters():
        parameter.data.abs_()
    rounding = 4 * torch.finfo(plain.weight.dtype).eps
    return all(
        bool(((plain(x).double() - exact(x.double())).abs() <= rounding * size(x.double().abs())).all()) for x in inputs
    )


@settings(deadline=None, max_examples=120)
@given(
    example=layers(),
    features=st.sampled_from(["patch", "kronecker"]),
    power=st.sampled_from([0.0, 0.3, 0.5, 1.0]),
    output_power=st.sampled_from([0.0, 0.5, 1.0]),
    damping=st.sampled_from([0.03, 0.3]),
    center=st.sampled_from([True, False, None]),
    shrink=st.booleans(),
    rescale=st.booleans(),
    block_size=st.sampled_from([None, 1, 2]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)
def test_a_random_configuration(example, dtype, **options):
    plain, x = example
    inputs = [(x + noise * torch.randn_like(x)).to(dtype) for noise in (0.0, 0.5, 1.0)]
    assume(is_computed_rightly(plain.to(dtype), inputs))
    conforms(plain.to(dtype), inputs, options)
