"""The options of a run, by concept; `command_line` fills in those whose default depends on others."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import whiten_layers.models
from tyro.conf import FlagCreatePairsOff

from whiten_layers.conversion.convert_batchnorm import NORMS

from ..options import Count, Fraction, NotNegative, PositiveFloat, PositiveInt, Switch, choice, chosen
from ..transforms import TransformOptions

T = TypeVar("T")
DatasetName = Literal["digits", "crops", "cifar10", "cifar100", "imagenet"]
AutoAugment = Literal["autoaugment", "randaugment", "trivialaugment", "augmix"]
OptimizerName = Literal["sgd", "adam", "adamw", "rmsprop"]
Schedule = Literal["cosine", "linear", "constant", "step"]
# What may differ between a run and its continuation: where things are, and which machine does the work.
NOT_OF_THE_RUN = ("preset", "data", "download", "out", "resume", "workers", "device", "tensorboard")


@dataclass(frozen=True)
class ImageOptions:
    """The images, and how they are augmented."""

    dataset: DatasetName = "digits"
    data: Path = Path("data")  # torchvision's root of CIFAR; ImageNet's folder of train/CLASS/ and val/CLASS/
    download: Switch = False  # fetch CIFAR into --data if it is not there
    augment: bool = True  # the data set's usual crops and flips
    auto_augment: AutoAugment | None = None  # for CIFAR and ImageNet
    random_erasing: Fraction = 0.0  # the probability
    mixup: NotNegative = 0.0  # parameter of the beta distribution; 0 for none
    cutmix: NotNegative = 0.0  # the same; with --mixup each batch gets one or the other
    crop_size: PositiveInt | None = None  # of ImageNet's images; None is 224


@dataclass(frozen=True)
class NetworkOptions:
    """The network; `TransformOptions` says how it is whitened."""

    model: Annotated[str, choice(whiten_layers.models.__all__)] = "whitened_resnet20"
    norm: Annotated[str | None, choice(NORMS)] = None  # in the place of batch normalization
    psi: FlagCreatePairsOff[bool | None] = None  # see whiten(psi=True)


@dataclass(frozen=True)
class OptimizationOptions:
    """The optimizer, its learning rate, and what a step consists of."""

    epochs: PositiveInt = 20
    batch_size: PositiveInt = 128  # images of a step, in all processes together
    accumulate: PositiveInt = 1  # backward passes that a batch is divided among
    optimizer: OptimizerName = "sgd"
    lr: PositiveFloat | None = None  # the highest one; None is 0.1 with sgd and 0.001 otherwise
    momentum: Fraction | None = None  # of sgd and rmsprop; None is 0.9
    nesterov: bool = False  # of sgd
    weight_decay: NotNegative = 5e-4
    norm_weight_decay: NotNegative | None = None  # of norms and biases; None is as --weight-decay
    schedule: Schedule = "cosine"
    milestones: list[PositiveInt] | None = None  # epochs, of --schedule step
    gamma: PositiveFloat | None = None  # factor at a milestone; None is 0.1
    warmup_epochs: Count = 0  # in which the learning rate rises to --lr
    label_smoothing: Fraction = 0.0
    clip_norm: PositiveFloat | None = None  # of the gradient of all parameters
    ema: Fraction | None = None  # decay of an average of the weights, which is tested too


@dataclass(frozen=True)
class MachineOptions:
    """The machine, and how it computes."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    workers: Count | None = None  # processes that load images; None is one for each core, at most 8
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"  # of autocast
    compile: bool = False
    channels_last: bool = False
    deterministic: bool = False  # needed on a GPU for a --resume that is exact to the bit
    tensorboard: Switch = False  # write scalars (needs the extra 'tensorboard')


@dataclass(frozen=True)
class Options:
    """All options of a run."""

    preset: str | None = None  # a recipe, by its name; see above
    out: Path | None = None  # folder of the run; None is results/train/DATASET-MODEL
    resume: Switch = False  # continue the run in --out
    seed: Count = 0
    images: ImageOptions = ImageOptions()
    network: NetworkOptions = NetworkOptions()
    transform: TransformOptions = field(default_factory=TransformOptions)
    optimization: OptimizationOptions = OptimizationOptions()
    machine: MachineOptions = MachineOptions()


def given(option: T | None) -> T:
    """An option that `command_line.parse` has filled in where the user left it out."""
    assert option is not None
    return option


def of_the_run(options: Options) -> dict[str, Any]:
    """The options that a resumed run must share with the run that it continues."""
    return {name: value for name, value in chosen(options).items() if name not in NOT_OF_THE_RUN}
