"""Reading compressed clips: the frames of a video file, and what the codec's own prediction leaves of them.

A codec describes most frames by vectors: where in an earlier or a later frame each block is to be copied from. What
then remains, the frame minus that motion-compensated prediction, is the frame's residual.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import v2

from .errors import SHORTAGES, Unusable, one_line

if TYPE_CHECKING:
    from av import VideoFrame

ClipKind = Literal["rgb", "residual"]
IMAGENET_COLOURS = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # means and deviations
RESIDUAL = 0.1  # a deviation about that of residuals, whose mean is 0
PAST, FUTURE = -1, 1  # the signs that FFmpeg gives to vectors


class Video:
    """The decoded frames of a file, all of one size, in the order in which they are shown."""

    def __init__(self, frames: Sequence["VideoFrame"]) -> None:
        self.frames = frames
        self._pictures: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self.frames)

    @property
    def has_vectors(self) -> bool:
        """Whether the decoder has exported motion vectors."""
        return any(_vectors(frame) is not None for frame in self.frames)

    def picture(self, number: int) -> Tensor:
        """A frame ``(3, H, W)``, from 0 to 1."""
        if number not in self._pictures:
            colours = torch.from_numpy(self.frames[number].to_ndarray(format="rgb24"))
            self._pictures[number] = colours.permute(2, 0, 1).float() / 255
        return self._pictures[number]

    def prediction(self, number: int) -> Tensor:
        """Predict a frame ``(3, H, W)`` by its motion vectors, or by the frame before where a block has none.

        FFmpeg tells whether a vector leads to the past or to the future, not to which frame. Here it is the nearest one
        that is no B-frame. For MPEG-4, and for H.264 with one reference frame and no pyramid of B-frames, that is so;
        otherwise it is a guess. (Of MPEG-4's B-frames FFmpeg exports zeros.) A block with vectors to both sides has the
        mean. Fractions of a pixel are interpolated bilinearly, where codecs have longer filters. The first frame is its
        own prediction.
        """
        if number == 0:
            return self.picture(0)
        before, vectors = self.picture(number - 1), _vectors(self.frames[number])
        if vectors is None:
            return before
        total, weight = torch.zeros_like(before), torch.zeros(before.shape[1:])
        for sign, others in ((PAST, range(number - 1, -1, -1)), (FUTURE, range(number + 1, len(self)))):
            reference = next((other for other in others if not _is_b_frame(self.frames[other])), None)
            if reference is not None:
                shift, covered = displacements(vectors[np.sign(vectors["source"]) == sign], *before.shape[1:])
                total += covered * displaced(self.picture(reference), shift)
                weight += covered
        return torch.where(weight > 0, total / weight.clamp_min(1), before)

    def clip(self, kind: ClipKind, numbers: Iterable[int]) -> Tensor:
        """Frames, or their residuals, standardised for a network: ``(T, 3, H, W)``.

        Residuals of frames without motion vectors are differences to the frame before.
        """
        if kind == "residual":
            return torch.stack([self.picture(n) - self.prediction(n) for n in numbers]) / RESIDUAL
        means, deviations = (torch.tensor(values).view(3, 1, 1) for values in IMAGENET_COLOURS)
        return (torch.stack([self.picture(n) for n in numbers]) - means) / deviations


def displacements(vectors: np.ndarray, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Spread the vectors of blocks over their pixels.

    Returns:
        Columns and rows ``(2, height, width)`` from each pixel to where it is predicted from, and 1 for each pixel
        ``(height, width)`` that a block covers.
    """
    shift, covered = np.zeros((2, height, width), np.float32), np.zeros((height, width), np.float32)
    edges = []
    for place, size in (("dst_y", "h"), ("dst_x", "w")):
        middle, half = vectors[place].astype(int), vectors[size].astype(int) // 2
        edges += [(middle - half).clip(0).tolist(), (middle + half).clip(0).tolist()]
    across, down = ((vectors[name] / vectors["motion_scale"]).tolist() for name in ("motion_x", "motion_y"))
    for top, bottom, left, right, *moved in zip(*edges, across, down, strict=True):
        shift[:, top:bottom, left:right] = np.reshape(moved, (2, 1, 1))
        covered[top:bottom, left:right] = 1
    return torch.from_numpy(shift), torch.from_numpy(covered)


def displaced(picture: Tensor, shift: Tensor) -> Tensor:
    """Take each pixel of a picture ``(C, H, W)`` from where its displacement leads; beyond the border is the border."""
    height, width = picture.shape[1:]
    columns = torch.arange(width) + shift[0]
    rows = torch.arange(height)[:, None] + shift[1]
    grid = torch.stack([2 * columns / max(width - 1, 1) - 1, 2 * rows / max(height - 1, 1) - 1], -1)
    return F.grid_sample(picture[None], grid[None], padding_mode="border", align_corners=True)[0]


def _vectors(frame: "VideoFrame") -> np.ndarray | None:
    data: Any = frame.side_data.get("MOTION_VECTORS")
    return None if data is None else data.to_ndarray()


def _is_b_frame(frame: "VideoFrame") -> bool:
    from av.video.frame import PictureType

    return frame.pict_type == PictureType.B


def decode(path: Path, *, vectors: bool = False) -> Video:
    """Decode all frames of a video file, with their motion vectors if they are asked for.

    Raises:
        Unusable: it is no video, or damaged, or has no frame.
    """
    import av

    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise Unusable(f"{path} has no video in it; {CURE}")
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1  # files are decoded side by side
            if vectors:
                stream.codec_context.options = {"flags2": "+export_mvs"}
            frames = list(container.decode(stream))
    except (av.FFmpegError, OSError, ValueError) as error:
        if getattr(error, "errno", None) in SHORTAGES:
            raise
        raise Unusable(f"{path} cannot be read as a video: {one_line(error)}; {CURE}") from error
    if len({(frame.width, frame.height) for frame in frames}) > 1:
        raise Unusable(f"{path} has frames of several sizes; {CURE}")
    if not frames:
        raise Unusable(f"{path} has no frame in it; {CURE}")
    return Video(frames)


CURE = "mend it and --resume, or take it off the list of its split and begin again"


def start_of(span: int, length: int, varied: bool) -> int:
    """Choose where in a video of this length a clip begins: at random, or so that it is the middle."""
    rest = length - span
    return int(torch.randint(rest + 1, ())) if varied else rest // 2


@dataclass(frozen=True)
class Clip:
    """Transform of a file's path into clips of it, all of the same frames and the same part of the picture.

    Args:
        kinds: what the network is given, and then what else a teacher is.
        frames: length of a clip.
        interval: from one frame of it to the next.
        picture: augmentation or cropping of a tensor ``(T, C, H, W)``.
        varied: begin where the random numbers say, not in the middle.

    Returns:
        Clips ``(3, T, H, W)``, a tensor for each of the kinds.
    """

    kinds: tuple[ClipKind, ...]
    frames: int
    interval: int
    picture: v2.Transform
    varied: bool

    def __call__(self, path: Path) -> tuple[Tensor, ...]:
        video = decode(path, vectors="residual" in self.kinds)
        span = (self.frames - 1) * self.interval + 1
        if len(video) < span:
            raise Unusable(
                f"{path} is too short: it has {len(video)} frames, and a clip of --frames {self.frames} with "
                f"--frame-interval {self.interval} takes {span}; {CURE}"
            )
        start = start_of(span, len(video), self.varied)
        numbers = range(start, start + span, self.interval)
        whole = torch.cat([video.clip(kind, numbers) for kind in self.kinds], 1)
        return tuple(part.transpose(0, 1).contiguous() for part in self.picture(whole).split(3, 1))
