"""The twin of GPT-2's linear layer, whose weight has its inputs first."""

import copy
import pickle

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from whiten_layers import Chain, EigenbasisScaling, FeatureWhitening, PSIScaling, report, unwhiten, whiten
from whiten_layers.hugging_face import WhitenedConv1D

TRANSFORMS = {
    "inputs": FeatureWhitening(),
    "both sides": FeatureWhitening(output_power=0.5, block_size=4),
    "exact": FeatureWhitening.exact(),
    "centred": FeatureWhitening(center=True),
    "chain": Chain(FeatureWhitening(), PSIScaling()),
    "eigenbasis": EigenbasisScaling(),
    "gain": "optimal_gain",
}


@pytest.mark.parametrize("rows", [(5,), (40, 3)], ids=["few rows", "sequences"])  # few: the samples are whitened
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS.keys())
def test_it_trains_as_the_linear_layer_does(transform, rows):
    torch.manual_seed(0)
    given, linear = Conv1D(30, 8).double(), nn.Linear(8, 30).double()
    with torch.no_grad():
        linear.weight.copy_(given.weight.T)
        linear.bias.copy_(given.bias)
    layers = whiten(given, transform), whiten(linear, transform)
    optimizers = [torch.optim.AdamW(layer.parameters(), 0.01) for layer in layers]
    for step in range(32):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(*rows, 8, generator=generator).double().cumsum(-1) + 0.3
        target = torch.randn(*rows, 30, generator=generator).double()
        outputs = []
        for layer, optimizer in zip(layers, optimizers, strict=True):
            optimizer.zero_grad()
            outputs.append(layer(x))
            (outputs[-1] - target).square().mean().backward()
            if step >= 8:  # then rows have been seen in all directions: eigenvectors of equal eigenvalues may be any
                optimizer.step()
        torch.testing.assert_close(*outputs, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(given.weight.grad.T, linear.weight.grad, rtol=1e-7, atol=1e-12)
        torch.testing.assert_close(given.bias.grad, linear.bias.grad, rtol=1e-7, atol=1e-12)
    assert given.transform.num_batches_tracked == linear.transform.num_batches_tracked >= 5


def test_gpt2_is_whitened_whole_and_trains():
    torch.manual_seed(0)
    ids = {"bos_token_id": 1, "eos_token_id": 1}
    plain = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2, **ids))
    model = whiten(copy.deepcopy(plain))
    layers = [module for module in model.modules() if type(module) is WhitenedConv1D]
    assert len(layers) == 8 and not any("Conv1D" in reason for reason in report(model).left.values())
    tokens = torch.randint(0, 50, (2, 8))
    losses = []
    for network in (plain, model):
        torch.manual_seed(1)
        losses.append(network(tokens, labels=tokens).loss)
        losses[-1].backward()
    torch.testing.assert_close(*losses, rtol=0, atol=0)
    assert all(layer.transform.num_batches_tracked == 1 for layer in layers)
    copied = pickle.loads(pickle.dumps(model))
    copied(tokens, labels=tokens).loss.backward()
    assert layers[0].transform.num_batches_tracked == 1
    assert [type(module) for module in unwhiten(model).modules()] == [type(module) for module in plain.modules()]
    model.load_state_dict(plain.state_dict())


def test_made_as_a_layer_and_traced():
    layer = WhitenedConv1D(30, 8, transform=FeatureWhitening(power=1.0))
    graph = torch.fx.symbolic_trace(nn.Sequential(layer, nn.ReLU()))
    graph(torch.randn(4, 8)).sum().backward()
    assert layer.transform.num_batches_tracked == 1 and layer.transform.power == 1
