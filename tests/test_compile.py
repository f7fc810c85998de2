"""`torch.compile`: eager's numbers, in one graph that is compiled once."""

import copy
import gc
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

from whiten_layers import FeatureWhitening, whiten
from whiten_layers.refresh import schedule

from .cases import everywhere
from .helpers import BOTH_SIDES, INPUT_SIDE, batch, buffers, each_transform, mostly_slow, network

# The compilers of some versions warn of themselves.
pytestmark = pytest.mark.filterwarnings("ignore")
each_pair = pytest.mark.parametrize(
    "transform, backend",
    mostly_slow(
        itertools.product([INPUT_SIDE, BOTH_SIDES], ["aot_eager", "inductor"]),
        [(INPUT_SIDE, "aot_eager"), (BOTH_SIDES, "inductor")],
    ),
    ids=["input-aot_eager", "input-inductor", "both-aot_eager", "both-inductor"],
)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()


def graphs():
    assert not counters["graph_break"] and not counters["recompile_limit"]
    return counters["stats"]["unique_graphs"]


def train(models, batches, autocast=None):
    """A few steps for each model alike; every loss."""
    optimizers = [torch.optim.SGD(model.parameters(), 0.01) for model in models]
    losses = []
    for x in batches:
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
                loss = F.cross_entropy(model(x), torch.arange(len(x)) % 5)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


def assert_equal(compiled, eager):
    torch.testing.assert_close(dict(compiled.named_parameters()), dict(eager.named_parameters()), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(buffers(compiled), buffers(eager), rtol=1e-3, atol=1e-4)


@everywhere
@pytest.mark.parametrize("transform", mostly_slow([INPUT_SIDE, BOTH_SIDES], [BOTH_SIDES]), ids=["input", "both"])
def test_every_layer_is_eager_in_one_graph(case, transform):
    _, eager = case.make_pair(transform)
    compiled = copy.deepcopy(eager)
    fast = torch.compile(compiled, backend="aot_eager", fullgraph=True)
    for seed in range(3):
        results = []
        for call, layer in ((eager, eager), (fast, compiled)):
            layer.zero_grad()
            x = case.make_input(seed).requires_grad_()
            y = call(x)
            y.backward(torch.linspace(-1, 2, y.numel()).view(y.shape).double())
            results.append([y.detach(), x.grad, *(parameter.grad for parameter in layer.parameters())])
        torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(buffers(compiled), buffers(eager), rtol=1e-12, atol=1e-12)
    assert graphs() == 1


@each_pair
def test_nothing_is_compiled_again_in_fifty_steps(transform, backend):
    # torch 2.6 compiles no activation that works in place on the output of `ObserveOutput`.
    inplace = not transform.observes_output
    eager, compiled = network(transform, inplace), network(transform, inplace)
    fast = torch.compile(compiled, backend=backend, fullgraph=True)
    train((eager, fast), [batch(seed) for seed in range(6)])
    assert_equal(compiled, eager)
    train((fast,), [batch(seed) for seed in range(6, 50)])
    assert graphs() == 1
    assert compiled[0].transform.num_batches_tracked == 50


@each_pair
def test_batches_of_any_size_share_a_graph(transform, backend):
    batches = [batch(seed)[: 6 - seed % 4].clone() for seed in range(8)]
    eager, compiled = network(transform, inplace=False), network(transform, inplace=False)
    fast = torch.compile(compiled, backend=backend, fullgraph=True)
    train((eager, fast), batches)
    assert_equal(compiled, eager)
    assert graphs() <= 2  # one for the first size, one for all others
    torch._dynamo.reset()
    counters.clear()
    train((torch.compile(compiled, backend=backend, fullgraph=True, dynamic=True),), batches)
    assert graphs() == 1


@each_pair
def test_blocks_compiled_one_by_one_share_a_graph(transform, backend):
    """All that tells one block from the next, the handle, is a tensor: they are more than the compiler would repeat."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(5, 8), nn.GELU(), nn.Linear(8, 5))

        def forward(self, x):
            return x + self.layers(x)

    torch.manual_seed(0)
    eager = whiten(nn.Sequential(*(Block() for _ in range(12))), transform)
    compiled = copy.deepcopy(eager)
    for block in compiled:
        block.compile(backend=backend, fullgraph=True)
    train((eager, compiled), [torch.randn(6, 5) for _ in range(4)])
    assert graphs() <= 2  # the first block's input asks for no gradient
    assert_equal(compiled, eager)
    assert all(block.layers[0].transform.num_batches_tracked == 4 for block in compiled)


@each_transform
def test_compiled_under_autocast(transform):
    eager, compiled = network(transform, inplace=False), network(transform, inplace=False)
    fast = torch.compile(compiled, backend="aot_eager", fullgraph=True)
    losses = train((eager, fast), [batch(seed) for seed in range(6)], torch.bfloat16)
    assert graphs() == 1
    torch.testing.assert_close(losses[::2], losses[1::2], rtol=1e-2, atol=1e-2)  # in bf16
    torch.testing.assert_close(buffers(compiled), buffers(eager), rtol=1e-3, atol=1e-4)


SHARED = {
    "two heads": lambda layer, a, b: layer(a) - layer(b).sin(),
    "one sum": lambda layer, a, b: layer(a) + layer(b),  # whose two calls meet one upstream gradient
    "equal calls": lambda layer, a, b: layer(a) + layer(a),
    "nested": lambda layer, a, b: (layer(a) * 2 + layer(3 * b) + layer(b.cos())).sin() + layer(layer(a)),
}


@pytest.mark.skipif(
    not hasattr(torch.library.CustomOpDef, "register_effect"), reason="this version keeps no order of operations"
)
@each_transform
@pytest.mark.parametrize(
    "call, backend",
    [
        pytest.param(call, backend, id=f"{name}-{backend}")
        for name, call in SHARED.items()
        for backend in (["aot_eager", "inductor"] if name == "nested" else ["aot_eager"])
    ],
)
def test_a_shared_layer_observes_every_call_in_eagers_order(transform, backend, call):
    torch.manual_seed(0)
    eager = whiten(nn.Linear(5, 5), transform)
    compiled = copy.deepcopy(eager)
    fast = torch.compile(lambda a, b: call(compiled, a, b), backend=backend, fullgraph=True)
    for _ in range(4):
        a, b = torch.randn(9, 5) * torch.arange(1, 6), torch.randn(9, 5)
        for layer, result in ((eager, lambda a, b: call(eager, a, b)), (compiled, fast)):
            layer.zero_grad()
            result(a, b).square().sum().backward()
        torch.testing.assert_close(compiled.weight.grad, eager.weight.grad, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(buffers(compiled), buffers(eager), rtol=1e-4, atol=1e-4)
    assert compiled.transform.num_batches_tracked == eager.transform.num_batches_tracked


@each_transform
def test_compiled_with_checkpoints_inside(transform):
    eager, compiled = network(transform, inplace=False), network(transform, inplace=False)

    def segments(x):
        return checkpoint(compiled[3:], checkpoint(compiled[:3], x, use_reentrant=False), use_reentrant=False)

    fast = torch.compile(segments, backend="aot_eager", fullgraph=True)
    for seed in range(4):
        x = batch(seed).requires_grad_()
        for model, call in ((eager, eager), (compiled, fast)):
            model.zero_grad()
            call(x).square().mean().backward()
    assert graphs() == 1
    torch.testing.assert_close(*([p.grad for p in model.parameters()] for model in (eager, compiled)))
    torch.testing.assert_close(buffers(compiled), buffers(eager), rtol=1e-3, atol=1e-4)
    assert compiled[0].transform.num_batches_tracked == 4


def test_evaluation_after_training_is_one_more_graph_and_the_plain_one():
    model = network(FeatureWhitening())
    fast = torch.compile(model, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        train((fast,), [batch(0)])
        with torch.no_grad():
            torch.testing.assert_close(fast.eval()(batch(1)), model(batch(1)), rtol=0, atol=0)
        fast.train()
    assert graphs() == 2


@each_transform
@pytest.mark.parametrize("forward", ["eager", "compiled"])
def test_a_compiled_autograd(transform, forward):
    """Its passes call nobody back: a layer is refreshed at once, which is the same where it is met once in a pass."""
    eager, compiled = network(transform, inplace=False), network(transform, inplace=False)
    called = compiled if forward == "eager" else torch.compile(compiled, backend="aot_eager", fullgraph=True)
    before = len(schedule._open_passes)
    for seed in range(4):
        train((eager,), [batch(seed)])
        with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
            train((called,), [batch(seed)])
    assert_equal(compiled, eager)
    assert compiled[0].transform.inputs.num_refreshes == eager[0].transform.inputs.num_refreshes == 4
    assert len(schedule._open_passes) == before  # nobody waits for a callback


def test_the_import_leaves_a_compiled_backward_of_plain_layers_alone():
    """The compiler makes modules inside of what it traces, and the library is told of every new module."""
    layer, x = nn.Linear(4, 3), torch.randn(2, 4)
    loss = layer(x).square().sum()
    (expected,) = torch.autograd.grad(loss, layer.weight, retain_graph=True)
    with torch._dynamo.config.patch(compiled_autograd=True):
        torch.compile(lambda loss: loss.backward(), backend="eager")(loss)
    torch.testing.assert_close(layer.weight.grad, expected, rtol=0, atol=0)


def test_a_model_that_is_gone_before_its_backward_pass_is_named():
    model = network(FeatureWhitening())
    loss = torch.compile(model, backend="aot_eager", fullgraph=True)(batch(0)).sum()
    del model
    torch._dynamo.reset()
    gc.collect()
    with pytest.raises(RuntimeError, match="the layer of this backward pass is gone: keep a compiled model"):
        loss.backward()
