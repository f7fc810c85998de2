"""What a measurement was taken on."""

import importlib.metadata
import os
import platform

import torch
import torchvision


def processor() -> str:
    """The processor's name, as far as the system tells."""
    try:
        with open("/proc/cpuinfo") as lines:
            names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def device_name(device: torch.device) -> str:
    """What a GPU is called; "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def environment() -> dict[str, str | int]:
    """Machine and versions, to stand beside every figure."""
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
    """One line of `environment()`."""
    return ", ".join(f"{name} {value}" for name, value in environment().items())
