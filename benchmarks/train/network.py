"""The network that the options describe, and plain views of it."""

import argparse
import copy
from collections.abc import Iterator

import whiten_layers.models
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from whiten_layers import convert_batchnorm, unwhiten, whiten
from whiten_layers.statistics.covariance import FeatureCovariance

from ..training import transform_from
from .errors import Unusable, one_line
from .world import World


def make_network(num_classes: int, options: argparse.Namespace) -> nn.Module:
    """A network of `whiten_layers.models`, whitened where its name says so.

    Raises:
        Unusable: it has no layer that --psi could be for.
    """
    name = options.model.removeprefix("whitened_")
    network = getattr(whiten_layers.models, name)(num_classes=num_classes)
    if options.norm:
        convert_batchnorm(network, options.norm)
    if name != options.model:
        try:
            whiten(network, transform_from(options), psi=bool(options.psi))
        except ValueError as error:  # of psi: everything else has been checked
            raise Unusable(f"--psi: {one_line(error)}") from error
    return network


def plain_view(network: nn.Module) -> nn.Module:
    """A plain network of the same parameters and buffers, which moves as the whitened one trains."""
    shared = {id(tensor): tensor for tensor in [*network.parameters(), *network.buffers()]}
    return unwhiten(copy.deepcopy(network, shared))


def make_average(view: nn.Module, decay: float) -> AveragedModel:
    """The exponential moving average of a network's parameters and buffers."""
    return AveragedModel(view, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)


def wrap(network: nn.Module, world: World, options: argparse.Namespace) -> nn.Module:
    """What a training step calls."""
    if world.size > 1:
        network = DistributedDataParallel(network, device_ids=[world.device] if world.device.type == "cuda" else None)
    if options.compile:
        network.compile()
    return network


def averages(network: nn.Module) -> Iterator[FeatureCovariance]:
    """The statistics of a network, in one order: what each has observed since the last refresh is in no state dict."""
    return (module for module in network.modules() if isinstance(module, FeatureCovariance))


def bad_batches(network: nn.Module) -> dict[str, int]:
    """How many batches whitened layers and norms skipped, and how many refreshes failed, of all of them together."""
    counted = {"skipped": "num_batches_skipped", "failed": "num_refreshes_failed"}
    buffers = list(network.named_buffers())
    return {what: sum(int(b) for name, b in buffers if name.endswith(end)) for what, end in counted.items()}
