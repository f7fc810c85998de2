"""Clips of compressed files against slow truths, their residuals against frame differences, and files that are none."""

import importlib.util
import shutil
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from av.video.frame import PictureType
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.moving import encode
from benchmarks.train.__main__ import main
from benchmarks.train.command_line import parse
from benchmarks.train.datasets import open_data
from benchmarks.train.errors import Unusable
from benchmarks.train.video import decode, displaced, displacements
from benchmarks.train.video_splits import VIDEOS

from .. import results
from .test_errors import fails
from .tiny import HMDB_LISTS, TEST, TRAIN, VIDEO_SETS, film, options

# Where a vector's frame is known: MPEG-4, and H.264 with one reference frame and no pyramid of B-frames.
CODECS = {
    "mpeg4": ("mpeg4", {"g": "6", "qscale": "2"}),
    "h264": ("libx264", {"crf": "14", "refs": "1", "bf": "0", "g": "6"}),
    "h264 with B-frames": ("libx264", {"crf": "14", "refs": "1", "bf": "2", "b-pyramid": "none", "g": "6"}),
}
BLOCK = np.dtype([(name, np.int32) for name in ("w", "h", "dst_x", "dst_y", "motion_x", "motion_y", "motion_scale")])


@pytest.mark.parametrize("name", CODECS)
def test_the_codecs_prediction_leaves_little_of_a_scene_that_moves(name, tmp_path):
    codec, chosen = CODECS[name]
    path = tmp_path / "film.mp4"
    encode(path, film(18, 0, 64, 80), codec, **chosen)
    video = decode(path, vectors=True)
    kinds = [PictureType(frame.pict_type).name for frame in video.frames]
    assert len(video) == 18 and video.has_vectors and ("B" in kinds) == ("B-frames" in name)
    numbers = [number for number, kind in enumerate(kinds) if kind != "I"]
    residuals = torch.stack([video.picture(n) - video.prediction(n) for n in numbers])
    differences = torch.stack([video.picture(n) - video.picture(n - 1) for n in numbers])
    # What comes in at the border, and the codec's longer filters, are not predicted. Wrong vectors give about 1.
    assert residuals.square().mean() < 0.5**2 * differences.square().mean()


def test_without_vectors_a_residual_is_the_difference_to_the_frame_before(tmp_path):
    encode(tmp_path / "film.avi", film(5, 0), "ffv1")
    video = decode(tmp_path / "film.avi", vectors=True)
    assert not video.has_vectors
    for number in range(1, 5):
        torch.testing.assert_close(video.prediction(number), video.picture(number - 1), rtol=0, atol=0)
    assert video.clip("residual", [0]).abs().max() == 0


def test_clips_are_standardised_frames_and_residuals(tmp_path):
    encode(tmp_path / "film.mp4", film(6, 0), **{"crf": "20"})
    video = decode(tmp_path / "film.mp4", vectors=True)
    with av.open(str(tmp_path / "film.mp4")) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    rgb = video.clip("rgb", [1, 3])
    mean, deviation = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    for row, number in zip(rgb, (1, 3), strict=True):
        truth = (frames[number] / 255 - mean) / deviation
        np.testing.assert_allclose(row.permute(1, 2, 0).numpy(), truth, rtol=0, atol=1e-5)  # float32
    residual = video.clip("residual", [3])[0] * 0.1 + video.prediction(3)
    np.testing.assert_allclose(residual.permute(1, 2, 0).numpy(), frames[3] / 255, rtol=0, atol=1e-6)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 20), st.integers(1, 20), st.sampled_from([1, 2, 4]))
def test_blocks_take_their_pixels_from_where_their_vectors_lead(seed, height, width, scale):
    generator = np.random.default_rng(seed)
    picture = generator.random((2, height, width))
    blocks = np.zeros(generator.integers(0, 4), BLOCK)
    for index in range(len(blocks)):
        size = [int(generator.choice([4, 8, 16])) for _ in range(2)]
        place = [int(generator.integers(0, length)) for length in (width, height)]
        motion = [int(one) for one in generator.integers(-40, 41, 2)]
        blocks[index] = (*size, *place, *motion, scale)
    shift, covered = displacements(blocks, height, width)
    result = displaced(torch.from_numpy(picture).float(), shift)
    for y in range(height):
        for x in range(width):
            over = [
                block
                for block in blocks
                if -block["w"] // 2 <= x - block["dst_x"] < block["w"] // 2
                and -block["h"] // 2 <= y - block["dst_y"] < block["h"] // 2
            ]
            assert covered[y, x] == bool(over)
            moved = (over[-1]["motion_x"] / scale, over[-1]["motion_y"] / scale) if over else (0, 0)
            column, row = np.clip(x + moved[0], 0, width - 1), np.clip(y + moved[1], 0, height - 1)
            left, top = int(column), int(row)
            right, bottom = min(left + 1, width - 1), min(top + 1, height - 1)
            across, down = column - left, row - top
            upper = (1 - across) * picture[:, top, left] + across * picture[:, top, right]
            lower = (1 - across) * picture[:, bottom, left] + across * picture[:, bottom, right]
            # float32 coordinates of up to 20 pixels
            np.testing.assert_allclose(result[:, y, x], (1 - down) * upper + down * lower, rtol=0, atol=2e-5)


@pytest.mark.parametrize("dataset", VIDEO_SETS)
def test_the_files_and_classes_of_a_split(dataset, data):
    split = VIDEOS[dataset](data(dataset), 1)
    assert (len(split.train), len(split.test), split.num_classes) == (TRAIN, TEST, 3)
    for part, listed in (("train", split.train), ("test", split.test)):
        assert all(f"_{part}_" in path.name for path, _ in listed)
        assert {(path.parent.name, label) for path, label in listed} == {("Archery", 0), ("Biking", 1), ("Diving", 2)}


def test_a_clip_depends_on_seed_epoch_and_video_alone(data, tmp_path):
    def opened(*more, taught_by=None):
        return open_data(parse(options("ucf101", data("ucf101"), tmp_path, "--clip", "residual", *more)), taught_by)

    one, other = opened().train, opened().train
    torch.manual_seed(5)
    assert torch.equal(one[3, 7][0], other[3, 7][0]) and one[3, 7][0].shape == (3, 4, 32, 32)
    for key in ((4, 7), (3, 8)):
        assert not torch.equal(one[3, 7][0], one[key][0])
    assert not torch.equal(one[3, 7][0], opened("--seed", "1").train[3, 7][0])
    test = opened(taught_by="rgb").test
    assert torch.equal(test[0, 2][0], test[1, 2][0]) and len(test[0, 2]) == 2


def test_a_teacher_sees_the_same_part_of_the_same_frames(data, tmp_path):
    arguments = options("ucf101", data("ucf101"), tmp_path, "--clip", "residual")
    residual, label, raw = open_data(parse(arguments), "rgb").train[1, 2]
    alone = open_data(parse(arguments)).train[1, 2]
    frames = open_data(parse([*arguments, "--clip", "rgb"])).train[1, 2]
    assert torch.equal(residual, alone[0]) and torch.equal(raw, frames[0]) and label == frames[1]
    assert len(alone) == len(frames) == 2


def test_the_number_of_workers_makes_no_difference(data, tmp_path):
    losses = []
    for workers in ("0", "2"):
        out = tmp_path / workers
        more = ["--clip", "residual", "--model", "mfcd_net", "--epochs", "1", "--workers", workers]
        assert main(options("ucf101", data("ucf101"), out, *more)) == 0
        losses.append([row["train_loss"] for row in results(out)["epochs"]])
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_a_note_says_where_residuals_are_differences(data, tmp_path, capsys):
    root = shutil.copytree(data("ucf101"), tmp_path / "data")
    first = next(iter(VIDEOS["ucf101"](root, 1).train))[0]
    encode(first, film(6, 0), "ffv1")
    arguments = options("ucf101", root, tmp_path / "run", "--clip", "residual", "--epochs", "1")
    assert main(arguments) == 0
    assert f"{first} has no motion vectors: residuals are differences to the frame before" in capsys.readouterr().out


def sound(path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mp2", rate=44100)
        noise = np.zeros((1, 1152), np.int16)
        for _ in range(10):
            frame = av.AudioFrame.from_ndarray(noise, format="s16", layout="mono")
            frame.sample_rate = 44100
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def zeros_in_the_middle(path: Path) -> None:
    encode(path.with_suffix(".mp4"), film(20, 0), "libx264", crf="10", bf="0", g="20")
    content = bytearray(path.with_suffix(".mp4").read_bytes())
    content[len(content) // 2 : len(content) // 2 + 300] = bytes(300)
    path.write_bytes(content)


BROKEN = {
    "cut off": (lambda path: path.write_bytes(path.read_bytes()[:100]), "cannot be read as a video: "),
    "damaged": (zeros_in_the_middle, "cannot be read as a video: "),
    "empty": (lambda path: path.write_bytes(b""), "cannot be read as a video: "),
    "text": (lambda path: path.write_text("no video\n" * 100), "cannot be read as a video: "),
    "sound": (sound, "has no video in it; "),
    "short": (
        lambda path: encode(path, film(3, 0), "mpeg4"),
        "is too short: it has 3 frames, and a clip of --frames 4",
    ),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_file_that_cannot_be_used_is_named(how, data, tmp_path, capsys):
    root = shutil.copytree(data("hmdb51"), tmp_path / "data")
    spoil, message = BROKEN[how]
    file = VIDEOS["hmdb51"](root, 1).test[5][0]
    spoil(file)
    error = open_data(parse(options("hmdb51", root, tmp_path / "run"))).test[0, 5]
    assert isinstance(error, Unusable) and str(error).startswith(f"{file} {message}")
    assert str(error).endswith("mend it and --resume, or take it off the list of its split and begin again")
    assert len(str(error).splitlines()) == 1


def test_a_file_that_cannot_be_used_ends_the_program(data, tmp_path, capsys):
    root = shutil.copytree(data("hmdb51"), tmp_path / "data")
    for file, _ in VIDEOS["hmdb51"](root, 1).train:
        file.write_bytes(b"")
    said = fails(options("hmdb51", root, tmp_path / "run", "--workers", "1"), capsys)
    assert f"{root}/hmdb51_org/" in said and "cannot be read as a video: " in said


def test_lists_and_folders_that_are_not_as_they_should_be(data, tmp_path, capsys):
    def said(dataset, change):
        root = shutil.copytree(data(dataset), tmp_path / "data")
        change(root)
        message = fails(options(dataset, root, tmp_path / "run"), capsys)
        shutil.rmtree(root)
        return message.replace(str(root), "DATA")

    lists = Path("ucfTrainTestlist")
    assert said("ucf101", lambda root: (root / lists / "classInd.txt").unlink()).startswith(
        "DATA/ucfTrainTestlist/classInd.txt cannot be read: No such file or directory; name the folder of videos"
    )
    wrong = lambda root: (root / lists / "testlist01.txt").write_text("Juggling/a.avi\n")  # noqa: E731
    assert (
        said("ucf101", wrong)
        == "DATA/ucfTrainTestlist/testlist01.txt: the class of Juggling/a.avi is not in classInd.txt"
    )
    gone = lambda root: next((root / "UCF-101" / "Biking").iterdir()).unlink()  # noqa: E731
    assert "is listed in the split and is not there; name another folder with --data" in said("ucf101", gone)
    nothing = lambda root: (root / lists / "testlist01.txt").write_text("\n")  # noqa: E731
    assert said("ucf101", nothing) == "a split has 40 videos for training and 0 for testing"
    assert "DATA/testTrainMulti_7030_splits has no file CLASS_test_split1.txt" in said(
        "hmdb51", lambda root: shutil.rmtree(root / HMDB_LISTS)
    )
    line = lambda root: (root / HMDB_LISTS / "Biking_test_split1.txt").write_text("a.avi 3\n")  # noqa: E731
    assert "Biking_test_split1.txt: a line is 'a.avi 3' and not a name with 0, 1 or 2" in said("hmdb51", line)


def test_without_pyav_the_extra_is_named(data, tmp_path, capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "av" else find(name))
    message = fails(options("ucf101", data("ucf101"), tmp_path / "run"), capsys)
    assert message.startswith("--dataset ucf101: PyAV is not installed; pip install 'whiten-layers[video]'")
