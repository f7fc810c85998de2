"""Prebuilt networks, plain and whitened."""

from .resnet_cifar import (
    cifar_resnet18,
    cifar_resnet34,
    cifar_resnet50,
    resnet20,
    resnet32,
    resnet44,
    resnet56,
    resnet110,
    whitened_cifar_resnet18,
    whitened_cifar_resnet34,
    whitened_cifar_resnet50,
    whitened_resnet20,
    whitened_resnet32,
    whitened_resnet44,
    whitened_resnet56,
    whitened_resnet110,
)

__all__ = [
    "cifar_resnet18",
    "cifar_resnet34",
    "cifar_resnet50",
    "resnet20",
    "resnet32",
    "resnet44",
    "resnet56",
    "resnet110",
    "whitened_cifar_resnet18",
    "whitened_cifar_resnet34",
    "whitened_cifar_resnet50",
    "whitened_resnet20",
    "whitened_resnet32",
    "whitened_resnet44",
    "whitened_resnet56",
    "whitened_resnet110",
]
