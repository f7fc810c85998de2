"""What training scripts do with a model: averages of it, empty batches, ties, parametrizations, attention, clipping."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint_sequential

from whiten_layers import FeatureWhitening, report, unwhiten, whiten

from .cases import everywhere
from .helpers import batch, buffers, each_transform, network


def step(model, optimizer, seed):
    optimizer.zero_grad()
    F.cross_entropy(model(batch(seed)), torch.arange(6) % 5).backward()
    optimizer.step()


@pytest.mark.parametrize("use_buffers", [False, True])
@each_transform
def test_an_averaged_model_follows_and_is_not_trained(transform, use_buffers):
    model = network(transform)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=use_buffers)
    expected = None
    for seed in range(4):
        step(model, optimizer, seed)
        average.update_parameters(model)
        now = {name: p.detach().clone() for name, p in model.named_parameters()}
        # The first update is a copy.
        expected = now if expected is None else {name: 0.5 * expected[name] + 0.5 * p for name, p in now.items()}
    torch.testing.assert_close(dict(average.module.named_parameters()), expected)
    assert model[0].transform.num_batches_tracked == 4
    plain = unwhiten(copy.deepcopy(average.module)).eval()
    torch.testing.assert_close(average.eval()(batch(9)), plain(batch(9)), rtol=0, atol=0)
    assert all(b.isfinite().all() for b in average.module.buffers())


@pytest.mark.parametrize("use_buffers", [False, True])
def test_an_averaged_model_whose_layers_are_skipped(use_buffers):
    """Layers then open and close their windows at other steps than the model was copied at."""
    torch.manual_seed(0)
    layers = whiten(nn.ModuleList(nn.Linear(5, 5) for _ in range(4)), update_interval=3)
    optimizer = torch.optim.SGD(layers.parameters(), 0.01)
    average = AveragedModel(layers, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=use_buffers)
    for _ in range(30):
        optimizer.zero_grad()
        x = torch.randn(8, 5)
        for layer in layers:
            x = layer(x) if torch.rand(()) > 0.3 else x
        (x * torch.randn(8, 5)).sum().backward() if x.requires_grad else None
        optimizer.step()
        average.update_parameters(layers)
    for mine, theirs in zip(layers, average.module, strict=True):
        assert theirs.weight.isfinite().all() and (theirs.weight - mine.weight).norm() < (mine.weight).norm()
        precision = theirs.transform.inputs.precision
        assert precision.isfinite().all()
        assert torch.equal(precision, mine.transform.inputs.precision) != use_buffers  # copied, or averaged


@everywhere
@each_transform
def test_an_empty_batch_is_plain_and_leaves_no_mark(case, transform):
    plain, whitened = case.make_pair(transform)
    if len(case.input_shape) == len(plain.weight.shape) - 1:
        pytest.skip("an unbatched input is never empty")
    whitened(case.make_input()).square().sum().backward()
    before = buffers(whitened)
    for empty in (case.make_input()[:0], *([case.make_input()[..., :0, :]] if isinstance(plain, nn.Linear) else [])):
        results = []
        for layer in (plain, whitened):
            layer.zero_grad()
            x = empty.clone().requires_grad_()
            y = layer(x)
            y.sum().backward()
            results.append([y.detach(), x.grad, *(parameter.grad for parameter in layer.parameters())])
        torch.testing.assert_close(*results, rtol=0, atol=0)
    torch.testing.assert_close(buffers(whitened), before, rtol=0, atol=0)


@each_transform
def test_an_encoder_layer_is_whitened_whole_and_evaluates_as_the_plain_one(transform):
    torch.manual_seed(0)
    plain = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), 2, enable_nested_tensor=False
    )
    model = whiten(copy.deepcopy(plain), transform)
    names = ("self_attn", "self_attn.out_proj", "linear1", "linear2")
    assert {row.layer for row in report(model).rows} == {f"layers.{i}.{name}" for i in (0, 1) for name in names}
    assert not report(model).left
    x = torch.randn(3, 5, 8)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    plain.load_state_dict(unwhiten(copy.deepcopy(model)).state_dict())
    with torch.no_grad():  # PyTorch's fast path, which reads the layers' weights
        torch.testing.assert_close(model.eval()(x), plain.eval()(x), rtol=0, atol=0)


@each_transform
def test_a_weight_that_two_layers_share_gets_both_transformed_gradients(transform):
    torch.manual_seed(0)
    model = whiten(nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5)).double(), transform)
    model[2].weight = model[0].weight
    apart = copy.deepcopy(model)
    apart[2].weight = nn.Parameter(apart[0].weight.detach().clone())
    for seed in range(3):
        x = torch.randn(9, 5, generator=torch.Generator().manual_seed(seed)).double()
        for net in (model, apart):
            net.zero_grad()
            net(x).square().sum().backward()
        torch.testing.assert_close(model[0].weight.grad, apart[0].weight.grad + apart[2].weight.grad)


def test_an_output_layer_tied_to_an_embedding():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(7, 4)
            self.head = nn.Linear(4, 7, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, x):
            return self.head(self.embedding(x))

    model = whiten(Model(), FeatureWhitening(update_interval=1))
    assert "covariance is diagonal" in report(model).left["embedding"]
    for _ in range(3):
        F.cross_entropy(model(torch.arange(7)), torch.arange(7)).backward()
    assert model.head.weight is model.embedding.weight
    assert model.head.weight.grad.isfinite().all() and model.head.transform.num_batches_tracked == 3


@pytest.mark.parametrize("norm", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm])
@each_transform
def test_a_parametrized_layer_trains_and_is_counted_once(norm, transform):
    """The gradient of the computed weight passes the map, and what lies behind it gets its share by the chain rule."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(50, 40), nn.Tanh(), nn.Linear(40, 3))
    model = copy.deepcopy(plain)
    whiten(model, transform, include="0")
    torch.manual_seed(1)  # a spectral norm starts from a random vector, and moves it at each reading of the weight
    norm(plain[0])
    torch.manual_seed(1)
    norm(model[0])
    assert "0" not in report(model).left
    for frozen in (False, False, False, True):
        for net in (plain, model):
            for parameter in net[0].parameters():
                parameter.requires_grad_(not frozen)
        x = torch.randn(9, 50)
        torch.testing.assert_close(model(x), plain(x), rtol=0, atol=0)
        model(x).square().sum().backward()
        plain(x)
    assert model[0].transform.num_batches_tracked == 3
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model[0].parameters())
    assert not any(name.startswith("0") for name in report(model).left)
    with pytest.raises(ValueError, match=r"0 is a ParametrizedWhitenedLinear.* remove its parametrizations"):
        unwhiten(model)
    nn.utils.parametrize.remove_parametrizations(model[0], "weight")
    assert type(unwhiten(model)[0]) is nn.Linear


@each_transform
def test_a_network_checkpointed_in_segments_is_the_whole_one(transform):
    plain, segments = network(transform, inplace=False), network(transform, inplace=False)
    optimizers = [torch.optim.SGD(model.parameters(), 0.01) for model in (plain, segments)]
    for seed in range(4):
        for model, optimizer in zip((plain, segments), optimizers, strict=True):
            optimizer.zero_grad()
            x = batch(seed).requires_grad_()
            out = model(x) if model is plain else checkpoint_sequential(model, 3, x, use_reentrant=False)
            F.cross_entropy(out, torch.arange(6) % 5).backward()
            optimizer.step()
    torch.testing.assert_close(plain.state_dict(), segments.state_dict(), rtol=0, atol=0)


@each_transform
def test_clipping_sees_the_transformed_gradient_and_accumulation_adds_it(transform):
    model, twin = network(transform), network(transform)
    for net in (model, twin):
        F.cross_entropy(net(batch(0)), torch.arange(6) % 5).backward()
        net.zero_grad()
        for layer in (net[0], net[2], net[5]):
            layer.transform.update_interval = 10**6
    F.cross_entropy(model(batch(1)), torch.arange(6) % 5).backward()
    F.cross_entropy(model(batch(2)), torch.arange(6) % 5).backward()
    parts = []
    for seed in (1, 2):
        twin.zero_grad()
        F.cross_entropy(twin(batch(seed)), torch.arange(6) % 5).backward()
        parts.append([p.grad.clone() for p in twin.parameters()])
    total = [a + b for a, b in zip(*parts, strict=True)]
    torch.testing.assert_close([p.grad for p in model.parameters()], total, rtol=1e-6, atol=1e-7)
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    torch.testing.assert_close(norm, torch.cat([t.flatten() for t in total]).norm())
