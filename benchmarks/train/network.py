"""The network that the options describe, and plain views of it."""

import copy

import whiten_layers.models
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from whiten_layers import convert_batchnorm, unwhiten, whiten

from .errors import Unusable, one_line
from .options import Options
from .world import World


def plain_network(name: str, norm: str | None, num_classes: int) -> nn.Module:
    """Make a network of `whiten_layers.models` without whitened layers, even if its name says that it has them."""
    network = getattr(whiten_layers.models, name.removeprefix("whitened_"))(num_classes=num_classes)
    return convert_batchnorm(network, norm) if norm else network


def make_network(num_classes: int, options: Options) -> nn.Module:
    """Make a network of `whiten_layers.models`, whitened if its name says so.

    Raises:
        Unusable: --psi does not apply to any of its layers.
    """
    chosen = options.network
    network = plain_network(chosen.model, chosen.norm, num_classes)
    if chosen.model.startswith("whitened_"):
        try:
            whiten(network, options.transform.make(), psi=bool(chosen.psi))
        except ValueError as error:  # of psi: everything else has been checked
            raise Unusable(f"--psi: {one_line(error)}") from error
    return network


def plain_view(network: nn.Module) -> nn.Module:
    """Make a plain network that shares parameters and buffers with the whitened one, and so follows its training."""
    shared = {id(tensor): tensor for tensor in [*network.parameters(), *network.buffers()]}
    return unwhiten(copy.deepcopy(network, shared))


def wrap(network: nn.Module, world: World, is_compiled: bool) -> nn.Module:
    """The network as a training step calls it: one of several processes, and compiled if so chosen."""
    if world.size > 1:
        network = DistributedDataParallel(network, device_ids=[world.device] if world.device.type == "cuda" else None)
    if is_compiled:
        network.compile()
    return network


def bad_batches(network: nn.Module) -> dict[str, int]:
    """Count, over all whitened layers and norms, the skipped batches and the failed refreshes."""
    counted = {"skipped": "num_batches_skipped", "failed": "num_refreshes_failed"}
    buffers = list(network.named_buffers())
    return {what: sum(int(b) for name, b in buffers if name.endswith(end)) for what, end in counted.items()}
