"""Random layers, with inputs that they take, for property tests."""

import warnings

import torch
from hypothesis import assume
from hypothesis import strategies as st
from torch import nn

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
    if draw(st.booleans()) and len(x) == 1:
        x = x[0]  # unbatched
    try:
        with warnings.catch_warnings(action="ignore"):  # "same" and an even kernel: told once, and so not reproducible
            layer(x)
    except RuntimeError:  # the kernel is larger than the input, or the padding is for its mode
        assume(False)
    return layer, x


@st.composite
def linears(draw):
    """A plain float64 linear layer and an input of any number of leading dimensions."""
    features, outputs, bias = draw(st.integers(1, 7)), draw(st.integers(1, 4)), draw(st.booleans())
    torch.manual_seed(draw(st.integers(0, 1000)))
    layer = nn.Linear(features, outputs, bias, dtype=torch.float64)
    x = torch.randn(*draw(st.lists(st.integers(1, 5), max_size=3)), features).double()
    return layer, x + 0.5 * x.cumsum(-1) + 0.3


def layers():
    """Any layer that has a whitened twin."""
    return st.one_of(linears(), convolutions(), convolutions())
