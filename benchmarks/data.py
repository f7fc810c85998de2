"""Real images that a dependency ships: scikit-learn's handwritten digits and its two photographs.

It is imported where they are loaded: that takes over a second, which a training on other images need not wait for.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor


@dataclass(frozen=True)
class Images:
    """Images ``(N, 3, H, W)`` with zero mean and unit variance, and their classes ``(N,)``."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    num_classes: int  # of training
    augment: Callable[[Tensor, Generator], Tensor] = lambda images, generator: images


def random_affine(images: Tensor, generator: Generator) -> Tensor:
    """Rotate images by up to 25°, scale by up to a quarter, shift by up to an eighth, and add noise."""

    def uniform(limit: float) -> Tensor:
        return (2 * torch.rand(len(images), generator=generator) - 1) * limit

    angle, scale = torch.deg2rad(uniform(25)), 1 + uniform(0.25)
    cosine, sine = scale * angle.cos(), scale * angle.sin()
    matrix = torch.stack([cosine, -sine, uniform(0.25), sine, cosine, uniform(0.25)], 1).view(-1, 2, 3)
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    return moved + 0.3 * torch.randn(moved.shape, generator=generator)


def all_digits() -> tuple[Tensor, Tensor]:
    """Load 1,797 handwritten digits of 8×8 pixels, enlarged to 16×16."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None]
    images = F.interpolate(images, size=16, mode="bilinear").expand(-1, 3, -1, -1)
    return (images - images.mean()) / images.std(), torch.tensor(data.target)


def photographs() -> list[Tensor]:
    """Load two photographs, (3, 427, 640)."""
    from sklearn.datasets import load_sample_images

    images = [torch.tensor(np.ascontiguousarray(image)) for image in load_sample_images().images]
    return [image.permute(2, 0, 1).float() / 255 for image in images]


def standardised(train: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    """Standardise both by the means and deviations of the training samples, for each colour of images or each feature.

    What is constant becomes 0.
    """
    dims = [dim for dim in range(train.dim()) if dim != 1]
    mean, std = train.mean(dims, keepdim=True), train.std(dims, keepdim=True)
    std = torch.where(std > 0, std, 1.0)
    return (train - mean) / std, (test - mean) / std


def digits() -> Images:
    """Load the digits, a quarter held out for testing."""
    images, labels = all_digits()
    order = torch.randperm(len(labels), generator=Generator().manual_seed(0))
    test, train = order[: len(order) // 4], order[len(order) // 4 :]
    return Images((images[train], labels[train]), (images[test], labels[test]), 10, random_affine)


def crops() -> Images:
    """Cut 6,400 crops of 32×32 from two photographs; the class is the photograph and one of four rotations.

    The 1,600 test crops come from the photographs' right quarter, which no training crop touches.
    """
    scenes, generator = photographs(), Generator().manual_seed(0)

    def draw(number: int, left: float, right: float) -> tuple[Tensor, Tensor]:
        images, labels = [], torch.randint(8, (number,), generator=generator)
        for label in labels.tolist():
            scene = scenes[label // 4]
            _, height, width = scene.shape
            y = int(torch.randint(height - 32 + 1, (), generator=generator))
            x = int(torch.randint(int(left * width), int(right * width) - 32 + 1, (), generator=generator))
            images.append(scene[:, y : y + 32, x : x + 32].rot90(label % 4, (1, 2)))
        return torch.stack(images), labels

    (train, train_labels), (test, test_labels) = draw(6400, 0, 0.75), draw(1600, 0.75, 1)
    train, test = standardised(train, test)
    return Images((train, train_labels), (test, test_labels), 8)


def digit_classes(seed: int) -> Images:
    """Load the digits of five classes, drawn by `seed`, for training, and those of the other five for testing."""
    images, labels = all_digits()
    order = torch.randperm(10, generator=Generator().manual_seed(seed))
    known = torch.isin(labels, order[:5])
    return Images((images[known], labels[known]), (images[~known], labels[~known]), 5, random_affine)


def place_classes(seed: int) -> Images:
    """Cut 40 crops of 32×32 from each of 40 places for training, and of 40 others for testing; the class is the place.

    A place is a cell of 85×80 pixels of a photograph, in its left half for training and its right half for testing. A
    crop is turned by any angle and shifted as far as the cell has room. `seed` draws both.
    """
    size, height, width = 32, 85, 80
    generator = Generator().manual_seed(seed)
    span = (torch.arange(size) - (size - 1) / 2).repeat(size, 1)
    offsets = torch.stack([span, span.T], -1).view(-1, 2)  # x and y of a crop's pixels from its middle
    reach = (size - 1) / 2**0.5  # of its corners

    def place(scene: Tensor, top: int, left: int) -> Tensor:
        angle = 2 * torch.pi * torch.rand(40, generator=generator)
        turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], -1).view(-1, 2, 2)
        room = torch.tensor([width, height]) - 1 - 2 * reach
        middle = torch.tensor([left, top]) + reach + room * torch.rand(40, 2, generator=generator)
        points = (offsets @ turn + middle.unsqueeze(1)) / (torch.tensor([scene.shape[2], scene.shape[1]]) - 1)
        crops = F.grid_sample(scene[None], (2 * points - 1)[None], align_corners=True)
        return crops[0].view(3, 40, size, size).transpose(0, 1)

    def half(start: int) -> tuple[Tensor, Tensor]:
        cells = [(y * height, start + x * width) for y in range(5) for x in range(4)]
        crops = torch.stack([place(scene, *cell) for scene in photographs() for cell in cells])
        return crops.flatten(0, 1), torch.arange(len(crops)).repeat_interleave(40)

    (train, train_labels), (test, test_labels) = half(0), half(320)
    train, test = standardised(train, test)
    return Images((train, train_labels), (test, test_labels), 40)


DATASETS = {"digits": digits, "crops": crops}
CLASSES = {"digits": digit_classes, "crops": place_classes}  # no class of testing is one of training
