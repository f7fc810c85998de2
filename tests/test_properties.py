"""What must hold for every configuration that linear layers and convolutions accept, over random ones."""

import copy
import warnings

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from whiten_layers import FeatureWhitening, WhitenedLinear, whiten
from whiten_layers.convert import TWINS
from whiten_layers.patches import patch_rows, tap_correlation

from . import reference

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d), (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@st.composite
def convolutions(draw):
    """A plain float64 convolution, transposed or not, of one to three dimensions, and an input that it takes."""
    dims, is_transposed = draw(st.sampled_from([1, 2, 2, 3])), draw(st.booleans())
    groups = draw(st.integers(1, 3))

    def each(low, high):
        return tuple(draw(st.integers(low, high)) for _ in range(dims))

    options = {
        "stride": each(1, 3),
        "dilation": each(1, 3 if dims < 3 else 2),
        "groups": groups,
        "bias": draw(st.booleans()),
    }
    if is_transposed:
        options["padding"] = each(0, 2)
        larger = zip(options["stride"], options["dilation"], strict=True)
        options["output_padding"] = tuple(draw(st.integers(0, max(pair) - 1)) for pair in larger)
    else:
        spellings = [each(0, 2), "valid", *(["same"] if set(options["stride"]) == {1} else [])]
        options["padding"] = draw(st.sampled_from(spellings))
        options["padding_mode"] = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    channels = draw(st.integers(1, 3)) * groups, draw(st.integers(1, 3)) * groups
    torch.manual_seed(draw(st.integers(0, 1000)))
    layer = CONVOLUTIONS[is_transposed][dims - 1](*channels, each(1, 3), **options).double()
    x = torch.randn(draw(st.integers(1, 3)), channels[0], *each(3, 8 if dims < 3 else 4)).double()
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
    geometry = TWINS[type(layer)].geometry(layer)
    rows = patch_rows(x, geometry)
    product = rows @ reference.matrix(layer, layer.weight).mT
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
    twin = whiten(copy.deepcopy(plain), transform)
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
