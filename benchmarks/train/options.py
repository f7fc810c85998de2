"""The options of a run, by concept; `command_line` fills in those whose default depends on others."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import whiten_layers.models
from tyro.conf import FlagCreatePairsOff

from whiten_layers.conversion.convert_batchnorm import NORMS

from ..options import Count, Fraction, NotNegative, Part, PositiveFloat, PositiveInt, Switch, choice, chosen
from ..transforms import TransformOptions
from .video import ClipKind

T = TypeVar("T")
DatasetName = Literal["digits", "crops", "cifar10", "cifar100", "imagenet", "ucf101", "hmdb51"]
AutoAugment = Literal["autoaugment", "randaugment", "trivialaugment", "augmix"]
OptimizerName = Literal["sgd", "adam", "adamw", "rmsprop"]
Schedule = Literal["cosine", "linear", "constant", "step"]
# What may differ between a run and its continuation: where things are, and which machine does the work.
NOT_OF_THE_RUN = ("preset", "data", "download", "out", "resume", "teacher", "workers", "device", "tensorboard")


@dataclass(frozen=True)
class ImageOptions:
    """The images, and how they are augmented."""

    dataset: DatasetName = "digits"
    # torchvision's root of CIFAR; ImageNet's folder of train/CLASS/ and val/CLASS/; the folder of UCF-101/ and
    # ucfTrainTestlist/, or of hmdb51_org/ and testTrainMulti_7030_splits/
    data: Path = Path("data")
    download: Switch = False  # fetch CIFAR into --data if it is not there
    augment: bool = True  # the data set's usual crops and flips
    auto_augment: AutoAugment | None = None  # for CIFAR and ImageNet
    random_erasing: Fraction = 0.0  # the probability
    mixup: NotNegative = 0.0  # parameter of the beta distribution; 0 for none
    cutmix: NotNegative = 0.0  # the same; with --mixup each batch gets one or the other
    crop_size: PositiveInt | None = None  # of ImageNet's images and of videos; None is 224
    split: PositiveInt | None = None  # of a video data set: 1, 2 or 3; None is 1
    clip: ClipKind | None = None  # frames of videos, or what the codec's prediction leaves of them; None is rgb
    frames: PositiveInt | None = None  # of a clip; None is 16
    frame_interval: PositiveInt | None = None  # from a frame of a clip to the next; None is 1


@dataclass(frozen=True)
class NetworkOptions:
    """The network; `TransformOptions` says how it is whitened."""

    model: Annotated[str, choice(whiten_layers.models.__all__)] = "whitened_resnet20"
    norm: Annotated[str | None, choice(NORMS)] = None  # in the place of batch normalization
    psi: FlagCreatePairsOff[bool | None] = None  # see whiten(psi=True)


@dataclass(frozen=True)
class DistillationOptions:
    """A trained network as a teacher: its outputs are a second target (Hinton et al., arXiv 1503.02531)."""

    teacher: Path | None = None  # its checkpoint.pt, of this program; of videos it sees the clips it was trained on
    distill_weight: Part | None = None  # of its targets in the loss, against the classes; None is 0.5
    temperature: PositiveFloat | None = None  # that softens both outputs; None is 4


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
    distillation: DistillationOptions = DistillationOptions()
    optimization: OptimizationOptions = OptimizationOptions()
    machine: MachineOptions = MachineOptions()


def given(option: T | None) -> T:
    """An option that `command_line.parse` has filled in where the user left it out."""
    assert option is not None
    return option


def of_the_run(options: Options) -> dict[str, Any]:
    """The options that a resumed run must share with the run that it continues."""
    return {name: value for name, value in chosen(options).items() if name not in NOT_OF_THE_RUN}
