"""The gradient transform of a benchmark's whitened network, as options of a command line."""

from dataclasses import dataclass
from typing import Any, Literal

from whiten_layers import Chain, EigenbasisScaling, FeatureWhitening, GradientTransform, OptimalInputGain

from .options import Switch, read

SHARED = ("decay", "update_interval", "statistics_interval", "max_rows")  # of both transforms
OF_WHITENING = [*SHARED, "method", "features", "power", "output_power", "damping", "center", "rescale"]
OF_WHITENING += ["shrink", "bound", "block_size", "rank"]
OF_EIGENBASIS = ("damping", "variance_decay", "decay", "interval", "features", "max_rows", "block_size")


@dataclass(frozen=True)
class TransformOptions:
    """Options of a transform; None stands for its own default.

    An option that the chosen transform does not have is ignored.
    """

    transform: Literal["whitening", "eigenbasis", "optimal_gain", "whitening+optimal_gain"] | None = None  # the first
    exact: Switch = False  # start from FeatureWhitening.exact()
    method: str | None = None
    features: str | None = None
    power: float | None = None
    output_power: float | None = None
    damping: float | None = None
    gain_damping: float | None = None  # the damping of OptimalInputGain
    decay: float | None = None
    update_interval: int | None = None
    statistics_interval: int | None = None
    max_rows: int | None = None
    block_size: int | None = None
    rank: int | None = None
    center: bool | None = None
    rescale: bool | None = None
    shrink: bool | None = None
    bound: float | None = None
    variance_decay: float | None = None  # of EigenbasisScaling, as the next
    interval: int | None = None

    def make(self) -> GradientTransform:
        """The transform.

        Raises:
            ValueError: a value is not possible.
        """
        if self.transform == "eigenbasis":
            own = {name: getattr(self, name) for name in OF_EIGENBASIS}
            return EigenbasisScaling(**{name: value for name, value in own.items() if value is not None})
        given = {name: getattr(self, name) for name in OF_WHITENING if getattr(self, name) is not None}
        whitening = FeatureWhitening.exact(**given) if self.exact else FeatureWhitening(**given)
        if self.transform in (None, "whitening"):
            return whitening
        of_gains = {name: value for name, value in given.items() if name in SHARED}
        if self.gain_damping is not None:
            of_gains["damping"] = self.gain_damping
        elif self.transform == "optimal_gain" and self.damping is not None:
            of_gains["damping"] = self.damping
        gains = OptimalInputGain(**of_gains)
        return gains if self.transform == "optimal_gain" else Chain(whitening, gains)

    def changed(self, text: str) -> "TransformOptions":
        """The same options but for those that `text` names: ``method=recursive,rank=8``."""
        return read(self, f"--compare {text}", None, [f"--{part.strip()}" for part in text.split(",")])


def settings_of(transform: GradientTransform) -> dict[str, Any]:
    """All settings that a transform was made with; those of a chain by the positions of its members."""
    if isinstance(transform, Chain):
        return {str(position): settings_of(member) for position, member in enumerate(transform.members())}
    names = OF_EIGENBASIS if isinstance(transform, EigenbasisScaling) else OF_WHITENING
    return {name: getattr(transform, name) for name in names if hasattr(transform, name)}
