"""Recipes by name: an option on the command line overrides what a preset sets.

CIFAR: He et al., arXiv 1512.03385, section 4.2: 64,000 iterations of 128 images (164 epochs), the learning rate
divided by ten after 32,000 and 48,000 of them, and ResNet-110 warmed up (here for an epoch, linearly; there for 400
iterations, at a tenth). The wider networks, of ImageNet's blocks, take a cosine and more weight decay, as has become
usual. ImageNet: as torchvision's first weights were trained, 90 epochs of batches of 256, divided after 30 and 60.
"""

from dataclasses import replace

from .options import DatasetName, ImageOptions, NetworkOptions, OptimizationOptions, Options

CIFAR = OptimizationOptions(epochs=164, schedule="step", milestones=[82, 123], weight_decay=1e-4)
WIDE_CIFAR = OptimizationOptions(epochs=200, schedule="cosine", weight_decay=5e-4, nesterov=True)
IMAGENET = OptimizationOptions(epochs=90, batch_size=256, schedule="step", milestones=[30, 60], weight_decay=1e-4)
IMAGENET_MODELS = ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"]
IMAGENET_MODELS += ["resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d", "wide_resnet50_2", "wide_resnet101_2"]


def _recipe(dataset: DatasetName, model: str, optimization: OptimizationOptions) -> Options:
    return Options(images=ImageOptions(dataset), network=NetworkOptions(f"whitened_{model}"), optimization=optimization)


def _presets() -> dict[str, Options]:
    presets: dict[str, Options] = {}
    datasets: tuple[DatasetName, ...] = ("cifar10", "cifar100")
    for dataset in datasets:
        for depth in (20, 32, 44, 56, 110):
            optimization = replace(CIFAR, warmup_epochs=1) if depth == 110 else CIFAR
            presets[f"{dataset}-resnet{depth}"] = _recipe(dataset, f"resnet{depth}", optimization)
        for depth in (18, 34, 50):
            presets[f"{dataset}-resnet{depth}"] = _recipe(dataset, f"cifar_resnet{depth}", WIDE_CIFAR)
    return presets | {f"imagenet-{model}": _recipe("imagenet", model, IMAGENET) for model in IMAGENET_MODELS}


PRESETS = _presets()
