"""What must hold for every configuration that nn.Conv2d and nn.Linear accept, over random ones."""

import warnings

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from whiten_layers import FeatureWhitening, WhitenedConv2d, WhitenedLinear
from whiten_layers.patches import patch_rows, tap_correlation

from . import reference

pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))


@st.composite
def convolutions(draw):
    """A plain float64 convolution and an input that it takes."""
    groups = draw(st.integers(1, 3))
    mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    stride = draw(pairs)
    choices = [st.tuples(st.integers(0, 2), st.integers(0, 2)), st.just("valid")]
    padding = draw(st.one_of(*choices, *([st.just("same")] if stride == (1, 1) else [])))
    options = {"stride": stride, "padding": padding, "dilation": draw(pairs), "padding_mode": mode}
    channels = draw(st.integers(1, 3)) * groups, draw(st.integers(1, 3)) * groups
    torch.manual_seed(draw(st.integers(0, 1000)))
    layer = nn.Conv2d(*channels, draw(pairs), groups=groups, bias=draw(st.booleans()), **options).double()
    x = torch.randn(draw(st.integers(1, 3)), channels[0], draw(st.integers(3, 8)), draw(st.integers(3, 8))).double()
    x = x + 0.5 * x.cumsum(-1) + 0.3
    try:
        with warnings.catch_warnings(action="ignore"):  # "same" and an even kernel: told once, and so not reproducible
            layer(x)
    except RuntimeError:  # the kernel is larger than the input, or the padding is for its mode
        assume(False)
    return layer, x


@settings(deadline=None, max_examples=150)
@given(convolutions())
def test_patches_and_tap_correlations(example):
    layer, x = example
    geometry = WhitenedConv2d.geometry(layer)
    rows = patch_rows(x, geometry)
    product = rows @ layer.weight.view(layer.groups, -1, rows.shape[-1]).mT
    if layer.bias is not None:
        product = product + layer.bias.view(layer.groups, 1, -1)
    torch.testing.assert_close(product, reference.output_rows(layer, layer(x)), rtol=1e-10, atol=1e-10)
    correlation = tap_correlation(x, geometry)
    torch.testing.assert_close(correlation, correlation.mT, rtol=0, atol=0)
    assert torch.linalg.eigvalsh(correlation).min() > -1e-9


@settings(deadline=None, max_examples=100)
@given(
    example=convolutions(),
    features=st.sampled_from(["patch", "kronecker"]),
    power=st.sampled_from([0.0, 0.5, 1.0]),
    output_power=st.sampled_from([0.0, 0.5, 1.0]),
    center=st.booleans(),
    rescale=st.booleans(),
)
def test_the_twin_is_plain_but_for_a_descent_direction(example, features, power, output_power, center, rescale):
    plain, x = example
    options = {"features": features, "power": power, "output_power": output_power, "center": center, "rescale": rescale}
    transform = FeatureWhitening(update_interval=1, **options)
    twin = WhitenedConv2d(
        plain.in_channels,
        plain.out_channels,
        plain.kernel_size,
        plain.stride,
        plain.padding,
        plain.dilation,
        plain.groups,
        plain.bias is not None,
        plain.padding_mode,
        dtype=torch.float64,
        transform=transform,
    )
    twin.load_state_dict(plain.state_dict())
    for step in range(3):
        results = []
        for layer in (plain, twin):
            layer.zero_grad()
            leaf = (x * (1 + step)).requires_grad_()
            y = layer(leaf)
            (y.sin() + 0.1 * y).sum().backward()
            results.append((y.detach(), leaf.grad))
        torch.testing.assert_close(*results, rtol=0, atol=0)
        couples = list(zip(plain.parameters(), twin.parameters(), strict=True))
        assert all(b.grad.isfinite().all() and b.grad.shape == a.grad.shape for a, b in couples)
        size = sum(a.grad.square().sum() for a, _ in couples)
        assert sum((a.grad * b.grad).sum() for a, b in couples) > 0 or size < 1e-20


@settings(deadline=None, max_examples=60)
@given(
    leading=st.lists(st.integers(0, 5), max_size=3),
    features=st.integers(1, 7),
    outputs=st.integers(1, 4),
    bias=st.booleans(),
    power=st.sampled_from([0.5, 1.0]),
)
def test_linear_layers_take_any_leading_dimensions(leading, features, outputs, bias, power):
    transform = FeatureWhitening(power=power, output_power=0.5)
    layer = WhitenedLinear(features, outputs, bias, dtype=torch.float64, transform=transform)
    plain = nn.Linear(features, outputs, bias, dtype=torch.float64)
    plain.load_state_dict({name: p for name, p in layer.state_dict().items() if "transform" not in name})
    for _ in range(3):
        x = torch.randn(*leading, features, dtype=torch.float64)
        torch.testing.assert_close(layer(x), plain(x), rtol=0, atol=0)
        layer(x).square().sum().backward()
        assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())
