"""A trained network as a teacher, whose outputs are soft targets (Hinton et al., arXiv 1503.02531)."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import Unusable, one_line
from .network import plain_network
from .record import load
from .video import ClipKind


@dataclass(frozen=True)
class Teacher:
    """A trained network, in evaluation mode and frozen; its file; what clips it sees, or None if it sees images."""

    network: nn.Module
    path: Path
    num_classes: int
    clip: ClipKind | None

    def check(self, num_classes: int, takes_clips: bool) -> None:
        """Raise `Unusable` if the teacher knows other classes, or sees images where there are clips."""
        if self.num_classes != num_classes:
            raise Unusable(f"--teacher {self.path} knows {self.num_classes} classes, and the data have {num_classes}")
        if (self.clip is not None) != takes_clips:
            kinds = ["images", "clips"]
            raise Unusable(f"--teacher {self.path} was trained on {kinds[not takes_clips]}, not {kinds[takes_clips]}")

    def digest(self) -> str:
        """Hash the weights."""
        parts = (value.cpu().numpy().tobytes() for value in self.network.state_dict().values())
        return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def open_teacher(path: Path | None, device: torch.device) -> Teacher | None:
    """Make the plain network of a checkpoint of this program, if there is to be a teacher.

    Raises:
        Unusable: the file is missing or damaged, or no checkpoint, or one that does not fit its network.
    """
    if path is None:
        return None
    state = load(path, "and --teacher takes the checkpoint.pt of a run", "give --teacher another one")
    run = state["run"]
    try:
        network = plain_network(run["model"], run["norm"], run["classes"])
        names = network.state_dict()
        network.load_state_dict({name: value for name, value in state["network"].items() if name in names})
    except (KeyError, AttributeError, RuntimeError) as error:
        raise Unusable(f"{path} does not fit a network of this version: {one_line(error)}") from error
    network.requires_grad_(False)
    return Teacher(network.eval().to(device), path, run["classes"], run.get("clip"))


def soft_loss(outputs: Tensor, taught: Tensor, temperature: float) -> Tensor:
    """The divergence of the network's softened outputs from the teacher's, times the temperature's square.

    Both are logits ``(N, classes)``. The gradient of soft targets shrinks by the square, which makes up for it.
    """
    own, wanted = (F.log_softmax(logits.float() / temperature, 1) for logits in (outputs, taught))
    return temperature**2 * F.kl_div(own, wanted, reduction="batchmean", log_target=True)
