import pytest
import whiten_layers.models
from torchvision.datasets import CIFAR10, CIFAR100

from .tiny import SMALL, know, write


@pytest.fixture(scope="session")
def trees(tmp_path_factory):
    """The folder of a data set's few images, written once."""
    made = {}

    def tree(dataset):
        if dataset not in made:
            made[dataset] = write(tmp_path_factory.mktemp(dataset), dataset)
        return made[dataset]

    return tree


@pytest.fixture
def data(trees, monkeypatch):
    """The folder of a data set's few images, known to torchvision; and the small networks, to the program."""

    def known(dataset):
        for kind in (CIFAR10, CIFAR100):
            for name in ("train_list", "test_list", "meta", "tgz_md5", "url"):
                monkeypatch.setattr(kind, name, getattr(kind, name))
        for name in SMALL:
            monkeypatch.setattr(whiten_layers.models, name, getattr(whiten_layers.models, name))
        know(trees(dataset))
        return trees(dataset)

    return known
