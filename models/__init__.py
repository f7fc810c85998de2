"""Prebuilt networks, plain and whitened."""

from .resnet_cifar import (
    resnet110,
    resnet18,
    resnet20,
    resnet32,
    resnet34,
    resnet44,
    resnet50,
    resnet56,
    whitened_resnet110,
    whitened_resnet18,
    whitened_resnet20,
    whitened_resnet32,
    whitened_resnet34,
    whitened_resnet44,
    whitened_resnet50,
    whitened_resnet56,
)

__all__ = [
    "resnet110",
    "resnet18",
    "resnet20",
    "resnet32",
    "resnet34",
    "resnet44",
    "resnet50",
    "resnet56",
    "whitened_resnet110",
    "whitened_resnet18",
    "whitened_resnet20",
    "whitened_resnet32",
    "whitened_resnet34",
    "whitened_resnet44",
    "whitened_resnet50",
    "whitened_resnet56",
]
