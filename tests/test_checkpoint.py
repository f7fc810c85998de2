"""State dicts: a plain checkpoint loads, a run goes on bit for bit, a foreign one is an error."""

import io
import math
import warnings

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn

from whiten_layers import (
    Chain,
    FeatureWhitening,
    OptimalInputGain,
    WhitenedConv2d,
    WhitenedLinear,
    convert_batchnorm,
    plain_state_dict,
    unwhiten,
    whiten,
)

TRANSFORMS = {
    "default": FeatureWhitening(statistics_interval=3, update_interval=3, max_rows=50),
    "rarer statistics": FeatureWhitening(statistics_interval=4, update_interval=2),
    "exact": FeatureWhitening.exact(),
    "both sides": FeatureWhitening(output_power=0.5, decay=0.8, max_rows=20, statistics_interval=10),
    "recursive": FeatureWhitening("recursive", features="patch", power=1.0, rank=3, update_interval=3),
    "recursive root in blocks": FeatureWhitening("recursive", rank=2, block_size=3, update_interval=3),
    "Newton–Schulz": FeatureWhitening("newton_schulz", power=1.0, damping=1.0, update_interval=3),
}
each_transform = pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS.keys())


def plain():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 4, 3, groups=2),
        nn.Flatten(),
        nn.Linear(64, 5),
    )


def steps(model, optimizer, numbers):
    for number in numbers:
        x = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(number))
        optimizer.zero_grad()
        F.cross_entropy(model(x), torch.arange(8) % 5).backward()
        optimizer.step()


def test_what_an_earlier_version_did_not_save_starts_afresh():
    model = whiten(plain(), FeatureWhitening(output_power=0.5))
    steps(model, torch.optim.SGD(model.parameters(), 0.02), range(8))
    fresh = whiten(plain(), FeatureWhitening(output_power=0.5))
    start = {name: value.clone() for name, value in fresh.state_dict().items()}
    newer = [name for name in start if "norms." in name or "bounded" in name or "effective" in name]
    old = {name: value.clone() for name, value in model.state_dict().items() if name not in newer}
    fresh.load_state_dict(old, strict=True)
    state = fresh.state_dict()
    assert any("norms." in name for name in newer) and all(torch.equal(state[name], old[name]) for name in old)
    for name in newer:
        # All rows of a covariance count, until the first of the new version are seen.
        expected = old.get(name.replace("_effective", ""), start[name])
        torch.testing.assert_close(state[name], expected, rtol=0, atol=0)
    steps(fresh, torch.optim.SGD(fresh.parameters(), 0.02), range(8, 20))


@each_transform
def test_save_load_and_go_on_is_the_run_that_was_not_interrupted(transform):
    whole = whiten(plain(), transform)
    optimizer = torch.optim.SGD(whole.parameters(), 0.02, momentum=0.9)
    steps(whole, optimizer, range(7))
    file = io.BytesIO()
    torch.save({"model": whole.state_dict(), "optimizer": optimizer.state_dict()}, file)
    steps(whole, optimizer, range(7, 40))

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = whiten(plain(), transform)
    optimizer = torch.optim.SGD(resumed.parameters(), 0.02, momentum=0.9)
    resumed.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    steps(resumed, optimizer, range(7, 40))
    torch.testing.assert_close(dict(resumed.state_dict()), dict(whole.state_dict()), rtol=0, atol=0)
    assert resumed[0].transform.num_batches_tracked == 40


@each_transform
def test_safetensors_keep_a_state_dict_bit_for_bit(transform, tmp_path):
    model = whiten(plain(), transform)
    steps(model, torch.optim.SGD(model.parameters(), 0.02), range(7))
    safetensors.torch.save_model(model, tmp_path / "model.safetensors")
    loaded = whiten(plain(), transform)
    missing, unexpected = safetensors.torch.load_model(loaded, tmp_path / "model.safetensors")
    assert not missing and not unexpected
    torch.testing.assert_close(dict(loaded.state_dict()), dict(model.state_dict()), rtol=0, atol=0)


@each_transform
@pytest.mark.parametrize("assign", [False, True])
def test_a_plain_checkpoint_loads_strictly_and_leaves_the_state(transform, assign):
    model = whiten(plain(), transform)
    steps(model, torch.optim.SGD(model.parameters(), 0.05), range(3))
    before = {name: value.clone() for name, value in model.state_dict().items() if ".transform." in name}
    checkpoint = {name: value + 1 for name, value in plain().state_dict().items()}
    keys = set(checkpoint)
    model.load_state_dict(checkpoint, strict=True, assign=assign)
    assert set(checkpoint) == keys  # the caller's dict is the caller's
    after = model.state_dict()
    torch.testing.assert_close({name: after[name] for name in checkpoint}, checkpoint, rtol=0, atol=0)
    torch.testing.assert_close({name: after[name] for name in before}, before, rtol=0, atol=0)


def test_an_unwhitened_models_checkpoint_is_a_plain_one():
    model = whiten(plain())
    steps(model, torch.optim.SGD(model.parameters(), 0.05), range(3))
    network = plain()
    network.load_state_dict(unwhiten(model).state_dict(), strict=True)


@pytest.mark.parametrize(
    "wrap", [lambda model: model, torch.compile, nn.Sequential], ids=["itself", "compiled", "inside"]
)
def test_a_plain_state_dict_is_the_plain_networks_and_the_model_trains_on(wrap):
    model, network = wrap(whiten(plain(), FeatureWhitening(output_power=0.5))), wrap(plain())
    state = plain_state_dict(model)
    assert list(state) == list(network.state_dict()) and len(model.state_dict()) > len(state)
    assert all(value.data_ptr() == model.state_dict()[key].data_ptr() for key, value in state.items())
    network.load_state_dict(state, strict=True)
    layers = [module for module in model.modules() if isinstance(module, WhitenedConv2d | WhitenedLinear)]
    assert len(layers) == 3


def test_a_chain_takes_the_state_of_its_member_alone():
    model, other = whiten(plain()), whiten(plain(), Chain(FeatureWhitening(), OptimalInputGain()))
    steps(model, torch.optim.SGD(model.parameters(), 0.02), range(6))
    with pytest.warns(UserWarning, match="other options"):
        other.load_state_dict(model.state_dict(), strict=True)
    assert other[0].transform.schedule.batch == other[0].transform.num_batches_tracked == 6


def test_a_plain_state_dict_of_a_layer_under_two_names():
    layer = WhitenedLinear(4, 4)
    model = nn.ModuleDict({"one": layer, "other": nn.Sequential(layer), "free": nn.Linear(4, 4)})
    assert list(plain_state_dict(model)) == [
        f"{name}.{own}" for name in ("one", "other.0", "free") for own in ("weight", "bias")
    ]


@pytest.mark.parametrize(
    "transform",
    [FeatureWhitening(output_power=0.5), "recursive", Chain(FeatureWhitening(), OptimalInputGain(update_interval=2))],
    ids=["both sides", "recursive", "chain"],
)
@pytest.mark.parametrize("norm", [None, "iter_norm", "decorrelated", "swbn"])
def test_a_whole_model_loads_as_torch_load_does_by_default(transform, norm):
    """With ``weights_only=True``, where the classes of the plain model are allowed; and goes on as it would have."""
    model = whiten(plain(), transform)
    if norm is not None:
        convert_batchnorm(model, norm)
    steps(model, torch.optim.SGD(model.parameters(), 0.02), range(4))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    with torch.serialization.safe_globals([nn.Sequential, nn.BatchNorm2d, nn.ReLU, nn.Flatten]):
        loaded = torch.load(file)
    for one in (model, loaded):
        steps(one, torch.optim.SGD(one.parameters(), 0.02), range(4, 12))
    torch.testing.assert_close(dict(loaded.state_dict()), dict(model.state_dict()), rtol=0, atol=0)


def of_part(state, name):
    return {key: value for key, value in state.items() if f".{name}." in key}


@pytest.mark.parametrize(
    ("saved", "loaded", "taken", "afresh"),
    [
        ({"output_power": 0.5}, {}, ["channels", "taps", "inputs", "norms"], ["outputs"]),
        ({}, {"output_power": 0.5}, ["channels", "taps", "inputs", "norms"], ["outputs"]),
        ({}, {"power": 1.0}, ["channels", "taps", "inputs", "norms"], []),
        ({}, {"block_size": 2}, ["taps", "norms"], ["inputs"]),
        ({"features": "auto"}, {}, ["norms"], ["channels", "taps"]),
        ({"bound": None, "rescale": False}, {}, ["channels", "taps", "inputs"], ["norms"]),
        ({"method": "recursive", "rank": 2}, {"method": "eigh"}, ["taps", "norms"], []),
    ],
)
def test_of_a_checkpoint_with_other_options_what_fits_is_taken(saved, loaded, taken, afresh):
    options = [{"features": "kronecker"} | given for given in (saved, loaded)]
    model, other = (whiten(plain(), FeatureWhitening(**given)) for given in options)
    steps(model, torch.optim.SGD(model.parameters(), 0.02), range(12))
    state, fresh = model.state_dict(), {key: value.clone() for key, value in other.state_dict().items()}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        other.load_state_dict(state, strict=True)
    found = other.state_dict()
    for name in taken:
        expected = {key: value for key, value in of_part(state, name).items() if key in found}
        torch.testing.assert_close(of_part(found, name), expected, rtol=0, atol=0)
    for name in afresh:
        torch.testing.assert_close(of_part(found, name), of_part(fresh, name), rtol=0, atol=0)
    texts = {str(one.message) for one in caught}
    assert len(texts) <= 2 and all("made with other options" in text for text in texts)
    assert (set(afresh) <= {"norms"}) or texts  # the first version had no norms
    assert other[0].transform.num_batches_tracked == 12
    steps(other, torch.optim.SGD(other.parameters(), 0.02), range(12, 30))
    assert all(value.isfinite().all() for value in other.state_dict().values())


MIXES = {
    "mean": lambda a, b: {key: (a[key] + b[key]) / 2 for key in a},
    "a tenth of the way": lambda a, b: {key: a[key] + 0.1 * (b[key] - a[key]) for key in a},
    "beyond both": lambda a, b: {key: a[key] + 1.5 * (b[key] - a[key]) for key in a},
    "in place": lambda a, b: {key: a[key].clone().mul_(0.9).add_(b[key], alpha=0.1) for key in a},
    "half precision": lambda a, b: {key: value.half() for key, value in a.items()},
    "bfloat16": lambda a, b: {key: value.bfloat16() for key, value in a.items()},
}


@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
@each_transform
def test_averages_and_casts_of_state_dicts_load_and_train_on(transform, mix):
    """As those of a plain network do; here without batch normalization, whose count of batches is an integer."""

    def made(seeds):
        model = whiten(nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(216, 5)), transform)
        model.load_state_dict(start, strict=True)
        steps(model, torch.optim.SGD(model.parameters(), 0.02), seeds)
        return model

    torch.manual_seed(0)
    start = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(216, 5)).state_dict()
    first, second = made(range(12)), made(range(12, 27))
    mixed = mix(first.state_dict(), second.state_dict())
    assert all(value.is_floating_point() for value in mixed.values())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        first.load_state_dict(mixed, strict=True)
    if mix is MIXES["beyond both"]:  # where a count may become negative, and its statistics start afresh
        assert all("wrong sign" in str(one.message) for one in caught)
    else:
        assert not caught and 10 <= first[0].transform.num_batches_tracked <= 17
        state = dict(first.state_dict())
        numbers = {key: (state.pop(key), mixed.pop(key)) for key in list(state) if key.endswith("_extra_state")}
        torch.testing.assert_close(state, {key: value.float() for key, value in mixed.items()}, rtol=0, atol=0)
        assert all(torch.equal(one, other.double().round()) for one, other in numbers.values())
    steps(first, torch.optim.SGD(first.parameters(), 0.02), range(30, 50))
    state = first.state_dict()
    assert all(value.isfinite().all() for value in state.values())
    assert mix is MIXES["beyond both"] or not any(state[key] for key in state if key.endswith("failed"))


@pytest.mark.parametrize("key", ["running_covariance", "running_count", "precision", "scale", "limit"])
@pytest.mark.parametrize("value", [torch.inf, torch.nan, -1.0])
def test_state_that_cannot_be_starts_afresh(key, value):
    """As in half precision, where counts beyond 65,504 are infinite, or as in a difference of two states."""
    model, other = whiten(plain()), whiten(plain())
    steps(model, torch.optim.SGD(model.parameters(), 0.02), range(12))
    state = model.state_dict()
    spoilt = [name for name in state if name.startswith("0.") and name.endswith(f".{key}")]
    state = {name: torch.full_like(one, value) if name in spoilt else one for name, one in state.items()}
    fresh = {name: one.clone() for name, one in other.state_dict().items()}
    with pytest.warns(UserWarning, match="not finite or have the wrong sign"):
        other.load_state_dict(state, strict=True)
    parts = [f"{name.rpartition('.')[0]}." for name in spoilt]
    expected = {name: fresh[name] if name.startswith(tuple(parts)) else one for name, one in state.items()}
    assert parts
    torch.testing.assert_close(dict(other.state_dict()), expected, rtol=0, atol=0)
    steps(other, torch.optim.SGD(other.parameters(), 0.02), range(12, 30))


def test_of_a_part_of_a_state_dict_that_part_is_taken():
    model, other = whiten(plain()), whiten(plain())
    steps(model, torch.optim.SGD(model.parameters(), 0.02), range(12))
    part = {name: value for name, value in model.state_dict().items() if name.endswith(".precision")}
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.warns(UserWarning, match="what does not fit starts afresh"):
        missing, unexpected = other.load_state_dict(part, strict=False)
    assert part and not unexpected and "0.transform.inputs.running_count" in missing
    torch.testing.assert_close(dict(other.state_dict()), before | part, rtol=0, atol=0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_counts_that_are_not_finite_are_not_taken(value):
    model = whiten(plain())
    steps(model, torch.optim.SGD(model.parameters(), 0.02), range(12))
    before = model[0].transform.get_extra_state()
    model[0].transform.set_extra_state(torch.full_like(before, value))
    torch.testing.assert_close(model[0].transform.get_extra_state(), before, rtol=0, atol=0)


def test_a_checkpoint_of_one_layer():
    layer = WhitenedLinear(4, 3)
    layer(torch.randn(9, 4)).sum().backward()
    other = WhitenedLinear(4, 3)
    other.load_state_dict(layer.state_dict())
    torch.testing.assert_close(dict(other.state_dict()), dict(layer.state_dict()), rtol=0, atol=0)
    other.load_state_dict(nn.Linear(4, 3).state_dict(), strict=True)
    with pytest.raises(RuntimeError, match="size mismatch"), pytest.warns(UserWarning, match="other options"):
        other.load_state_dict(WhitenedLinear(5, 3).state_dict())
    WhitenedConv2d(3, 4, 3).load_state_dict(nn.Conv2d(3, 4, 3).state_dict(), strict=True)
