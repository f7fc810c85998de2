"""Tools that go by a module's exact type, or take a module without children for a layer."""

import copy

import pytest
import torch
import torch.nn.functional as F
import torchinfo
from torch import nn
from torch.ao import quantization
from torch.distributed.fsdp._fully_shard._fsdp_init import _get_managed_modules, _get_managed_states
from torch.nn.utils import prune
from torch.utils.flop_counter import FlopCounterMode

from whiten_layers import EigenbasisScaling, FeatureWhitening, WhitenedConv2d, WhitenedLinear, unwhiten, whiten
from whiten_layers.transforms import Chain, PSIScaling


def network():
    torch.manual_seed(0)
    convolutions = [nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.ConvTranspose2d(4, 4, 2)]
    return nn.Sequential(nn.Sequential(*convolutions), nn.Flatten(), nn.Linear(196, 5))


def step(model):
    inputs = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    F.cross_entropy(model(inputs), torch.arange(8) % 5).backward()


def leaves(module):
    """Walk as tools do: a module without children is a layer."""
    children = list(module.children())
    return [leaf for child in children for leaf in leaves(child)] if children else [module]


TRANSFORMS = {
    "both sides": FeatureWhitening(output_power=0.5),
    "a chain": Chain(FeatureWhitening(), PSIScaling()),
    "eigenbasis": EigenbasisScaling(),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS.keys())
def test_a_walk_over_children_ends_at_the_whitened_layers(transform):
    model = whiten(network(), transform)
    assert [type(leaf) for leaf in leaves(unwhiten(copy.deepcopy(model)))] == [type(leaf) for leaf in leaves(network())]
    walked = leaves(model)
    assert [isinstance(leaf, type(plain)) for leaf, plain in zip(walked, leaves(network()), strict=True)] == [True] * 6


def test_pytorch_itself_walks_over_all():
    model = whiten(network(), FeatureWhitening(output_power=0.5))
    visited = []
    model.apply(visited.append)
    assert len(visited) == len(list(model.modules())) > len(list(network().modules()))
    managed = _get_managed_modules((model,))
    buffers = set(_get_managed_states(managed)[1])  # what FSDP2 moves to its device
    assert buffers >= set(model.buffers())


def test_what_is_not_walked_over_is_moved_cast_and_switched_with_the_layer():
    model = whiten(network(), FeatureWhitening(output_power=0.5))
    step(model)
    parts = list(model[2].transform.modules())
    assert len(parts) > 2
    model.eval()
    assert not any(part.training for part in parts)
    model.train()
    assert all(part.training for part in parts)
    model.double()
    assert {buffer.dtype for buffer in model[2].transform.buffers() if buffer.dim()} == {torch.float64}
    model.to("meta")
    assert all(buffer.is_meta for buffer in model[2].transform.buffers())
    assert {name for name, _ in model.named_buffers()} >= {"2.transform.inputs.running_covariance"}


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_summary_is_the_plain_networks(mode):
    plain, whitened = (
        torchinfo.summary(model, (2, 3, 8, 8), verbose=0, mode=mode) for model in (network(), whiten(network()))
    )
    assert whitened.total_mult_adds == plain.total_mult_adds > 0
    assert whitened.total_params == plain.total_params
    assert str(whitened).replace("Whitened", "").split() == str(plain).split()


def test_operations_are_counted_as_the_plain_networks():
    counts = []
    for model in (network(), whiten(network())):
        with FlopCounterMode(display=False) as counter:
            model(torch.randn(2, 3, 8, 8))
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_an_initialisation_by_exact_type_has_to_come_before():
    def initialise(module):
        if type(module) in (nn.Linear, nn.Conv2d):
            nn.init.constant_(module.weight, 2.0)

    before, after = whiten(network().apply(initialise)), whiten(network()).apply(initialise)
    assert (before[2].weight == 2).all() and (before[0][0].weight == 2).all()
    assert not (after[2].weight == 2).any()


@pytest.mark.filterwarnings("ignore")  # of the tool's own: it is deprecated in several places
def test_quantization_takes_the_network_without_whitening():
    def quantized(model):
        return quantization.quantize_dynamic(model.eval(), {nn.Linear}, dtype=torch.qint8)

    model = whiten(network())
    step(model)
    inputs = torch.randn(2, 3, 8, 8)
    plain = unwhiten(copy.deepcopy(model))
    assert type(quantized(copy.deepcopy(model))[2]) is WhitenedLinear  # which the tool does not know
    result = quantized(plain)
    assert type(result[2]) is not nn.Linear
    assert (result(inputs) - model.eval()(inputs)).abs().max() < 0.1  # 8 bits
    assert type(model[2]) is WhitenedLinear and type(model[0][0]) is WhitenedConv2d

    def prepared(model):
        model.train().qconfig = quantization.get_default_qat_qconfig("fbgemm")
        return sum(hasattr(module, "weight_fake_quant") for module in quantization.prepare_qat(model).modules())

    assert prepared(network()) == prepared(unwhiten(copy.deepcopy(model))) > 0
    assert prepared(copy.deepcopy(model)) == 0


def test_a_pruned_layer_trains_whitened_where_it_is_not_pruned():
    model, dense = whiten(network()), whiten(network())
    layer = model[2]
    prune.l1_unstructured(layer, "weight", 0.5)
    with torch.no_grad():
        dense[2].weight.copy_(layer.weight)
    for _ in range(3):
        for network_ in (model, dense):
            network_.zero_grad()
            step(network_)
    expected = dense[2].weight.grad * layer.weight_mask
    torch.testing.assert_close(layer.weight_orig.grad, expected)
    assert layer.transform.num_batches_tracked == 3
