"""The table of layer cases: every test that holds for any layer runs over it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from whiten_layers import GradientTransform, WhitenedLinear
from whiten_layers.layers import TWINS


@dataclass(frozen=True)
class LayerCase:
    name: str
    plain: type[nn.Module]
    whitened: type[nn.Module]
    arguments: tuple
    input_shape: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)

    def make_plain(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        torch.manual_seed(0)
        return self.plain(*self.arguments, **self.options, dtype=dtype)

    def make_pair(
        self, transform: GradientTransform | str | None = None, dtype: torch.dtype = torch.float64
    ) -> tuple[nn.Module, nn.Module]:
        """The plain layer and its whitened twin, with equal parameters."""
        plain = self.make_plain(dtype)
        whitened = self.whitened(*self.arguments, **self.options, dtype=dtype, transform=transform)
        whitened.load_state_dict(plain.state_dict())
        return plain, whitened

    def make_input(self, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
        """An input whose features are correlated, unequal, and not centred."""
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(self.input_shape, generator=generator, dtype=torch.float64)
        return (noise + 0.7 * noise.cumsum(-1) + 0.3).to(dtype)


def linear(name: str, input_shape: tuple[int, ...], *arguments: Any, **options: Any) -> LayerCase:
    return LayerCase(f"linear-{name}", nn.Linear, WhitenedLinear, arguments, input_shape, options)


def conv(dims: int, name: str, input_shape: tuple[int, ...], *arguments: Any, **options: Any) -> LayerCase:
    plain = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    return LayerCase(f"conv{dims}d-{name}", plain, TWINS[plain], arguments, input_shape, options)


def transposed(dims: int, name: str, input_shape: tuple[int, ...], *arguments: Any, **options: Any) -> LayerCase:
    plain = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dims - 1]
    return LayerCase(f"transposed{dims}d-{name}", plain, TWINS[plain], arguments, input_shape, options)


CASES = [
    linear("bias", (20, 6), 6, 4),
    linear("nobias", (20, 6), 6, 4, bias=False),
    linear("sequence", (5, 4, 6), 6, 3),
    linear("vector", (6,), 6, 3),
    linear("wide", (4, 12), 12, 5),  # more features than rows
    linear("one-row", (1, 5), 5, 3),
    conv(2, "bias", (3, 4, 6, 7), 4, 5, 3, padding=1),
    conv(2, "nobias", (3, 4, 6, 7), 4, 5, 3, bias=False),
    conv(2, "pointwise", (3, 4, 6, 6), 4, 5, 1),
    conv(2, "pointwise-stride", (3, 4, 6, 7), 4, 5, 1, stride=2, bias=False),
    conv(2, "stride", (3, 4, 7, 8), 4, 6, 3, stride=(2, 3), padding=(1, 0)),
    conv(2, "dilation", (2, 3, 9, 8), 3, 4, (3, 2), dilation=(2, 3), padding=2),
    conv(2, "groups", (3, 6, 6, 5), 6, 4, 3, groups=2, padding=1),
    conv(2, "depthwise", (3, 4, 6, 6), 4, 8, 3, groups=4, bias=False),
    conv(2, "same", (2, 3, 6, 7), 3, 4, (3, 4), padding="same", dilation=(1, 2)),
    conv(2, "valid", (2, 3, 6, 7), 3, 4, 3, padding="valid"),
    conv(2, "reflect", (2, 3, 6, 7), 3, 4, 3, padding=2, padding_mode="reflect"),
    conv(2, "replicate", (2, 3, 6, 7), 3, 4, 3, padding=(1, 2), padding_mode="replicate", stride=2),
    conv(2, "circular-same", (2, 3, 6, 7), 3, 4, 4, padding="same", padding_mode="circular"),
    conv(2, "unbatched", (3, 6, 7), 3, 4, 3, padding=1),
    conv(2, "everything", (2, 6, 9, 8), 6, 4, (2, 3), stride=(2, 1), padding=(2, 1), dilation=(1, 2), groups=2),
    conv(1, "bias", (4, 3, 9), 3, 5, 3, padding=1),
    conv(1, "everything", (2, 4, 11), 4, 6, 3, stride=2, padding=2, dilation=2, groups=2, bias=False),
    conv(1, "depthwise", (3, 4, 8), 4, 4, 3, groups=4, padding="same", padding_mode="circular"),
    conv(1, "unbatched", (3, 9), 3, 4, 3),
    conv(3, "bias", (2, 3, 4, 3, 5), 3, 4, (2, 2, 3), padding=(1, 0, 1)),
    conv(
        3, "everything", (2, 4, 4, 5, 5), 4, 4, 2, stride=(1, 2, 1), dilation=(2, 1, 2), groups=2, padding=1, bias=False
    ),
    conv(3, "unbatched", (2, 3, 4, 3), 2, 3, 2, padding=1, padding_mode="replicate"),
    transposed(1, "bias", (4, 3, 7), 3, 4, 3, stride=2),
    transposed(
        1, "everything", (3, 4, 6), 4, 6, 3, stride=3, padding=2, output_padding=1, dilation=2, groups=2, bias=False
    ),
    transposed(1, "unbatched", (3, 6), 3, 4, 4, stride=2, padding=1),
    transposed(2, "bias", (2, 3, 4, 5), 3, 4, 3, stride=2, padding=1, output_padding=1),
    transposed(2, "pointwise", (2, 3, 4, 5), 3, 4, 1, stride=(1, 2), bias=False),
    transposed(2, "same-rate", (2, 3, 5, 5), 3, 4, (3, 2), padding=(2, 1)),
    transposed(2, "depthwise", (3, 4, 4, 4), 4, 8, 2, stride=2, groups=4),
    transposed(2, "everything", (2, 4, 4, 3), 4, 6, (3, 2), (2, 3), (1, 0), (0, 1), 2, True, (1, 2)),
    transposed(2, "cropped", (2, 3, 5, 5), 3, 4, 2, stride=2, padding=3),
    transposed(3, "bias", (2, 2, 3, 2, 3), 2, 3, 2, stride=(1, 2, 2)),
    transposed(3, "groups", (1, 4, 2, 3, 2), 4, 4, (2, 1, 2), stride=2, groups=2, padding=(1, 0, 0), bias=False),
]


def everywhere(test: Callable) -> Callable:
    """Run a test once for each case."""
    import pytest

    return pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)(test)
