"""whiten and unwhiten: the same objects, the same parameters, and nothing converted that should not be."""

import copy
import logging
from collections import OrderedDict

import pytest
import torch
import torchvision
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import nn

from whiten_layers import FeatureWhitening, WhitenedConv2d, WhitenedLinear, report, unwhiten, whiten


class OwnForward(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.block = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 1, bias=False))
        self.again = self.block[0]  # shared
        self.odd = OwnForward(4, 4, 1)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.odd(self.again(self.norm(self.block(self.stem(x))))).mean((2, 3)))


def kinds(model):
    return {
        name: type(module) for name, module in model.named_modules(remove_duplicate=False) if "transform" not in name
    }


def test_layers_are_converted_in_place_with_everything_they_have():
    model = Model().double().eval()
    model.head.weight.requires_grad_(False)
    model.stem.note = "kept"
    calls = []
    model.stem.register_forward_hook(lambda *_: calls.append(1))
    parameters, modules = dict(model.named_parameters()), dict(model.named_modules(remove_duplicate=False))
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    before = model(x)
    assert whiten(model) is model
    torch.testing.assert_close(model(x), before, rtol=0, atol=0)
    assert calls == [1, 1] and model.stem.note == "kept"
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert all(
        module is modules[name] for name, module in model.named_modules(remove_duplicate=False) if name in modules
    )
    assert type(model.stem) is WhitenedConv2d and type(model.head) is WhitenedLinear
    assert model.again is model.block[0] and type(model.again) is WhitenedConv2d
    assert not model.stem.training and not model.stem.transform.training
    assert model.stem.transform.inputs.precision.dtype == torch.float64


def test_unwhiten_gives_the_plain_model_back():
    model = Model()
    expected, keys = kinds(model), set(model.state_dict())
    parameters = dict(model.named_parameters())
    whiten(model)
    assert kinds(model) != expected and set(model.state_dict()) > keys
    assert unwhiten(model) is model
    assert kinds(model) == expected and set(model.state_dict()) == keys
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert not any("transform" in name for name, _ in model.named_modules())


def test_an_optimizer_built_before_goes_on():
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    whiten(model)
    model(torch.randn(4, 3, 8, 8)).square().sum().backward()
    optimizer.step()
    assert all(not torch.equal(before[name], parameter) for name, parameter in model.named_parameters())


@pytest.mark.parametrize(
    "options, converted",
    [
        ({"include": "block.*"}, {"block.0", "block.2", "again"}),
        ({"include": ["stem", "head"]}, {"stem", "head"}),
        ({"skip": "*.2"}, {"stem", "block.0", "again", "head"}),
        ({"skip": "again"}, {"stem", "block.2", "head"}),  # shared: under any of its names
        ({"include": "block.*", "skip": ("*.0", "head")}, {"block.2"}),
    ],
)
def test_include_and_skip(options, converted):
    model = whiten(Model(), **options)
    assert {name for name, kind in kinds(model).items() if kind in (WhitenedConv2d, WhitenedLinear)} == converted


@pytest.mark.parametrize("option", ["include", "skip"])
def test_a_pattern_that_matches_nothing_is_an_error(option):
    with pytest.raises(
        ValueError, match=rf"{option}='layer9\.\*' matches no layer that can be whitened: there are stem, block"
    ):
        whiten(Model(), **{option: ["stem", "layer9.*"]})


def test_what_is_left_alone_is_named_with_the_reason(caplog):
    model = Model()
    model.lazy = nn.LazyLinear(3)
    model.attention = nn.MultiheadAttention(4, 2)
    model.embedding = nn.Embedding(5, 4)
    with caplog.at_level(logging.INFO, logger="whiten_layers"):
        whiten(model, include=["stem", "head", "block.*"], skip="head")
    told = {record.getMessage() for record in caplog.records}
    assert "left odd: OwnForward, a subclass of Conv2d, which may compute otherwise" in told
    assert "left head: Linear, not asked for" in told
    assert "left lazy: LazyLinear, not initialised yet" in told
    assert "left embedding: Embedding, whose covariance is diagonal: what an adaptive optimizer does already" in told
    assert "left attention: MultiheadAttention, not asked for" in told
    assert not any("norm" in line or "stem" in line for line in told)
    assert type(model.odd) is OwnForward


def test_a_single_layer_is_a_model_too():
    layer = nn.Linear(4, 3)
    assert whiten(layer) is layer and type(layer) is WhitenedLinear
    assert type(unwhiten(layer)) is nn.Linear


def test_whitening_twice_keeps_the_state():
    model = whiten(Model())
    model(torch.randn(4, 3, 8, 8)).sum().backward()
    transform = model.stem.transform
    with pytest.warns(UserWarning, match="whitened already, and kept as they were: stem"):
        whiten(model, FeatureWhitening(power=1.0))
    assert model.stem.transform is transform and transform.num_batches_tracked == 1


def test_a_class_of_the_users_own_from_a_twin_is_not_unwhitened():
    class Mine(WhitenedLinear):
        pass

    with pytest.raises(ValueError, match="head is a Mine, made from a whitened layer: unwhiten the layer before"):
        unwhiten(nn.Sequential(OrderedDict(head=Mine(3, 2))))


def test_two_transforms_in_two_calls():
    model = whiten(Model(), FeatureWhitening(power=1.0), include="block.*")
    whiten(model, skip="block.*")
    assert model.block[0].transform.power == 1.0 and model.stem.transform.power == 0.5


def test_each_layer_gets_its_own_transform():
    given = FeatureWhitening(power=1.0)
    model = whiten(Model(), given)
    transforms = [
        module.transform for module in model.modules() if isinstance(module, (WhitenedConv2d, WhitenedLinear))
    ]
    assert len({id(transform) for transform in transforms}) == len(transforms) == 4
    assert given not in transforms and all(transform.power == 1.0 for transform in transforms)


def test_a_torchvision_network():
    torch.manual_seed(0)
    plain = torchvision.models.resnet18(num_classes=5)
    model = whiten(copy.deepcopy(plain))
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(model.eval()(x), plain.eval()(x), rtol=0, atol=0)
    model.train()(x).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    unwhiten(model).load_state_dict(plain.state_dict(), strict=True)


@pytest.mark.parametrize("given", [False, True])
def test_a_network_that_trains_in_evaluation_mode_is_whitened_if_asked_for(given):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(2)]
    attention = nn.MultiheadAttention(4, 2, dropout=0.5, batch_first=True)
    plain = nn.ModuleList([nn.Sequential(*layers), attention, nn.Linear(4, 3)]).eval()
    model = whiten(copy.deepcopy(plain), in_evaluation=given)
    outputs = []
    for step in range(12):
        x = torch.randn(5, 3, 6, 6, generator=torch.Generator().manual_seed(step)).cumsum(2)
        for network in (plain, model):
            network.zero_grad()
            hidden = network[0](x).transpose(1, 2)
            outputs.append(network[2](network[1](hidden, hidden, hidden)[0]))  # without dropout
            outputs[-1].square().sum().backward()
        torch.testing.assert_close(*outputs[-2:], rtol=1e-5, atol=1e-6)
    named = {name: parameter.grad for name, parameter in plain.named_parameters() if parameter.dim() > 1}
    for name, gradient in named.items():
        assert torch.allclose(model.get_parameter(name).grad, gradient, rtol=1e-3) != given, name
    assert model[2].transform.num_batches_tracked == (12 if given else 0)
    with torch.no_grad():
        hidden = torch.randn(5, 7, 4)
        torch.testing.assert_close(model[1](hidden, hidden, hidden)[0], plain[1](hidden, hidden, hidden)[0])
    if not given:
        assert "The model is in evaluation mode, where whitened layers are plain" in str(report(model))
        model[2].train()
        model[2](torch.randn(5, 4)).sum().backward()
        reason = "which has seen no batch: frozen, unused, used as a function, or in evaluation mode"
        assert report(model).left["0.0"] == f"WhitenedConv2d, {reason}"
        assert report(model).left["1"].startswith("WhitenedMultiheadAttention, which has seen no batch: query, key and")
    assert "in_evaluation" not in vars(unwhiten(model)[2])


def test_what_in_evaluation_takes():
    with pytest.raises(ValueError, match="in_evaluation='yes' is not possible: give True, False or None"):
        whiten(nn.Linear(3, 2), in_evaluation="yes")
    model = whiten(nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)))
    whiten(model, include="1", in_evaluation=True)
    assert [layer.in_evaluation for layer in model] == [False, True]
    assert [layer.in_evaluation for layer in whiten(model)] == [False, True]
    assert [layer.in_evaluation for layer in whiten(model, in_evaluation=False)] == [False, False]


def test_a_norm_that_stays_in_evaluation_mode_cancels_no_scale():
    def make():
        return nn.Sequential(nn.Linear(4, 3, bias=False), nn.BatchNorm1d(3)).eval()

    assert len(whiten(make(), psi=True)[0].transform.parts()) == 3
    with pytest.raises(ValueError, match="psi=True finds no layer"):
        whiten(make(), psi=True, in_evaluation=True)


def test_tracing_alone_in_evaluation_mode_is_the_same_error_as_in_training():
    layer = whiten(nn.Linear(3, 3).eval(), in_evaluation=True)
    with pytest.raises(RuntimeError, match=r"torch\.fx cannot trace a WhitenedLinear alone in training mode"):
        torch.fx.symbolic_trace(layer)


def test_a_layer_whose_forward_was_replaced_is_left_and_one_that_gets_a_hook_later_is_not():
    def make():
        return nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))

    model = make()
    add_hook_to_module(model[0], ModelHook())
    assert whiten(model) is model and type(model[0]) is nn.Linear and type(model[1]) is WhitenedLinear
    reason = "whose forward was replaced, by a hook of accelerate for instance: whiten it before"
    assert report(model).left == {"0": f"Linear, {reason}"}
    model = whiten(make())
    add_hook_to_module(model[0], ModelHook())
    model(torch.randn(4, 6)).sum().backward()
    assert model[0].transform.num_batches_tracked == 1
    assert whiten(model)[0].transform.num_batches_tracked == 1


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
@pytest.mark.parametrize("first", ["whitening", "weight_norm"])
def test_the_older_weight_norm_trains_whitened(first):
    """It computes the weight in a hook, and sets it as an attribute."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))
    model = copy.deepcopy(plain)
    nn.utils.weight_norm(plain[0])
    if first == "whitening":
        whiten(model)
    nn.utils.weight_norm(model[0])
    whiten(model)
    for step in range(12):
        x = torch.randn(20, 6, generator=torch.Generator().manual_seed(step)).cumsum(-1)
        for network in (plain, model):
            network.zero_grad()
            network(x).square().sum().backward()
    assert model[0].transform.num_batches_tracked == 12
    assert not torch.allclose(model[0].weight_v.grad, plain[0].weight_v.grad, rtol=0.05)
    torch.testing.assert_close(model[1].bias.grad, plain[1].bias.grad)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(state)
    torch.testing.assert_close(dict(model.state_dict()), state, rtol=0, atol=0)
