"""Presets, and what the options come to: models, learning rates, augmentations."""

import math

import pytest
import torch
import whiten_layers.models
from torchvision.transforms import v2

from benchmarks.train import datasets, network, optimizing, presets
from benchmarks.train.command_line import parse
from whiten_layers import PSIScaling, WhitenedConv2d
from whiten_layers.norm import IterNorm2d


@pytest.mark.parametrize("preset", presets.PRESETS)
def test_a_preset_is_a_run_of_a_whitened_network(preset):
    options = parse(["--preset", preset])
    dataset, model = options.images.dataset, options.network.model
    assert dataset == preset.split("-")[0]
    assert model in whiten_layers.models.__all__ and model.startswith("whitened_")
    assert model.endswith(preset.split("-", 1)[1]) and options.optimization.lr == 0.1
    assert str(options.out) == f"results/train/{dataset}-{model}"
    with torch.device("meta"):
        made = network.make_network(10, options)
    assert any(isinstance(module, WhitenedConv2d) for module in made.modules())


def test_the_presets_of_the_papers_networks():
    names = {f"cifar10-resnet{depth}" for depth in (18, 20, 32, 34, 44, 50, 56, 110)}
    assert names | {f"imagenet-resnet{depth}" for depth in (18, 34, 50, 101, 152)} <= set(presets.PRESETS)


def test_an_option_changes_what_a_preset_sets():
    options = parse(["--preset", "cifar100-resnet56", "--epochs", "150", "--model", "resnet56"])
    chosen = options.optimization
    assert (chosen.epochs, options.network.model, chosen.milestones) == (150, "resnet56", [82, 123])


def test_what_a_preset_says_of_a_schedule_or_an_optimizer_goes_with_them():
    options = parse(["--preset", "cifar10-resnet20", "--schedule", "cosine", "--epochs", "20"]).optimization
    assert options.milestones is None and options.gamma is None
    options = parse(["--preset", "cifar10-resnet18", "--optimizer", "adamw"]).optimization
    assert not options.nesterov and options.momentum is None and options.lr == 1e-3
    assert parse(["--optimizer", "rmsprop"]).optimization.lr == 1e-3 and parse([]).optimization.momentum == 0.9


def test_autoaugment_has_the_policy_of_the_data_set(data):
    for dataset, policy in (("cifar10", "CIFAR10"), ("cifar100", "CIFAR10"), ("imagenet", "IMAGENET")):
        arguments = ["--dataset", dataset, "--data", str(data(dataset)), "--batch-size", "8"]
        opened = datasets.open_data(parse([*arguments, "--auto-augment", "autoaugment"]))
        (step,) = (step for step in opened.train.transform.transforms if isinstance(step, v2.AutoAugment))
        assert step.policy.name == policy


def test_the_network_that_options_describe():
    made = network.make_network(7, parse(["--model", "whitened_resnet20", "--norm", "iter_norm", "--power", "1"]))
    assert made.fc.out_features == 7 and made.layer1[0].conv1.transform.power == 1.0
    assert isinstance(made.bn1, IterNorm2d)
    made = network.make_network(7, parse(["--model", "whitened_resnet18", "--psi"]))
    assert any(isinstance(module, PSIScaling) for module in made.modules())
    assert not any(
        isinstance(m, WhitenedConv2d) for m in network.make_network(7, parse(["--model", "resnet18"])).modules()
    )


def test_the_plain_view_moves_with_the_whitened_network():
    made = network.make_network(10, parse([]))
    view = network.plain_view(made)
    assert type(view.conv1) is torch.nn.Conv2d and type(made.conv1) is WhitenedConv2d
    optimizer = torch.optim.SGD(made.parameters(), lr=0.1)
    made(torch.randn(4, 3, 16, 16)).square().sum().backward()
    optimizer.step()
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(view.eval()(images), made.eval()(images))
    assert list(view.state_dict()) == list(whiten_layers.models.resnet20().state_dict())


def rates(*arguments, steps=10):
    options = parse([*arguments]).optimization
    return [optimizing.factor(step, steps, options) for step in range(options.epochs * steps)]


def test_learning_rates():
    cosine = rates("--epochs", "4")
    assert cosine == pytest.approx([(1 + math.cos(math.pi * step / 40)) / 2 for step in range(40)])
    assert rates("--epochs", "4", "--schedule", "linear")[20] == pytest.approx(0.5)
    assert set(rates("--epochs", "4", "--schedule", "constant")) == {1.0}
    step = rates("--epochs", "4", "--schedule", "step", "--milestones", "3", "1", "--gamma", "0.5")
    assert step == [1.0] * 10 + [0.5] * 20 + [0.25] * 10
    warm = rates("--epochs", "4", "--warmup-epochs", "1")
    assert warm[:10] == pytest.approx([(step + 1) / 11 for step in range(10)]) and warm[10] == 1 and warm[25] == 0.5


def test_the_groups_of_weight_decay():
    model = whiten_layers.models.resnet20()
    options = parse(["--weight-decay", "0.1", "--norm-weight-decay", "0", "--optimizer", "adamw"]).optimization
    groups = optimizing.make_optimizer(model, options).param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0] and groups[0]["lr"] == 0.001
    assert all(parameter.ndim > 1 for parameter in groups[0]["params"])
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


class Counted(torch.utils.data.Dataset):
    def __len__(self):
        return 5

    def __getitem__(self, number):
        return torch.full((1,), float(number)), number


def test_what_an_augmentation_draws_depends_on_seed_epoch_and_image_alone():
    def noisy(seed):
        return datasets.Prepared(Counted(), lambda image: image + torch.rand(1), seed)

    before = torch.get_rng_state()
    drawn = {key: noisy(0)[key][0].item() for key in [(0, 0), (0, 1), (1, 0), (1, 1)]}
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert {key: noisy(0)[key][0].item() for key in reversed(drawn)} == drawn
    assert len({value % 1 for value in drawn.values()}) == 4
    assert noisy(1)[0, 0][0].item() != drawn[0, 0]


@pytest.mark.parametrize("more", [[], ["--auto-augment", "randaugment"], ["--random-erasing", "0.9"], ["--no-augment"]])
@pytest.mark.parametrize("dataset", ["cifar10", "imagenet"])
def test_augmentations(dataset, more, data):
    arguments = ["--dataset", dataset, "--data", str(data(dataset)), "--batch-size", "8"]
    arguments += ["--crop-size", "24"] if dataset == "imagenet" else []
    train, test = (getattr(datasets.open_data(parse([*arguments, *more])), part) for part in ("train", "test"))
    image, label = train[0, 3]
    size = 24 if dataset == "imagenet" else 32
    assert image.shape == (3, size, size) and type(image) is torch.Tensor and image.dtype == torch.float32
    assert torch.equal(test[0, 3][0], test[1, 3][0]) and test[0, 3][0].shape == image.shape
    assert torch.equal(image, train[1, 3][0]) == (more == ["--no-augment"])
    assert isinstance(label, int)
