"""Prebuilt networks, plain and whitened."""

from .resnet_cifar import (
    resnet18,
    resnet20,
    resnet32,
    resnet34,
    resnet44,
    resnet50,
    resnet56,
    resnet110,
    whitened_resnet18,
    whitened_resnet20,
    whitened_resnet32,
    whitened_resnet34,
    whitened_resnet44,
    whitened_resnet50,
    whitened_resnet56,
    whitened_resnet110,
)

__all__ = [
    "resnet18",
    "resnet20",
    "resnet32",
    "resnet34",
    "resnet44",
    "resnet50",
    "resnet56",
    "resnet110",
    "whitened_resnet18",
    "whitened_resnet20",
    "whitened_resnet32",
    "whitened_resnet34",
    "whitened_resnet44",
    "whitened_resnet50",
    "whitened_resnet56",
    "whitened_resnet110",
]
