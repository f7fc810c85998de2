"""The ways in which people write a call of `whiten`: what is meant happens, or one line says what to write instead."""

import logging
import warnings

import pytest
import torch
from torch import nn

from whiten_layers import (
    Chain,
    FeatureWhitening,
    OptimalInputGain,
    PSIScaling,
    WhitenedConv2d,
    WhitenedLinear,
    convert_batchnorm,
    estimate,
    report,
    unwhiten,
    whiten,
)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.layer1 = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
        self.layer2 = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        self.head = nn.Linear(4, 2)


def whitened(model):
    return {name for name, module in model.named_modules() if isinstance(module, WhitenedLinear | WhitenedConv2d)}


def test_options_of_the_transform():
    model = whiten(Model(), power=1, block_size=2)
    assert model.head.transform.power == 1 and model.stem.transform.block_size == 2
    assert whiten(Model(), "cholesky", power=1.0).head.transform.method == "cholesky"
    gain = whiten(Model(), "optimal_gain", decay=0.5).head.transform
    assert type(gain) is OptimalInputGain and gain.decay == 0.5
    assert estimate(Model(), block_size=1).costs[1].size == 1


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((), {"powr": 1}, TypeError, r"^powr: there is no such option; did you mean 'power'\?$"),
        ((), {"lr": 1}, TypeError, "^lr: there is no such option; give one of method, features, power"),
        (("optimal_gain",), {"power": 1}, TypeError, "^power: there is no such option; give one of damping"),
        ((FeatureWhitening(),), {"power": 1}, TypeError, "^power: give these options to the FeatureWhitening itself"),
        ((), {"included": "head"}, TypeError, r"^included: there is no such option; did you mean 'include'\?$"),
        ((FeatureWhitening(),), {"exclude": "head"}, TypeError, "^exclude: there is no such option"),
        (("eigh",), {"method": "cholesky"}, TypeError, "^method: the transform's name, 'eigh', is one already"),
        ((nn.Linear,), {}, TypeError, "is not possible: give a GradientTransform, a name, or None"),
        ((FeatureWhitening,), {}, TypeError, r"is not possible: give FeatureWhitening\(\)$"),
        (("cholesky",), {}, ValueError, "power=0.5 is not possible: give power=1, as 'cholesky' needs it"),
        (("kfac",), {}, ValueError, "transform='kfac' is not possible: give one of optimal_gain, eigenbasis, auto"),
        ((), {"power": 2}, ValueError, "power=2 is not possible"),
        (
            (),
            {"skip": "layer1"},
            ValueError,
            r"^skip='layer1' matches no .*: give 'layer1\.\*' for all within 'layer1'$",
        ),
        ((), {"include": "layer3"}, ValueError, r"^include='layer3' matches no .*: there are stem, layer1\.0"),
        ((), {"include": nn.Conv3d}, ValueError, "^include=Conv3d matches no layer"),
        ((), {"skip": nn.Linear(2, 2)}, ValueError, "^skip=Linear matches no layer"),
        ((), {"skip": [3]}, TypeError, "^skip=3 is not possible: give names as glob patterns, modules, or types"),
        ((), {"include": int}, TypeError, "^include=int is not possible"),
        ((), {"psi": "layer1"}, ValueError, r"^psi='layer1' matches no .*: give 'layer1\.\*'"),
    ],
)
def test_what_is_not_possible_says_what_is(arguments, options, error, message):
    model = Model()
    with pytest.raises(error, match=message):
        whiten(model, *arguments, **options)
    assert whitened(model) == set()


@pytest.mark.parametrize("call", [whiten, unwhiten, report, estimate, lambda m: convert_batchnorm(m, "swbn")])
@pytest.mark.parametrize("model", [None, list(nn.Linear(2, 2).parameters()), nn.Linear])
def test_what_is_no_model(call, model):
    with pytest.raises(TypeError, match=r"^model is of type \w+: give an nn\.Module, the model itself"):
        call(model)


@pytest.mark.parametrize(
    ("select", "expected"),
    [
        (lambda m: {"include": m.head}, {"head"}),
        (lambda m: {"include": [m.layer1, "head"]}, {"layer1.0", "layer1.2", "head"}),
        (lambda m: {"include": m.layer1}, {"layer1.0", "layer1.2"}),
        (lambda m: {"include": nn.Conv2d}, {"stem"}),
        (lambda m: {"include": nn.Sequential}, {"layer1.0", "layer1.2", "layer2.0"}),
        (lambda m: {"skip": nn.Linear}, {"stem"}),
        (lambda m: {"skip": (nn.Conv2d, m.layer2, "head")}, {"layer1.0", "layer1.2"}),
        (lambda m: {"include": nn.Linear, "skip": [m.layer1[0]]}, {"layer1.2", "layer2.0", "head"}),
        (lambda m: {"include": (name for name in ("stem", "head"))}, {"stem", "head"}),
    ],
)
def test_modules_and_types_select_what_is_within_them(select, expected):
    model = Model()
    assert whitened(whiten(model, **select(model))) == expected


def test_normalizations_are_selected_alike():
    model = Model()
    convert_batchnorm(model, "swbn", skip=model.layer1)
    assert type(model.layer1[1]) is nn.BatchNorm1d and type(model.layer2[1]) is not nn.BatchNorm1d
    with pytest.raises(ValueError, match="skip='layer1' matches no batch normalization: give"):
        convert_batchnorm(Model(), "swbn", skip="layer1")


def test_psi_takes_modules():
    model = Model()
    whiten(model, psi=[model.layer1[0]])
    assert type(model.layer1[0].transform) is Chain and type(model.layer1[2].transform) is FeatureWhitening


def test_options_given_again_are_warned_of_where_they_differ():
    model = whiten(Model())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whiten(model)
        whiten(model, FeatureWhitening())
        whiten(model, power=0.5, center=None)
        whiten(model, FeatureWhitening(power=1), include=[unwhiten(model.head)])
        unwhiten(model.stem)
        whiten(model, power=1)  # what was left
        assert model.stem.transform.power == 1 and model.layer1[0].transform.power == 0.5
    with pytest.warns(UserWarning, match=r"kept as they were: layer1.0, layer1.2, layer2.0: unwhiten") as seen:
        whiten(model, power=1)
    assert len(seen) == 1 and seen[0].filename == __file__
    with pytest.warns(UserWarning, match=r"stem, layer1.0, layer1.2, layer2.0, head: unwhiten"):
        whiten(model, Chain(FeatureWhitening(), PSIScaling()))
    many = whiten(nn.Sequential(*(nn.Linear(2, 2) for _ in range(7))))
    with pytest.warns(UserWarning, match="0, 1, 2, 3, 4, and 2 more: unwhiten"):
        whiten(many, power=1)


def test_a_call_for_psi_is_compared_with_what_it_makes():
    model = Model()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whiten(model, "eigh", psi="layer1.*")
        whiten(model, "eigh", psi="layer1.*")
    with pytest.warns(UserWarning, match=r"kept as they were: layer2.0: unwhiten"):
        whiten(model, "eigh", psi=["layer1.*", model.layer2])


def test_options_that_are_tensors_are_compared():
    class Scaled(FeatureWhitening):
        def __init__(self, strengths):
            super().__init__()
            self.strengths = strengths

    model = whiten(Model(), Scaled(torch.ones(3)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whiten(model, Scaled(torch.ones(3)))
    with pytest.warns(UserWarning, match="kept as they were"):
        whiten(model, Scaled(torch.zeros(3)))


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_layer_without_features_is_never_whitened_and_hides_no_warning():
    model = whiten(nn.Sequential(nn.Linear(3, 3), nn.Linear(0, 3)), power=1)
    with pytest.warns(UserWarning, match="kept as they were: 0: unwhiten"):
        whiten(model, power=0.5)


def test_parametrized_layers_count_as_whitened(caplog):
    model = whiten(nn.Sequential(nn.Linear(30, 30), nn.Linear(30, 2)))
    nn.utils.parametrizations.weight_norm(model[0])
    with caplog.at_level(logging.INFO, logger="whiten_layers"):
        whiten(model)
    assert "whitened 2 of 2 layers, 100 % of the parameters that train" in caplog.text


def test_an_estimate_says_nothing_and_takes_the_model_s_own_modules(caplog):
    model = Model()
    with warnings.catch_warnings(), caplog.at_level(logging.INFO, logger="whiten_layers"):
        warnings.simplefilter("error")
        by_module = estimate(model, include=[model.layer1, nn.Conv2d], skip=model.layer1[0], psi=model.layer1[2])
        assert not caplog.records
        assert {cost.layer for cost in by_module.costs} == {"stem", "layer1.2"} and not whitened(model)
        estimate(whiten(model), power=1)


def test_layers_that_are_not_initialised_are_left():
    model = whiten(nn.Sequential(nn.LazyLinear(3), nn.LazyBatchNorm1d(), nn.Linear(3, 2)))
    assert type(model[2]) is WhitenedLinear and len(estimate(model).costs) == 1


@pytest.mark.parametrize(
    ("make", "options", "level", "message"),
    [
        (Model, {}, logging.INFO, "whitened 5 of 5 layers, 92 % of the parameters that train"),
        (Model, {"include": "head"}, logging.INFO, "whitened 1 of 5 layers, 5 % of the parameters that train"),
        (
            lambda: nn.Sequential(nn.Embedding(100, 4), nn.Linear(4, 4)),
            {},
            logging.WARNING,
            "whitened 1 of 2 layers, 5 % of the parameters that train; report(model).left says why",
        ),
        (nn.ReLU, {}, logging.INFO, "whitened 0 of 0 layers, 0 % of the parameters that train"),
    ],
)
def test_how_much_is_whitened_is_told(make, options, level, message, caplog):
    with caplog.at_level(logging.INFO, logger="whiten_layers"):
        whiten(make(), **options)
    (told,) = [record for record in caplog.records if record.getMessage().startswith("whitened")]
    assert told.getMessage() == message and told.levelno == level


@pytest.mark.parametrize(("frozen", "level"), [(("0",), logging.INFO), (("0", "2"), logging.WARNING)])
def test_what_is_kept_for_frozen_layers_is_told(frozen, level, caplog):
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    for name in frozen:
        model.get_submodule(name).requires_grad_(False)
    with caplog.at_level(logging.INFO, logger="whiten_layers"):
        whiten(model)
    share, told = (record.getMessage() for record in caplog.records)
    assert share == "whitened 3 of 3 layers, 100 % of the parameters that train"
    assert caplog.records[1].levelno == level
    assert told.startswith(f"frozen, and whitened all the same, at 0.0 MiB: {', '.join(frozen)}. If they stay so")


@pytest.mark.parametrize("convert", [whiten, lambda model: convert_batchnorm(model, "decorrelated")])
def test_a_conversion_in_inference_mode_makes_state_that_trains(convert):
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    with torch.inference_mode():
        convert(model)
    for _ in range(3):
        model(torch.randn(8, 4)).square().sum().backward()
    with torch.no_grad():
        convert(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))
        assert not torch.is_grad_enabled()


def test_data_parallel_trains_no_whitened_layer():
    layer = WhitenedLinear(3, 2)
    with pytest.raises(RuntimeError, match="DataParallel cannot train whitened layers"):
        layer._replicate_for_data_parallel()  # as nn.DataParallel does for each of several devices
    layer.eval()._replicate_for_data_parallel()
    WhitenedLinear(3, 2).requires_grad_(False)._replicate_for_data_parallel()
    with torch.no_grad():
        layer.train()._replicate_for_data_parallel()
