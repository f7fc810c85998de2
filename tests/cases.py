"""The table of layer cases: every test that holds for any layer runs over it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from whiten_layers import GradientTransform, WhitenedConv2d, WhitenedLinear


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


def conv2d(name: str, input_shape: tuple[int, ...], *arguments: Any, **options: Any) -> LayerCase:
    return LayerCase(f"conv2d-{name}", nn.Conv2d, WhitenedConv2d, arguments, input_shape, options)


CASES = [
    linear("bias", (20, 6), 6, 4),
    linear("nobias", (20, 6), 6, 4, bias=False),
    linear("sequence", (5, 4, 6), 6, 3),
    linear("vector", (6,), 6, 3),
    linear("wide", (4, 12), 12, 5),  # more features than rows
    linear("one-row", (1, 5), 5, 3),
    conv2d("bias", (3, 4, 6, 7), 4, 5, 3, padding=1),
    conv2d("nobias", (3, 4, 6, 7), 4, 5, 3, bias=False),
    conv2d("pointwise", (3, 4, 6, 6), 4, 5, 1),
    conv2d("pointwise-stride", (3, 4, 6, 7), 4, 5, 1, stride=2, bias=False),
    conv2d("stride", (3, 4, 7, 8), 4, 6, 3, stride=(2, 3), padding=(1, 0)),
    conv2d("dilation", (2, 3, 9, 8), 3, 4, (3, 2), dilation=(2, 3), padding=2),
    conv2d("groups", (3, 6, 6, 5), 6, 4, 3, groups=2, padding=1),
    conv2d("depthwise", (3, 4, 6, 6), 4, 8, 3, groups=4, bias=False),
    conv2d("same", (2, 3, 6, 7), 3, 4, (3, 4), padding="same", dilation=(1, 2)),
    conv2d("valid", (2, 3, 6, 7), 3, 4, 3, padding="valid"),
    conv2d("reflect", (2, 3, 6, 7), 3, 4, 3, padding=2, padding_mode="reflect"),
    conv2d("replicate", (2, 3, 6, 7), 3, 4, 3, padding=(1, 2), padding_mode="replicate", stride=2),
    conv2d("circular-same", (2, 3, 6, 7), 3, 4, 4, padding="same", padding_mode="circular"),
    conv2d("unbatched", (3, 6, 7), 3, 4, 3, padding=1),
    conv2d("everything", (2, 6, 9, 8), 6, 4, (2, 3), stride=(2, 1), padding=(2, 1), dilation=(1, 2), groups=2),
]


def everywhere(test: Callable) -> Callable:
    """Run a test once for each case."""
    import pytest

    return pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)(test)
