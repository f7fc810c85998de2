"""Recipes by name: what a preset sets, an option on the command line still changes.

CIFAR: He et al., arXiv 1512.03385, section 4.2: 64,000 iterations of 128 images (164 epochs), the learning rate
divided by ten after 32,000 and 48,000 of them, and ResNet-110 warmed up (here for an epoch, linearly; there for 400
iterations, at a tenth). The wider networks, of ImageNet's blocks, take a cosine and more weight decay, as has become
usual. ImageNet: as torchvision's first weights were trained, 90 epochs of batches of 256, divided after 30 and 60.
"""

from typing import Any

CIFAR: dict[str, Any] = {"epochs": 164, "schedule": "step", "milestones": [82, 123], "weight_decay": 1e-4}
WIDE_CIFAR: dict[str, Any] = {"epochs": 200, "schedule": "cosine", "weight_decay": 5e-4, "nesterov": True}
IMAGENET: dict[str, Any] = {
    "epochs": 90,
    "batch_size": 256,
    "schedule": "step",
    "milestones": [30, 60],
    "weight_decay": 1e-4,
}
IMAGENET_MODELS = ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"]
IMAGENET_MODELS += ["resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d", "wide_resnet50_2", "wide_resnet101_2"]


def _presets() -> dict[str, dict[str, Any]]:
    presets: dict[str, dict[str, Any]] = {}
    for dataset in ("cifar10", "cifar100"):
        for depth in (20, 32, 44, 56, 110):
            recipe = {"dataset": dataset, "model": f"whitened_resnet{depth}", **CIFAR}
            presets[f"{dataset}-resnet{depth}"] = {**recipe, "warmup_epochs": 1} if depth == 110 else recipe
        for depth in (18, 34, 50):
            recipe = {"dataset": dataset, "model": f"whitened_cifar_resnet{depth}", **WIDE_CIFAR}
            presets[f"{dataset}-resnet{depth}"] = recipe
    for model in IMAGENET_MODELS:
        presets[f"imagenet-{model}"] = {"dataset": "imagenet", "model": f"whitened_{model}", **IMAGENET}
    return presets


PRESETS = _presets()
