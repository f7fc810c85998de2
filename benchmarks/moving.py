"""Eight classes of videos, made of images that a dependency ships: textures and digits, each moved in four ways.

What moves says half of a class, and a single frame shows it; how it moves takes several frames.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from .data import all_digits, photographs

CONTENTS = ("texture", "digit")
MOTIONS = ("shift", "turn", "zoom", "flicker")
CLASSES = [f"{content} {motion}" for content in CONTENTS for motion in MOTIONS]


def encode(path: Path, frames: np.ndarray, codec: str = "libx264", **options: str) -> None:
    """Encode frames ``(T, H, W, 3)`` of bytes into a file, whose ending names the container."""
    import av

    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=25)  # of a codec for videos
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        stream.codec_context.thread_count = 1  # with several a frame may come out otherwise
        stream.options = options
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def moved(scene: Tensor, motion: str, frames: int, size: int, generator: Generator) -> Tensor:
    """Film a scene ``(3, H, W)`` by a camera that moves evenly, or in a light that flickers.

    Returns:
        Frames ``(T, 3, size, size)``.
    """

    def uniform(least: float, most: float) -> float:
        return least + (most - least) * torch.rand((), generator=generator).item()

    sign = 1 if torch.rand((), generator=generator) < 0.5 else -1
    heading, pace = uniform(0, 2 * math.pi), uniform(0.6, 1.4)
    angle, spread = uniform(0, 2 * math.pi), size / max(scene.shape[1:])
    made = []
    for step in range(frames):
        done = step - (frames - 1) / 2  # the middle of a film is its scene's
        turn = angle + sign * pace * 0.06 * done * (motion == "turn")
        scale = spread * math.exp(sign * pace * 0.03 * done * (motion == "zoom"))
        far = sign * pace * 0.04 * spread * done * (motion == "shift")
        cosine, sine = scale * math.cos(turn), scale * math.sin(turn)
        matrix = torch.tensor([[cosine, -sine, far * math.cos(heading)], [sine, cosine, far * math.sin(heading)]])
        grid = F.affine_grid(matrix[None], [1, 3, size, size], align_corners=False)
        frame = F.grid_sample(scene[None], grid, padding_mode="reflection", align_corners=False)[0]
        made.append(frame * (1 + 0.25 * math.sin(pace * 1.5 * step + heading) * (motion == "flicker")))
    return torch.stack(made)


def part(scenes: list[Tensor], window: int, generator: Generator, held_out: bool) -> Tensor:
    """Cut a square out of a photograph: of the right quarter, or of the rest."""
    scene = scenes[int(torch.randint(len(scenes), (), generator=generator))]
    left, right = (480, 640) if held_out else (0, 480)
    y = int(torch.randint(scene.shape[1] - window + 1, (), generator=generator))
    x = int(torch.randint(left, right - window + 1, (), generator=generator))
    return scene[:, y : y + window, x : x + window]


def videos(
    number: int, frames: int, size: int, generator: Generator, *, held_out: bool
) -> Iterator[tuple[np.ndarray, int]]:
    """Draw `number` videos, of each class as many.

    Those held out show the photographs' right quarter and the last quarter of the digits, which no other shows. Of
    four parts of a photograph the one with the most contrast is taken, so that there is something to move.

    Yields:
        Frames ``(T, size, size, 3)`` of bytes, and the class.
    """
    scenes, (digits, _) = photographs(), all_digits()
    digits = (digits - digits.amin()) / (digits.amax() - digits.amin())
    window, margin, quarter = 2 * size, 5 * size // 8, len(digits) // 4
    for index in range(number):
        label = index % len(CLASSES)
        content, motion = divmod(label, len(MOTIONS))
        if CONTENTS[content] == "texture":
            scene = max((part(scenes, window, generator, held_out) for _ in range(4)), key=lambda drawn: drawn.std())
        else:
            first, last = (3 * quarter, len(digits)) if held_out else (0, 3 * quarter)
            digit = digits[int(torch.randint(first, last, (), generator=generator))]
            colour = torch.rand(3, 1, 1, generator=generator)
            grain = 0.1 * torch.rand(3, window, window, generator=generator)
            large = F.interpolate(digit[None], size=window - 2 * margin, mode="bilinear")[0]
            scene = grain + 0.9 * F.pad(large, [margin] * 4) * (0.4 + 0.6 * colour)
        film = moved(scene, MOTIONS[motion], frames, size, generator)
        yield (255 * film.clamp(0, 1)).round().byte().permute(0, 2, 3, 1).numpy(), label
