"""The moving videos: what moves, how, and that they are drawn by their generator alone."""

import av
import numpy as np
import pytest
import torch

from benchmarks.moving import CLASSES, MOTIONS, encode, moved, videos


def drawn(number=16, held_out=False, seed=0):
    return list(videos(number, 4, 16, torch.Generator().manual_seed(seed), held_out=held_out))


def test_there_are_as_many_of_each_class_and_the_generator_decides():
    one, again, other = drawn(), drawn(), drawn(seed=1)
    assert [label for _, label in one] == 2 * list(range(len(CLASSES))) and len(CLASSES) == 8
    assert all(frames.shape == (4, 16, 16, 3) and frames.dtype == np.uint8 for frames, _ in one)
    assert all(np.array_equal(a, b) for (a, _), (b, _) in zip(one, again, strict=True))
    assert not any(np.array_equal(a, b) for (a, _), (b, _) in zip(one, other, strict=True))


@pytest.mark.parametrize("motion", MOTIONS)
def test_a_film_moves_evenly_or_flickers(motion):
    rows, columns = torch.meshgrid(torch.linspace(-1, 1, 64), torch.linspace(-1, 1, 64), indexing="ij")
    scene = torch.stack([rows, columns, rows + 2])  # a frame's pixels tell where in the scene they are from
    film = moved(scene, motion, 5, 32, torch.Generator().manual_seed(0))
    places = film[:, :2].flatten(2)  # (T, 2, pixels)
    if motion == "flicker":
        lights = film[:, 2].flatten(1) / film[2, 2].flatten()
        torch.testing.assert_close(lights, lights[:, :1].expand_as(lights), rtol=1e-4, atol=1e-4)
        assert lights[:, 0].std() > 0.05
        return
    steps = places.diff(dim=0)
    middles, spreads = places.mean(2), (places - places.mean(2, keepdim=True)).square().sum((1, 2)).sqrt()
    if motion == "shift":
        torch.testing.assert_close(steps, steps[:1, :, :1].expand_as(steps), rtol=0, atol=1e-4)
        assert steps[0].norm(dim=0).min() > 0.005
    else:
        torch.testing.assert_close(middles, torch.zeros_like(middles), rtol=0, atol=1e-4)
        growth = spreads[1:] / spreads[:-1]
        torch.testing.assert_close(growth, growth[:1].expand(4), rtol=0, atol=1e-4)
        assert (abs(growth[0] - 1) > 0.01) == (motion == "zoom")
        assert steps.abs().max() > 0.005


def test_a_file_has_the_frames_that_were_encoded(tmp_path):
    frames, _ = drawn(8)[4]
    encode(tmp_path / "film.mp4", frames, crf="1")
    with av.open(str(tmp_path / "film.mp4")) as container:
        decoded = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    assert decoded.shape == frames.shape
    assert np.abs(decoded.astype(int) - frames).mean() < 6  # colours have half the resolution
