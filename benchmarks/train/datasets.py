"""Opening and checking the data sets, and preparing and augmenting their images."""

import tarfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset
from torchvision.datasets import CIFAR10, CIFAR100, ImageFolder
from torchvision.datasets.folder import default_loader
from torchvision.datasets.utils import check_integrity
from torchvision.transforms import v2

from .. import data
from .errors import SHORTAGES, Unusable, one_line
from .options import AutoAugment, DatasetName, ImageOptions, Options, given
from .video import IMAGENET_COLOURS, Clip, ClipKind, decode
from .video_splits import VIDEOS

AUTO_AUGMENT: dict[AutoAugment, Callable[[v2.AutoAugmentPolicy], v2.Transform]] = {
    "autoaugment": v2.AutoAugment,
    "randaugment": lambda policy: v2.RandAugment(),
    "trivialaugment": lambda policy: v2.TrivialAugmentWide(),
    "augmix": lambda policy: v2.AugMix(),
}
Colours = tuple[Sequence[float], Sequence[float]]  # means and deviations of the training images' colours
CIFAR10_COLOURS = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
CIFAR100_COLOURS = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)


ORDER, IMAGE, STEP = range(3)  # what a seed is for


def mixed(*numbers: int) -> int:
    """Hash numbers of 64 bits into a seed, which is very different for neighbouring numbers."""
    words = [word for number in numbers for word in (number % 2**32, number >> 32)]
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> 1)


class Prepared(Dataset):
    """Images with their transforms, whose random numbers depend on a seed, the epoch and the image's number alone.

    So it makes no difference which process prepares an image, or when, or whether the epoch was interrupted. A key is
    ``(epoch, number)``. For an image that cannot be read the error is returned, because a worker that raises it would
    add its whole traceback. A transform may make several views of an image: the first is the network's, behind the
    class comes what else a teacher is given.
    """

    def __init__(self, images: Any, transform: Callable[[Any], Tensor | tuple[Tensor, ...]], seed: int) -> None:
        self.images, self.transform, self.seed = images, transform, seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Any, ...] | Unusable:
        epoch, number = key
        try:
            image, label = self.images[number]
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(mixed(IMAGE, self.seed, epoch, number))
                made = self.transform(image)
        except Unusable as error:
            return error
        first, *others = made if isinstance(made, tuple) else (made,)
        return first, int(label), *others


@dataclass(frozen=True)
class Data:
    """The images ``(3, H, W)``, or clips ``(3, T, H, W)``, and classes for training and testing."""

    train: Prepared
    test: Prepared
    num_classes: int
    note: str = ""  # on what they are, for the user


def _floats(colours: Colours) -> list[v2.Transform]:
    return [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(*map(list, colours))]


def _training(first: list[v2.Transform], floats: list[v2.Transform], options: ImageOptions) -> v2.Compose:
    """Compose a transform of the data set's usual augmentations, the options' ones, and the conversion to floats."""
    steps = list(first)
    if options.auto_augment:
        policy = v2.AutoAugmentPolicy.IMAGENET if options.dataset == "imagenet" else v2.AutoAugmentPolicy.CIFAR10
        steps.append(AUTO_AUGMENT[options.auto_augment](policy))
    steps += floats
    if options.random_erasing:
        steps.append(v2.RandomErasing(options.random_erasing))
    return v2.Compose([*steps, v2.ToPureTensor()])


def _cifar(kind: type[CIFAR10], colours: Colours, options: ImageOptions, seed: int) -> Data:
    root, floats = options.data, _floats(colours)
    try:
        lost = _lost(kind, root)
    except OSError as error:
        raise Unusable(f"{error.filename} cannot be read: {error.strerror}; name another folder with --data") from error
    if lost is not None and not options.download:
        state = "is damaged" if lost.exists() else "is not there"
        raise Unusable(f"{lost} {state}: name torchvision's folder with --data, or fetch it with --download")
    try:
        train, test = (kind(root, train=part, download=lost is not None) for part in (True, False))
    except (OSError, RuntimeError, tarfile.TarError, EOFError, zlib.error) as error:
        raise Unusable(f"{kind.url} could not be fetched into {root}: {one_line(error)}") from error
    usual = [v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()] if options.augment else []
    kept = Prepared(test, v2.Compose([*floats, v2.ToPureTensor()]), seed)
    return Data(Prepared(train, _training(usual, floats, options), seed), kept, len(train.classes))


def _lost(kind: type[CIFAR10], root: Path) -> Path | None:
    """The first file of CIFAR that is missing or damaged."""
    files = [*kind.train_list, *kind.test_list, (kind.meta["filename"], kind.meta["md5"])]
    paths = ((root / kind.base_folder / name, digest) for name, digest in files)
    return next((path for path, digest in paths if not check_integrity(path, digest)), None)


def _read(path: str) -> Any:
    try:
        return default_loader(path)
    except Exception as error:  # whatever a decoder raises, it is the file that is wrong
        if isinstance(error, MemoryError) or getattr(error, "errno", None) in SHORTAGES:
            raise
        raise Unusable(
            f"{path} cannot be read as an image: {one_line(error)}; mend it and --resume, or remove it and begin again"
        ) from error


def _sized(size: int, augment: bool) -> list[v2.Transform]:
    """Random parts of pictures, mirrored at random, or else their middle."""
    if augment:
        return [v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip()]
    return [v2.Resize(round(size * 256 / 224), antialias=True), v2.CenterCrop(size)]


def _imagenet(options: ImageOptions, seed: int) -> Data:
    parts = []
    for name in ("train", "val"):
        folder = options.data / name
        try:
            parts.append(ImageFolder(folder, loader=_read))
        except OSError as error:
            what = f"{folder} is to hold a folder of images for each class"
            raise Unusable(f"{what}: {one_line(error)}; name the folder of train/ and val/ with --data") from error
    train, test = parts
    if train.classes != test.classes:
        odd = sorted(set(train.classes) ^ set(test.classes))[0]
        raise Unusable(f"{options.data}: class {odd} is only in one of train/ and val/; mend the folders")
    floats, size = _floats(IMAGENET_COLOURS), given(options.crop_size)
    varied = _training(_sized(size, options.augment), floats, options)
    kept = Prepared(test, v2.Compose([*_sized(size, False), *floats, v2.ToPureTensor()]), seed)
    return Data(Prepared(train, varied, seed), kept, len(train.classes))


def _videos(name: str, options: ImageOptions, seed: int, taught_by: ClipKind | None) -> Data:
    split = VIDEOS[name](options.data, given(options.split))
    kind: ClipKind = given(options.clip)
    size, length = given(options.crop_size), (given(options.frames), given(options.frame_interval))
    kinds = (kind,) if taught_by is None or taught_by == kind else (kind, taught_by)
    varied = Clip(kinds, *length, v2.Compose(_sized(size, options.augment)), options.augment)
    middle = Clip((kind,), *length, v2.Compose(_sized(size, False)), False)
    note = ""
    if kind == "residual" and not decode(split.train[0][0], vectors=True).has_vectors:
        note = f"{split.train[0][0]} has no motion vectors: residuals are differences to the frame before"
    return Data(Prepared(split.train, varied, seed), Prepared(split.test, middle, seed), split.num_classes, note)


def _shipped(images: data.Images, usual: list[v2.Transform], options: ImageOptions, seed: int) -> Data:
    train, test = (TensorDataset(*part) for part in (images.train, images.test))
    varied = _training(usual if options.augment else [], [], options)
    return Data(Prepared(train, varied, seed), Prepared(test, v2.Identity(), seed), images.num_classes)


def _digits(options: ImageOptions, seed: int) -> Data:
    images = data.digits()
    background, smooth = images.train[0].amin().item(), v2.InterpolationMode.BILINEAR
    # As `random_affine` moves them, without its noise.
    moved = v2.RandomAffine(25, (1 / 8, 1 / 8), (0.75, 1.25), interpolation=smooth, fill=background)
    return _shipped(images, [moved], options, seed)


DATASETS: dict[DatasetName, Callable[[ImageOptions, int], Data]] = {
    "digits": _digits,
    "crops": lambda options, seed: _shipped(data.crops(), [], options, seed),
    "cifar10": partial(_cifar, CIFAR10, CIFAR10_COLOURS),
    "cifar100": partial(_cifar, CIFAR100, CIFAR100_COLOURS),
    "imagenet": _imagenet,
}


def open_data(options: Options, taught_by: ClipKind | None = None) -> Data:
    """Open the data set that the options name.

    Args:
        options: those of the run.
        taught_by: what clips a teacher sees, if there is one and the data are videos.

    Raises:
        Unusable: it is missing, damaged, or too small for a batch.
    """
    name, size = options.images.dataset, options.optimization.batch_size
    if name in VIDEOS:
        opened = _videos(name, options.images, options.seed, taught_by)
    else:
        opened = DATASETS[name](options.images, options.seed)
    if len(opened.train) < size:
        raise Unusable(f"--batch-size {size}: {name} has {len(opened.train)} training images")
    return opened
