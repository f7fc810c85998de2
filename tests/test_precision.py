"""Mixed precision: autocast, loss scaling, models in bfloat16; statistics in float32 with full products."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from whiten_layers import WhitenedLinear, whiten

from .cases import everywhere
from .helpers import batch, buffers, each_transform, network

each_half = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])


def saved_bytes(function):
    """What autograd keeps for a function's backward pass, and the function's result."""
    found = {}

    def keep(tensor):
        found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = function()
    return sum(found.values()), result


@everywhere
@each_half
@each_transform
def test_under_autocast_a_layer_is_the_plain_one_and_keeps_no_more(case, dtype, transform):
    plain, whitened = case.make_pair(transform, torch.float32)
    for seed in range(3):
        results = []
        for layer in (plain, whitened):
            layer.zero_grad()
            x = case.make_input(seed, torch.float32).requires_grad_()
            with torch.autocast("cpu", dtype=dtype):
                size, y = saved_bytes(lambda layer=layer, x=x: layer(x))
            y.backward(torch.linspace(-1, 2, y.numel()).view(y.shape).to(y))
            results.append((y.detach(), x.grad, size))
        torch.testing.assert_close(results[0][:2], results[1][:2], rtol=0, atol=0)
        # A convolution that pads "same" may save what it padded, and has no use for the input.
        padded = getattr(plain, "padding", 0) == "same" and plain.padding_mode == "zeros"
        assert results[1][2] <= results[0][2] + padded * x.numel() * dtype.itemsize
        assert whitened.weight.grad.dtype == torch.float32 and whitened.weight.grad.isfinite().all()
    assert whitened.transform.num_batches_skipped == 0
    assert all(b.dtype in (torch.float32, torch.long) for b in whitened.buffers())


@each_half
@pytest.mark.parametrize("inside", [False, True], ids=["backward outside", "backward inside"])
@each_transform
def test_autocast_narrows_no_statistics_and_no_inverse(transform, dtype, inside):
    model = network(transform)
    for seed in range(3):
        model.zero_grad()
        with torch.autocast("cpu", dtype=dtype):
            loss = model(batch(seed)).float().square().mean()
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())
    factor = model[0].transform.inputs
    assert factor.num_refreshes == 3
    inverse = torch.linalg.eigh(factor.damped().matrix.double())
    expected = (inverse.eigenvectors * inverse.eigenvalues**-0.5) @ inverse.eigenvectors.mT
    # Rounding in bf16 would be 4e-3.
    torch.testing.assert_close(factor.precision.double() / factor.scale.item(), expected, rtol=1e-5, atol=1e-5)


def test_a_layer_in_an_autocast_block_that_is_switched_off_is_plain_float32():
    layer, twin = (WhitenedLinear(4, 3) for _ in range(2))
    twin.load_state_dict(layer.state_dict())
    x = torch.randn(9, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.autocast("cpu", enabled=False):
        result = layer(x)
    torch.testing.assert_close(result, twin(x), rtol=0, atol=0)


@each_transform
def test_statistics_and_inverses_are_full_precision_whatever_the_setting(transform):
    states = []
    try:
        for precision in ("highest", "medium"):  # bf16 where the processor has it
            torch.set_float32_matmul_precision(precision)
            torch.manual_seed(0)
            layer = WhitenedLinear(64, 32, transform=transform)
            for seed in range(3):
                x = torch.randn(256, 64, generator=torch.Generator().manual_seed(seed))
                # The upstream gradient depends on no product.
                layer(x).backward(torch.randn(256, 32, generator=torch.Generator().manual_seed(seed)))
            # But for what is measured of the gradient, which is a product of the user's precision.
            states.append({name: buffer for name, buffer in buffers(layer).items() if "norms." not in name})
    finally:
        torch.set_float32_matmul_precision("highest")
    torch.testing.assert_close(*states, rtol=0, atol=0)


@each_transform
def test_a_step_that_the_scaler_skips_leaves_nothing_behind(transform):
    """The scaled loss of two batches overflows, and the run is the one without them."""
    runs = []
    for overflowing in ((2, 5), ()):
        model = network(transform)
        optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=1000, backoff_factor=0.5)
        for number in range(8):
            if not overflowing and number in (2, 5):
                continue
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.float16):
                loss = F.cross_entropy(model(batch(number)), torch.arange(6) % 5)
            if number in overflowing:
                loss = loss * 1e38
            before = {n: b for n, b in buffers(model).items() if "running" in n}
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            if number in overflowing:
                after = {n: b for n, b in buffers(model).items() if "running" in n}
                torch.testing.assert_close(before, after, rtol=0, atol=0)
        runs.append(model)
        assert scaler.get_scale() == 256.0 / 2 ** len(overflowing)
    first, second = runs
    assert all(layer.transform.num_batches_skipped == 2 for layer in (first[0], first[2], first[5]))
    # Every batch is observed and refreshes here, so that the count of batches, which goes on, decides nothing.
    torch.testing.assert_close(dict(first.named_parameters()), dict(second.named_parameters()), rtol=0, atol=0)
    assert all(layer.transform.num_batches_skipped == 0 for layer in (second[0], second[2], second[5]))


@each_transform
def test_a_whole_model_in_bfloat16_trains(transform):
    model = network(transform, inplace=False).to(torch.bfloat16)
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(batch(0).bfloat16()).float(), torch.arange(6) % 5)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    assert all(parameter.grad.dtype == torch.bfloat16 for parameter in model.parameters())
    assert all(b.dtype in (torch.float32, torch.long) for b in model.buffers())
    assert model[0].transform.num_batches_skipped == 0
    assert model[0].transform.inputs.num_refreshes == 40


def test_half_leaves_the_buffers_wide():
    layer = whiten(nn.Linear(4, 3)).half()
    assert layer.weight.dtype == torch.float16
    assert all(b.dtype in (torch.float32, torch.long) for b in layer.buffers())
