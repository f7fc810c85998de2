"""The data sets: shapes, held-out parts, augmentation."""

import pytest
import torch

from benchmarks.data import DATASETS


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
