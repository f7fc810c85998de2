"""The data sets: shapes, held-out parts, augmentation."""

import pytest
import torch

from benchmarks.data import CLASSES, DATASETS


@pytest.mark.parametrize(
    "name, size, classes, train, test", [("digits", 16, 10, 1348, 449), ("crops", 32, 8, 6400, 1600)]
)
def test_shapes_and_statistics(name, size, classes, train, test):
    data = DATASETS[name]()
    assert data.num_classes == classes
    for (images, labels), number in [(data.train, train), (data.test, test)]:
        assert images.shape == (number, 3, size, size) and labels.shape == (number,)
        assert set(labels.tolist()) == set(range(classes))
    assert data.train[0].mean().abs() < 0.05 and abs(data.train[0].std() - 1) < 0.05
    again = DATASETS[name]()
    torch.testing.assert_close(data.train, again.train, rtol=0, atol=0)


def test_no_test_digit_is_a_training_digit():
    data = DATASETS["digits"]()
    train = {tuple(image.flatten().tolist()) for image in data.train[0]}
    assert not [1 for image in data.test[0] if tuple(image.flatten().tolist()) in train]


def test_augmentation_depends_on_the_generator_alone():
    data = DATASETS["digits"]()
    images = data.train[0][:20]
    first, second = (data.augment(images, torch.Generator().manual_seed(3)) for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert first.shape == images.shape and not torch.equal(first, images)


@pytest.mark.parametrize("name, size, classes", [("digits", 16, 5), ("crops", 32, 40)])
def test_few_shot_classes(name, size, classes):
    data = CLASSES[name](3)
    assert data.num_classes == classes
    for images, labels in (data.train, data.test):
        assert images.shape == (len(labels), 3, size, size) and len(set(labels.tolist())) == classes
        assert min(labels.unique(return_counts=True)[1]) >= 40
    torch.testing.assert_close(CLASSES[name](3).train, data.train, rtol=0, atol=0)
    assert not torch.equal(CLASSES[name](4).train[0][:9], data.train[0][:9])


def test_held_out_digits_are_other_digits():
    data = CLASSES["digits"](0)
    assert not set(data.train[1].tolist()) & set(data.test[1].tolist())


def test_places_share_no_pixel(monkeypatch):
    """Photographs in which every cell has a colour of its own: each crop has one colour, and no two places the same."""
    colour = torch.arange(10).view(5, 2).repeat_interleave(85, 0)[:, torch.arange(640) // 320] * 100.0
    colour = torch.cat([colour + torch.arange(640) // 80 % 4, torch.zeros(2, 640)])
    scenes = [(colour + 10 * number).expand(3, -1, -1) for number in range(2)]
    monkeypatch.setattr("benchmarks.data.photographs", lambda: scenes)
    monkeypatch.setattr("benchmarks.data.standardised", lambda *parts: parts)
    data = CLASSES["crops"](0)
    seen = torch.cat([data.train[0], data.test[0]]).view(80, -1)
    torch.testing.assert_close(seen.amin(1), seen.amax(1))
    assert len(seen.mean(1).round().unique()) == 80
