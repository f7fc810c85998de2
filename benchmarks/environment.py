"""The machine and the versions that a measurement was taken with."""

import importlib.metadata
import os
import platform

import torch
import torchvision


def processor() -> str:
    """The name of the processor, as far as the system knows it."""
    try:
        with open("/proc/cpuinfo") as lines:
            names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def device_name(device: torch.device) -> str:
    """The name of a GPU, or "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def environment() -> dict[str, str | int]:
    """The machine and the versions, to be stored with every measurement."""
    return {
        "processor": processor(),
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "whiten_layers": importlib.metadata.version("whiten-layers"),
    }


def describe() -> str:
    """Format `environment()` as one line."""
    return ", ".join(f"{name} {value}" for name, value in environment().items())
