"""Real images that a dependency ships: scikit-learn's handwritten digits and its two photographs."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits, load_sample_images
from torch import Generator, Tensor


@dataclass(frozen=True)
class Images:
    """Images ``(N, 3, H, W)`` with zero mean and unit variance, and their classes ``(N,)``."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    num_classes: int
    augment: Callable[[Tensor, Generator], Tensor] = lambda images, generator: images


def random_affine(images: Tensor, generator: Generator) -> Tensor:
    """Turn by up to 25°, scale by up to a quarter, shift by up to an eighth, and add noise."""

    def uniform(limit: float) -> Tensor:
        return (2 * torch.rand(len(images), generator=generator) - 1) * limit

    angle, scale = torch.deg2rad(uniform(25)), 1 + uniform(0.25)
    cosine, sine = scale * angle.cos(), scale * angle.sin()
    matrix = torch.stack([cosine, -sine, uniform(0.25), sine, cosine, uniform(0.25)], 1).view(-1, 2, 3)
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    return moved + 0.3 * torch.randn(moved.shape, generator=generator)


def digits() -> Images:
    """1,797 handwritten digits of 8×8 pixels, at 16×16; a quarter held out for testing."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None]
    images = F.interpolate(images, size=16, mode="bilinear").expand(-1, 3, -1, -1)
    images = (images - images.mean()) / images.std()
    labels = torch.tensor(data.target)
    order = torch.randperm(len(labels), generator=Generator().manual_seed(0))
    test, train = order[: len(order) // 4], order[len(order) // 4 :]
    return Images((images[train], labels[train]), (images[test], labels[test]), 10, random_affine)


def crops() -> Images:
    """6,400 crops of 32×32 from two photographs, turned: which photograph, and which of four rotations?

    The 1,600 test crops come from the photographs' right quarter, which no training crop touches.
    """
    photographs = [torch.tensor(np.ascontiguousarray(image)) for image in load_sample_images().images]
    photographs = [image.permute(2, 0, 1).float() / 255 for image in photographs]
    generator = Generator().manual_seed(0)

    def draw(number: int, left: float, right: float) -> tuple[Tensor, Tensor]:
        images, labels = [], torch.randint(8, (number,), generator=generator)
        for label in labels.tolist():
            photograph = photographs[label // 4]
            _, height, width = photograph.shape
            y = int(torch.randint(height - 32 + 1, (), generator=generator))
            x = int(torch.randint(int(left * width), int(right * width) - 32 + 1, (), generator=generator))
            images.append(photograph[:, y : y + 32, x : x + 32].rot90(label % 4, (1, 2)))
        return torch.stack(images), labels

    (train, train_labels), (test, test_labels) = draw(6400, 0, 0.75), draw(1600, 0.75, 1)
    mean, std = train.mean((0, 2, 3), keepdim=True), train.std((0, 2, 3), keepdim=True)
    return Images(((train - mean) / std, train_labels), ((test - mean) / std, test_labels), 8)


DATASETS = {"digits": digits, "crops": crops}
