"""Data sets of a few images in the true formats, and the program run on them in a process of its own.

Its residual networks are small ones under the true names: what is tested is the program.

torchvision knows CIFAR's files by their digests. Those of the few images are kept beside them, in ``digests.json``,
and take the place of the true ones, so that all of its checks are made.
"""

import hashlib
import json
import os
import pickle
import subprocess
import sys
import tarfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import whiten_layers.models
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100
from whiten_layers.models.resnet_cifar import BasicBlock, CifarResNet

from benchmarks.moving import encode

ROOT = Path(__file__).parents[3]
KINDS = {"cifar10": CIFAR10, "cifar100": CIFAR100}
TRAIN, TEST = 40, 12  # images


def pictures(number: int, seed: int) -> tuple[np.ndarray, list[int]]:
    """Noise of 32×32 around a colour that tells the class, (number, 3, 32, 32), and the classes."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(10, size=number)
    colours = np.stack([labels * 25, 250 - labels * 25, labels % 3 * 100], 1)[:, :, None, None]
    images = (colours + generator.normal(0, 20, (number, 3, 32, 32))).clip(0, 255).astype(np.uint8)
    return images, labels.tolist()


def digest(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def write_cifar(root: Path, dataset: str) -> None:
    """CIFAR as its authors pickle it, and the archive that it is fetched in."""
    kind = KINDS[dataset]
    folder = root / kind.base_folder
    folder.mkdir(parents=True)
    key = "labels" if dataset == "cifar10" else "fine_labels"
    parts = [(name, TRAIN // len(kind.train_list)) for name, _ in kind.train_list]
    parts += [(name, TEST) for name, _ in kind.test_list]
    for seed, (name, number) in enumerate(parts):
        images, labels = pictures(number, seed)
        content = {"data": images.reshape(number, -1), key: labels}
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
    names = [f"class{i}" for i in range(10 if dataset == "cifar10" else 100)]
    (folder / kind.meta["filename"]).write_bytes(pickle.dumps({kind.meta["key"]: names}, protocol=2))
    with tarfile.open(root / kind.filename, "w:gz") as archive:
        archive.add(folder, kind.base_folder)
    files = {path.name: digest(path) for path in [*folder.iterdir(), root / kind.filename]}
    (root / "digests.json").write_text(json.dumps(files))


def write_imagenet(root: Path) -> None:
    """A folder of JPEG files for each class, in train/ and val/, of several sizes."""
    for part, number in (("train", TRAIN), ("val", TEST)):
        images, labels = pictures(number, len(part))
        for i in range(number):
            folder = root / part / f"n0000000{labels[i] % 4}"
            folder.mkdir(parents=True, exist_ok=True)
            image = Image.fromarray(images[i].transpose(1, 2, 0)).resize((40 + i, 50))
            image.save(folder / f"{i}.JPEG")
        for label in range(4):
            assert (root / part / f"n0000000{label}").is_dir()


def film(frames: int, seed: int, height: int = 40, width: int = 48) -> np.ndarray:
    """A textured scene that moves by one row and two columns a frame, (frames, height, width, 3)."""
    generator = np.random.default_rng(seed)
    noise = generator.normal(128, 150, (height + frames, width + 2 * frames, 3))
    for axis in (0, 1):  # smooth, so that a codec keeps it, and nowhere alike
        noise = sum(np.roll(noise, shift, axis) for shift in range(-2, 3)) / 5
    scene = noise.clip(0, 255).astype(np.uint8)
    return np.stack([scene[step : step + height, 2 * step : 2 * step + width] for step in range(frames)])


def write_videos(root: Path, dataset: str) -> None:
    """MPEG-4 files of three classes and the lists of a split, in the folders of UCF101 or of HMDB51."""
    names = ["Archery", "Biking", "Diving"]
    videos, lists = ("UCF-101", "ucfTrainTestlist") if dataset == "ucf101" else ("hmdb51_org", HMDB_LISTS)
    (root / lists).mkdir()
    listed: dict[str, list[tuple[str, str]]] = {"train": [], "test": []}
    for part, number in (("train", TRAIN), ("test", TEST)):
        for i in range(number):
            name = names[i % 3]
            (root / videos / name).mkdir(parents=True, exist_ok=True)
            file = f"v_{name}_{part}_g01_c{i:02d}.avi"
            encode(root / videos / name / file, film(6, i), "mpeg4", g="12", qscale="4")
            listed[part].append((name, file))
    if dataset == "hmdb51":
        for name in names:
            lines = [f"{f} {tag} \n" for tag, part in ((1, "train"), (2, "test")) for n, f in listed[part] if n == name]
            (root / lists / f"{name}_test_split1.txt").write_text("".join([*lines, "unused.avi 0 \n"]))
        return
    (root / lists / "classInd.txt").write_text("".join(f"{i} {name}\n" for i, name in enumerate(names, 1)))
    numbered = [f"{name}/{file} {names.index(name) + 1}\n" for name, file in listed["train"]]
    (root / lists / "trainlist01.txt").write_text("".join(numbered))
    (root / lists / "testlist01.txt").write_text("".join(f"{name}/{file}\n" for name, file in listed["test"]))


HMDB_LISTS = "testTrainMulti_7030_splits"
VIDEO_SETS = ("ucf101", "hmdb51")


def write(root: Path, dataset: str) -> Path:
    if dataset == "imagenet":
        write_imagenet(root)
    elif dataset in VIDEO_SETS:
        write_videos(root, dataset)
    elif dataset in KINDS:
        write_cifar(root, dataset)
    return root


SMALL = {"resnet20": (1, 1, 1), "resnet18": (1, 1)}  # blocks of each stage


def small(depths: tuple[int, ...], num_classes: int) -> CifarResNet:
    return CifarResNet(BasicBlock, depths, 8, num_classes, projection=True)


def know(root: Path, address: str | None = None) -> None:
    """Let torchvision take the files of a `root` for the true ones, and fetch them from an `address`.

    The program then knows the small networks.
    """
    for name, depths in SMALL.items():
        setattr(whiten_layers.models, name, partial(small, depths))
    known = json.loads((root / "digests.json").read_text()) if (root / "digests.json").exists() else {}
    for kind in KINDS.values():
        if kind.filename in known:
            kind.train_list = [[name, known[name]] for name, _ in kind.train_list]
            kind.test_list = [[name, known[name]] for name, _ in kind.test_list]
            kind.meta = {**kind.meta, "md5": known[kind.meta["filename"]]}
            kind.tgz_md5 = known[kind.filename]
            if address is not None:
                kind.url = f"{address}/{kind.filename}"


def scalars(out: Path, name: str) -> list[tuple[int, float]]:
    """What a run has told TensorBoard: steps and values."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out / "tensorboard")).Reload()
    return [(scalar.step, scalar.value) for scalar in events.Scalars(name)]


def options(dataset: str, root: Path, out: Path, *more: str) -> list[str]:
    """A short run: five steps of eight images an epoch."""
    given = ["--dataset", dataset, "--data", str(root), "--out", str(out), "--device", "cpu", "--workers", "0"]
    given += ["--batch-size", "8", "--epochs", "3", "--lr", "0.02"]
    if dataset == "imagenet":
        given += ["--model", "whitened_resnet18", "--crop-size", "32", "--epochs", "2"]
    if dataset in VIDEO_SETS:
        given += ["--model", "whitened_mfcd_net", "--crop-size", "32", "--frames", "4", "--epochs", "2"]
    return [*given, *more]


def start(arguments: list[str], data: Path, *, processes: int = 1, pause: float = 0, **more: Any) -> subprocess.Popen:
    """The program in a process of its own, or under torchrun in several; with a `pause`, in seconds, at every step."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    command = [*launcher, "-m", "tests.benchmarks.train.tiny", str(data), str(pause), *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=environment, **pipes, **more)


if __name__ == "__main__":
    import torch

    from benchmarks.train import world
    from benchmarks.train.__main__ import main

    def rested(self: world.Stop, *arguments: Any, look: Any = world.Stop.agreed) -> bool:
        time.sleep(float(sys.argv[2]))
        return look(self, *arguments)

    torch.set_num_threads(1)
    world.Stop.agreed = rested  # type: ignore[method-assign]
    know(Path(sys.argv[1]))
    sys.exit(main(sys.argv[3:]))
