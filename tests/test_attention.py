"""The twin of `nn.MultiheadAttention`: a self-attention trains as one that is written with whitened linear layers."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from whiten_layers import (
    Chain,
    EigenbasisScaling,
    FeatureWhitening,
    PSIScaling,
    WhitenedLinear,
    WhitenedMultiheadAttention,
    plain_state_dict,
    report,
    unwhiten,
    whiten,
)

from .helpers import compilers_may_warn

WIDTH, HEADS = 12, 3
TRANSFORMS = {
    "inputs": FeatureWhitening(),
    "both sides": FeatureWhitening(output_power=0.5, block_size=8),
    "exact": FeatureWhitening.exact(),
    "chain": Chain(FeatureWhitening(), PSIScaling()),
    "eigenbasis": EigenbasisScaling(),
}
each_transform = pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS.keys())


class Written(nn.Module):
    """Self-attention as it is written with two linear layers. Shape: ``(N, L, WIDTH)``."""

    def __init__(self, attention):
        super().__init__()
        has_bias = attention.in_proj_bias is not None
        self.project = nn.Linear(WIDTH, 3 * WIDTH, has_bias, dtype=torch.float64)
        self.out_proj = nn.Linear(WIDTH, WIDTH, has_bias, dtype=torch.float64)
        given = [attention.in_proj_weight, attention.in_proj_bias, *attention.out_proj.parameters()]
        with torch.no_grad():
            for parameter, value in zip(self.parameters(), filter(lambda one: one is not None, given), strict=True):
                parameter.copy_(value)

    def forward(self, inputs):
        parts = self.project(inputs).chunk(3, -1)
        query, key, value = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in parts)
        return self.out_proj(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


def make(**options):
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(WIDTH, HEADS, dtype=torch.float64, **options)
    if attention.in_proj_bias is not None:
        nn.init.normal_(attention.in_proj_bias)
    return attention


def inputs(step, *shape):
    generator = torch.Generator().manual_seed(step)
    noise = torch.randn(*(shape or (4, 6, WIDTH)), generator=generator, dtype=torch.float64)
    return noise + 0.7 * noise.cumsum(-1) + 0.3


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@each_transform
def test_it_trains_as_an_attention_written_with_linear_layers(transform, bias, batch_first):
    attention = make(bias=bias, batch_first=batch_first)
    written = whiten(Written(attention), transform)
    whiten(attention, transform)
    optimizers = [torch.optim.AdamW(model.parameters(), 0.01) for model in (attention, written)]
    for step in range(25):
        x = inputs(step)
        ours = x if batch_first else x.transpose(0, 1)
        output = attention(ours, ours, ours, need_weights=step % 2 == 0)[0]
        losses = [
            (output if batch_first else output.transpose(0, 1)).cumsum(1).square().mean(),
            written(x).cumsum(1).square().mean(),
        ]
        for loss, optimizer in zip(losses, optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        # Rows come in another order where the batch is not first, so sums are rounded differently.
        torch.testing.assert_close(*losses, rtol=1e-7, atol=0)
    numbers = [attention.transform.num_batches_tracked, attention.out_proj.transform.num_batches_tracked]
    assert numbers == [written.project.transform.num_batches_tracked, written.out_proj.transform.num_batches_tracked]
    assert min(numbers) >= (5 if transform is TRANSFORMS["eigenbasis"] else 25)  # which observes some


CALLS = {
    "weights": ({}, {}),
    "no weights": ({}, {"need_weights": False}),
    "weights of each head": ({}, {"average_attn_weights": False}),
    "padding": ({}, {"key_padding_mask": torch.arange(6) > torch.tensor([[3], [4], [5], [6]])}),
    "mask": ({}, {"attn_mask": torch.ones(6, 6).tril() == 0, "need_weights": False}),
    "mask of floats": ({}, {"attn_mask": torch.linspace(-1, 1, 36).view(6, 6).double()}),
    "causal": ({}, {"attn_mask": torch.ones(6, 6).tril() == 0, "is_causal": True, "need_weights": False}),
    "rows first": ({"batch_first": False}, {}),
    "extra key and value": ({"add_bias_kv": True, "add_zero_attn": True}, {}),
    "dropout": ({"dropout": 0.3}, {}),
    "no bias": ({"bias": False}, {"need_weights": False}),
    "one sequence": ({}, {"sequence": True}),
    "one sequence with padding": ({}, {"sequence": True, "key_padding_mask": torch.arange(6) > 4}),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("same", ["self-attention", "one memory", "all different"])
@pytest.mark.parametrize("made, called", CALLS.values(), ids=CALLS.keys())
def test_output_and_gradients_are_the_plain_ones_to_the_last_bit(made, called, same, dtype):
    called = {
        key: value.to(dtype) if key == "attn_mask" and value.is_floating_point() else value
        for key, value in called.items()
    }
    plain = make(**{"batch_first": True, **made}).to(dtype)
    twin = whiten(copy.deepcopy(plain))
    shape = (6, WIDTH) if called.pop("sequence", False) else (4, 6, WIDTH)
    shape = (6, 4, WIDTH) if made.get("batch_first") is False else shape
    results = []
    for layer in (plain, twin):
        query = inputs(0, *shape).to(dtype).requires_grad_()
        key = query if same == "self-attention" else inputs(1, *shape).to(dtype).requires_grad_()
        value = inputs(2, *shape).to(dtype).requires_grad_() if same == "all different" else key
        torch.manual_seed(1)
        output, weights = layer(query, key, value, **called)
        output.cumsum(-1).square().sum().backward()
        results.append([output, weights, query.grad, key.grad, value.grad])
    # PyTorch computes the projections of a single sequence apart, in products of another size
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 0.1}[dtype] if len(shape) == 2 else 0
    given = ([one for one in part if one is not None] for part in results)
    torch.testing.assert_close(*given, rtol=tolerance, atol=tolerance)
    assert (results[0][1] is None) == (results[1][1] is None)
    # Until the first refresh a whitened gradient is the plain one.
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 0.1}[dtype]
    for ours, theirs in zip(twin.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=tolerance, atol=tolerance)
    assert twin.transform.num_batches_tracked == (same == "self-attention")
    assert twin.out_proj.transform.num_batches_tracked == 1


@pytest.mark.parametrize("shape", [(4, 0, WIDTH), (0, 6, WIDTH), (0, WIDTH)])
def test_nothing_to_attend_from(shape):
    plain = make(batch_first=True)
    twin = whiten(copy.deepcopy(plain))
    key = inputs(0, *shape[:-2], 6, WIDTH)
    for layer in (plain, twin):
        assert layer(torch.zeros(shape, dtype=torch.float64), key, key, need_weights=False)[0].shape == shape


def test_under_a_mode_and_with_a_subclass_of_tensors():
    class Own(torch.Tensor):
        pass

    plain = make(batch_first=True)
    twin = whiten(copy.deepcopy(plain))
    x = inputs(0)
    with torch.device("cpu"):
        torch.testing.assert_close(twin(x, x, x), plain(x, x, x), rtol=0, atol=0)
    own = x.as_subclass(Own)
    torch.testing.assert_close(twin(own, own, own)[0], plain(own, own, own)[0], rtol=0, atol=0)
    assert type(twin(own, own, own)[0]) is type(plain(own, own, own)[0]) is Own


def test_what_a_script_puts_in_place_of_pytorchs_attention_is_used(monkeypatch):
    attention, called = whiten(make(batch_first=True)), []
    original = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *given: called.append(1) or original(*given))
    x = inputs(0)
    attention(x, x, x, need_weights=False)
    assert called == [1]


def test_hooks_and_another_class_of_the_output_do_what_they_do_in_the_plain_attention():
    class Doubling(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    attention = whiten(make(batch_first=True))
    called = []
    attention.out_proj.register_forward_hook(lambda *given: called.append(1))
    x = inputs(0)
    trained = attention(x, x, x)[0]
    torch.testing.assert_close(attention.eval()(x, x, x)[0], trained, rtol=1e-12, atol=1e-12)
    assert not called  # as in PyTorch, which reads the weight
    attention.train().out_proj.__class__ = Doubling
    torch.testing.assert_close(attention(x, x, x)[0], trained, rtol=1e-12, atol=1e-12)


def test_of_an_attention_to_something_else_only_the_output_is_whitened():
    model = nn.TransformerDecoderLayer(WIDTH, HEADS, 16, dropout=0.0, dtype=torch.float64)
    plain = copy.deepcopy(model)
    whiten(model)
    for step in range(12):
        for network in (model, plain):
            network.zero_grad()
            network(inputs(step), inputs(step + 100)).square().sum().backward()
    torch.testing.assert_close(model.multihead_attn.in_proj_weight.grad, plain.multihead_attn.in_proj_weight.grad)
    for other in (lambda one: one.multihead_attn.out_proj, lambda one: one.self_attn.out_proj):
        assert not torch.allclose(other(model).weight.grad, other(plain).weight.grad, rtol=0.1)
    assert not torch.allclose(model.self_attn.in_proj_weight.grad, plain.self_attn.in_proj_weight.grad, rtol=0.1)
    left = report(model).left
    assert left.keys() == {"multihead_attn"} and "has seen no batch" in left["multihead_attn"]


def test_evaluation_state_and_class_are_the_plain_attentions():
    plain = make(batch_first=True)
    twin = whiten(copy.deepcopy(plain))
    x = inputs(0)
    twin(x, x, x)[0].sum().backward()
    assert plain_state_dict(twin).keys() == plain.state_dict().keys()
    with torch.no_grad():  # PyTorch's fast path, which reads the weights
        torch.testing.assert_close(twin.eval()(x, x, x)[0], plain.eval()(x, x, x)[0], rtol=0, atol=0)
    fresh = whiten(make(batch_first=True))
    fresh.load_state_dict(twin.state_dict())
    assert fresh.transform.num_batches_tracked == fresh.out_proj.transform.num_batches_tracked == 1
    unwhiten(twin)
    assert [type(module) for module in twin.modules()] == [type(module) for module in plain.modules()]


def test_made_as_a_layer():
    layer = WhitenedMultiheadAttention(WIDTH, HEADS, batch_first=True, kdim=WIDTH, transform=FeatureWhitening(power=1))
    assert layer.transform.power == layer.out_proj.transform.power == 1
    x = inputs(0).float()
    layer(x, x, x)[0].sum().backward()
    assert layer.transform.num_batches_tracked == 1
    with pytest.raises(ValueError, match=r"kdim=5 is not possible: give None or embed_dim, 12"):
        WhitenedMultiheadAttention(WIDTH, HEADS, kdim=5)


def test_selection_and_what_is_left():
    plain = nn.ModuleDict({"self": make(), "other": make(kdim=5)})
    model = whiten(copy.deepcopy(plain))
    left = report(model).left
    assert left["other"] == "MultiheadAttention, with a kdim or vdim of its own"
    assert left.keys() == {"other", "other.out_proj"} and type(model["other"].out_proj) is type(plain["self"].out_proj)
    model = whiten(copy.deepcopy(plain), skip="self")
    assert not any(hasattr(module, "transform") for module in model.modules())
    model = whiten(copy.deepcopy(plain), include="self")
    assert type(model["self"]) is WhitenedMultiheadAttention
    assert type(model["self"].out_proj) is type(plain["self"].out_proj)
    x = inputs(0)
    model["self"](x, x, x)[0].sum().backward()
    model = whiten(copy.deepcopy(plain), include=nn.MultiheadAttention)
    assert isinstance(model["self"].out_proj, WhitenedLinear)

    class Own(nn.MultiheadAttention):
        pass

    model = whiten(nn.Sequential(nn.Linear(3, 3), Own(WIDTH, HEADS)))
    assert report(model).left["1"] == "Own, a subclass of MultiheadAttention, which may compute otherwise"
    assert not hasattr(model[1].out_proj, "transform")
    model = whiten(copy.deepcopy(plain), include="*.out_proj")
    assert not any(hasattr(module, "transform") for module in model.modules())


@pytest.mark.parametrize("frozen", ["in_proj_weight", "in_proj_bias", "out_proj.weight"])
def test_a_frozen_part_is_neither_transformed_nor_observed(frozen):
    attention = whiten(make(batch_first=True))
    attention.get_parameter(frozen).requires_grad_(False)
    x = inputs(0)
    for _ in range(3):
        attention(x, x, x)[0].square().sum().backward()
    assert attention.get_parameter(frozen).grad is None
    assert attention.transform.num_batches_tracked == (0 if frozen == "in_proj_weight" else 3)
    assert attention.out_proj.transform.num_batches_tracked == (0 if frozen == "out_proj.weight" else 3)


@compilers_may_warn
@each_transform
def test_compiled_it_trains_alike(transform):
    attention = whiten(make(batch_first=True), transform)
    twin = copy.deepcopy(attention)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    for step in range(12):
        x = inputs(step)
        for layer in (attention, compiled):
            layer.zero_grad()
            layer(x, x, x, need_weights=False)[0].square().mean().backward()
    for ours, theirs in zip(twin.parameters(), attention.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-12)
    assert twin.transform.num_batches_tracked == attention.transform.num_batches_tracked >= 4


@compilers_may_warn
def test_a_compiled_pass_for_the_output_alone_does_not_count_for_the_rest():
    attention = whiten(make(batch_first=True))
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    x = inputs(0)
    loss = compiled(x, x, x, need_weights=False)[0].square().mean()
    torch.autograd.grad(loss, attention.out_proj.weight)
    assert (attention.transform.num_batches_tracked, attention.out_proj.transform.num_batches_tracked) == (0, 1)


@compilers_may_warn
@pytest.mark.parametrize("wrong", [(3, 6), (4, 5)])
def test_a_padding_mask_compiled_and_of_a_wrong_shape(wrong):
    plain = make(batch_first=True)
    twin = whiten(copy.deepcopy(plain))
    compiled, x = torch.compile(twin, fullgraph=True, backend="aot_eager"), inputs(0)
    mask = torch.arange(6) > torch.tensor([[3], [4], [5], [6]])
    expected = plain(x, x, x, key_padding_mask=mask)[0]
    torch.testing.assert_close(compiled(x, x, x, key_padding_mask=mask)[0], expected, rtol=1e-12, atol=1e-12)
    messages = []
    for layer in (plain, twin):
        with pytest.raises(AssertionError) as caught:
            layer(x, x, x, key_padding_mask=torch.zeros(wrong) > 0)
        messages.append(str(caught.value).splitlines()[0])
    assert messages[0] == messages[1]


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_it_counts_a_batch_once(reentrant):
    attention, other = (whiten(make(batch_first=True)) for _ in range(2))
    for step in range(12):
        x = inputs(step).requires_grad_()
        for layer in (attention, other):
            layer.zero_grad()
        attention(x, x, x)[0].square().sum().backward()
        checkpoint(lambda x: other(x, x, x)[0], x, use_reentrant=reentrant).square().sum().backward()
    assert other.transform.num_batches_tracked == other.out_proj.transform.num_batches_tracked == 12
    torch.testing.assert_close(other.in_proj_weight.grad, attention.in_proj_weight.grad, rtol=1e-9, atol=1e-12)


def test_a_traced_model_trains_whitened():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = make(batch_first=True)

        def forward(self, x):
            return self.attention(x, x, x, need_weights=False)[0]

    model = whiten(Model())
    graph = torch.fx.symbolic_trace(model)
    (called,) = (node for node in graph.graph.nodes if node.op == "call_module")
    assert called.target == "attention" and called.kwargs["need_weights"] is False
    graph(inputs(0)).sum().backward()
    assert model.attention.transform.num_batches_tracked == 1


def test_pickled_and_copied_it_trains_for_itself():
    attention = whiten(make(batch_first=True))
    x = inputs(0)
    for copied in (copy.deepcopy(attention), pickle.loads(pickle.dumps(attention))):
        copied(x, x, x)[0].sum().backward()
        assert copied.transform.num_batches_tracked == copied.out_proj.transform.num_batches_tracked == 1
    assert attention.transform.num_batches_tracked == 0


def test_under_autocast_and_in_bfloat16():
    attention = whiten(make(batch_first=True).float())
    x = inputs(0).float()
    with torch.autocast("cpu", torch.bfloat16):
        output = attention(x, x, x, need_weights=False)[0]
    output.float().square().sum().backward()
    whole = whiten(make(batch_first=True).bfloat16())
    low = x.bfloat16()
    whole(low, low, low)[0].sum().backward()
    assert attention.transform.num_batches_tracked == whole.transform.num_batches_tracked == 1
    assert whole.in_proj_weight.grad.dtype == torch.bfloat16 and whole.in_proj_weight.grad.isfinite().all()
