"""The folders and lists of UCF101 (arXiv 1212.0402) and of HMDB51 (Kuehne et al., ICCV 2011)."""

from dataclasses import dataclass
from pathlib import Path

from .errors import Unusable, one_line

Listed = list[tuple[Path, int]]  # files and their classes


@dataclass(frozen=True)
class Split:
    """The files of a split for training and for testing, and the number of classes."""

    train: Listed
    test: Listed
    num_classes: int


def ucf101(root: Path, split: int) -> Split:
    """Read a split of UCF101: ``UCF-101/CLASS/NAME.avi``, and its lists in ``ucfTrainTestlist/``.

    Raises:
        Unusable: a list or a video is missing, or a line of a list is wrong.
    """
    lists, videos = root / "ucfTrainTestlist", root / "UCF-101"
    lines = _lines(lists / "classInd.txt")
    classes = {line.split()[-1]: number for number, line in enumerate(lines)}
    parts: list[Listed] = []
    for name in ("train", "test"):
        listed = _lines(lists / f"{name}list{split:02d}.txt")
        paths = [line.split()[0] for line in listed]  # training's lists have the number of the class too
        unknown = [path for path in paths if path.partition("/")[0] not in classes]
        if unknown:
            raise Unusable(f"{lists / f'{name}list{split:02d}.txt'}: the class of {unknown[0]} is not in classInd.txt")
        parts.append([(videos / path, classes[path.partition("/")[0]]) for path in paths])
    return _complete(Split(parts[0], parts[1], len(classes)))


def hmdb51(root: Path, split: int) -> Split:
    """Read a split of HMDB51: ``hmdb51_org/CLASS/NAME.avi``, and its lists in ``testTrainMulti_7030_splits/``.

    Raises:
        Unusable: a list or a video is missing, or a line of a list is wrong.
    """
    lists, ending = root / "testTrainMulti_7030_splits", f"_test_split{split}.txt"
    files = sorted(lists.glob(f"*{ending}"))
    if not files:
        raise Unusable(f"{lists} has no file CLASS{ending}; name the folder that has both with --data")
    parts: dict[str, Listed] = {"0": [], "1": [], "2": []}  # unused, for training, for testing
    for label, file in enumerate(files):
        for line in _lines(file):
            name, _, part = line.rpartition(" ")
            if part not in parts or not name:
                raise Unusable(f"{file}: a line is {line!r} and not a name with 0, 1 or 2")
            parts[part].append((root / "hmdb51_org" / file.name.removesuffix(ending) / name, label))
    return _complete(Split(parts["1"], parts["2"], len(files)))


def _lines(path: Path) -> list[str]:
    try:
        return [line.strip() for line in path.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        what = getattr(error, "strerror", None) or one_line(error)
        raise Unusable(f"{path} cannot be read: {what}; name the folder of videos and splits with --data") from error


def _complete(split: Split) -> Split:
    if not split.train or not split.test:
        raise Unusable(f"a split has {len(split.train)} videos for training and {len(split.test)} for testing")
    for path, _ in [*split.train, *split.test]:
        if not path.is_file():
            raise Unusable(f"{path} is listed in the split and is not there; name another folder with --data")
    return split


VIDEOS = {"ucf101": ucf101, "hmdb51": hmdb51}
