"""State dicts: a plain checkpoint loads, a run goes on bit for bit, a foreign one is an error."""

import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from whiten_layers import FeatureWhitening, WhitenedConv2d, WhitenedLinear, unwhiten, whiten

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


def test_a_checkpoint_of_another_transform_is_an_error_that_names_the_keys():
    saved = whiten(plain(), FeatureWhitening(features="patch")).state_dict()
    with pytest.raises(
        RuntimeError, match=r"(?s)Missing key.*0\.transform\.channels\.running_count.*Unexpected.*0\.transform\.inputs"
    ):
        whiten(plain()).load_state_dict(saved)


def test_a_checkpoint_of_one_layer():
    layer = WhitenedLinear(4, 3)
    layer(torch.randn(9, 4)).sum().backward()
    other = WhitenedLinear(4, 3)
    other.load_state_dict(layer.state_dict())
    torch.testing.assert_close(dict(other.state_dict()), dict(layer.state_dict()), rtol=0, atol=0)
    other.load_state_dict(nn.Linear(4, 3).state_dict(), strict=True)
    with pytest.raises(RuntimeError, match="size mismatch"):
        other.load_state_dict(WhitenedLinear(5, 3).state_dict())
    WhitenedConv2d(3, 4, 3).load_state_dict(nn.Conv2d(3, 4, 3).state_dict(), strict=True)
