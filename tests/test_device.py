"""What a layer asks of its device: to be made on the meta device and filled later, and never to be waited for."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from whiten_layers import (
    Chain,
    EigenbasisScaling,
    FeatureWhitening,
    OptimalInputGain,
    WhitenedConv2d,
    WhitenedLinear,
    whiten,
)

from .cases import everywhere
from .helpers import each_transform


def network(transform=None, device=None):
    layers = nn.Conv2d(3, 4, 3, device=device), nn.Flatten(), nn.Linear(64, 5, device=device)
    return whiten(nn.Sequential(*layers), transform)


def train(model, steps=3, device=None):
    for seed in range(steps):
        x = torch.randn(6, 3, 6, 6, generator=torch.Generator().manual_seed(seed)).to(device)
        model(x).square().sum().backward()
    return model


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items() if "transform" in name}


@everywhere
@each_transform
def test_resetting_a_layers_parameters_resets_what_it_has_observed(case, transform):
    _, layer = case.make_pair(transform)
    fresh = state(layer)
    for seed in range(3):
        layer(case.make_input(seed)).square().sum().backward()
    assert layer.transform.num_batches_tracked == 3
    layer.reset_parameters()
    torch.testing.assert_close(state(layer), fresh, rtol=0, atol=0)


@each_transform
@pytest.mark.parametrize("way", ["whiten", "construct", "context"])
def test_made_on_the_meta_device_then_filled(transform, way):
    def build():
        if way == "construct":
            layers = WhitenedConv2d(3, 4, 3, device="meta", transform=transform), nn.Flatten()
            return nn.Sequential(*layers, WhitenedLinear(64, 5, device="meta", transform=transform))
        if way == "whiten":
            return network(transform, device="meta")
        with torch.device("meta"):
            return network(transform)

    model, expected = build(), network(transform)
    assert all(buffer.is_meta for buffer in model.buffers())
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)  # `to_empty` then fills with NaN
    try:
        model.to_empty(device="cpu")
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(state(model), state(expected), rtol=0, atol=0)
    for layer in (model[0], model[2]):
        layer.reset_parameters()
    expected.load_state_dict(model.state_dict())
    torch.testing.assert_close(train(model).state_dict(), train(expected).state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("checkpoint", ["plain", "whitened"])
def test_made_on_the_meta_device_then_assigned_to(checkpoint):
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 5))
    transform = FeatureWhitening(statistics_interval=10)  # nothing is observed between refreshes
    expected = whiten(copy.deepcopy(plain), transform)
    if checkpoint == "whitened":
        train(expected)
    saved = (plain if checkpoint == "plain" else expected).state_dict()
    model = network(transform, device="meta")
    model.load_state_dict(copy.deepcopy(saved), strict=True, assign=True)
    assert not any(value.is_meta for value in model.state_dict().values())
    torch.testing.assert_close(train(model).state_dict(), train(expected).state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("checkpoint", ["plain", "whitened"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_an_assigned_checkpoint_of_another_type_takes_the_state_along(checkpoint, dtype, device):
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 5))
    saved = (plain if checkpoint == "plain" else train(whiten(plain))).state_dict()
    saved = {name: value.to(dtype) if value.is_floating_point() else value.clone() for name, value in saved.items()}
    model = network(device=device)
    model.load_state_dict(saved, assign=True)
    wide = torch.promote_types(dtype, torch.float32)
    assert {b.dtype for b in model.buffers() if b.is_floating_point()} == {wide}
    model(torch.randn(6, 3, 6, 6).to(dtype)).square().sum().backward()
    assert all(p.grad.dtype == dtype and p.grad.isfinite().all() for p in model.parameters())
    assert model[0].transform.num_batches_tracked == (1 if checkpoint == "plain" else 4)


class NoWaiting(TorchDispatchMode):
    """Fails where a tensor's numbers go from a device to the host, or, from memory that is not pinned, to a device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
        devices = {tensor.device.type for tensor in tensors if tensor.dim() or tensor.device.type == "meta"}
        assert len(devices) <= 1, f"{function} moves numbers between {devices}"
        if function in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            assert len({tensor.device.type for tensor in tensors}) == 1, f"{function} moves numbers"
        return result


@everywhere
@each_transform
@pytest.mark.parametrize("features", ["kronecker", "patch"])
def test_a_step_between_refreshes_waits_for_no_device(case, transform, features):
    """The meta device has no numbers: whatever would read one fails, as `.item()`, `bool()` and `nonzero` do."""
    transform = copy.deepcopy(transform)
    transform.features, transform.update_interval = features, 8
    layer = case.whitened(*case.arguments, **case.options, transform=transform, device="meta")
    layer.transform.set_extra_state(torch.tensor([8, 8, 8]))  # refreshes are due after 1, 2, 4, 8 and 16
    for _ in range(4):
        x = torch.randn(case.input_shape, device="meta", requires_grad=True)
        with NoWaiting():
            layer(x).square().sum().backward()
    assert layer.transform.num_batches_tracked == 12


def test_waiting_would_be_noticed():
    with pytest.raises(RuntimeError), NoWaiting():
        torch.randn(3, device="meta").sum().item()
    with pytest.raises(AssertionError, match="moves numbers"), NoWaiting():
        torch.randn(3).to("meta")
    with pytest.raises(AssertionError, match="moves numbers"), NoWaiting():
        torch.as_tensor(torch.tensor(True), device="meta")


@pytest.mark.parametrize(
    "transform",
    [
        FeatureWhitening(power=1.0),
        FeatureWhitening(output_power=0.5, features="kronecker", statistics_interval=1),
        EigenbasisScaling(),
        OptimalInputGain(),
        Chain(FeatureWhitening(), OptimalInputGain()),
    ],
    ids=["power=1", "both", "eigenbasis", "gain", "chain"],
)
def test_what_is_not_read_is_computed_alike(transform, monkeypatch):
    """On a CPU some choices are made by reading a number; elsewhere, that is where no tensor is a CPU's, by computing.

    Bad batches and gradients that jump ask for each of them. There are more images than features, since eigenvectors of
    equal eigenvalues may be any.
    """
    images = 80
    plain = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 5)).double()
    results = []
    for is_cpu in (True, False):
        monkeypatch.setattr(torch.Tensor, "is_cpu", is_cpu)
        model = whiten(copy.deepcopy(plain), transform)
        optimizer = torch.optim.AdamW(model.parameters(), 0.01)
        for step in range(30):
            x = torch.randn(images, 3, 6, 6, generator=torch.Generator().manual_seed(step)).double()
            x[0, 0, 0, 0] = {13: torch.nan, 17: torch.inf}.get(step, 1.0)
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x) * (1e4 if step == 20 else 1), torch.arange(images) % 5)
            loss.backward()
            if step in (13, 17):
                model[1].reset_running_stats()
                optimizer.zero_grad()
            optimizer.step()
        results.append({name: value for name, value in model.state_dict().items() if "extra" not in name})
    assert any(value > 0 for name, value in results[0].items() if name.endswith("num_batches_skipped"))
    if isinstance(transform, EigenbasisScaling):
        # After a bad batch bases are computed again where it is not known to be bad: the same ones, and counted.
        for name in [name for name in results[0] if name.endswith("num_refreshes")]:
            assert results[1].pop(name) == results[0].pop(name) + 1
    torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-12)


def test_eigenbases_on_the_meta_device_take_a_state_without_numbers():
    model = network("eigenbasis", device="meta")
    model.load_state_dict(network("eigenbasis", device="meta").state_dict())
    assert all(buffer.is_meta for buffer in model.buffers())


def test_a_scaled_step_waits_for_no_device():
    model = network("eigenbasis", device="meta")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(3):
        model(torch.randn(6, 3, 6, 6, device="meta")).square().sum().backward()
        with NoWaiting():
            optimizer.step()
    assert model[0].transform.state_dict()["num_steps"].is_meta


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@each_transform
def test_on_a_gpu_a_step_between_refreshes_does_not_synchronise(transform):
    transform = copy.deepcopy(transform)
    transform.update_interval = 8
    model = network(transform).cuda()
    train(model, 8, "cuda")
    batches = [torch.randn(6, 3, 6, 6, device="cuda") for _ in range(7)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for x in batches:
            model(x).square().sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
