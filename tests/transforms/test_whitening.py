"""FeatureWhitening: its options, its schedule, the Kronecker form, the scalar k."""

import copy
import itertools
import pickle

import pytest
import torch
from torch import nn

from whiten_layers import FeatureWhitening, WhitenedConv2d, WhitenedConvTranspose2d, WhitenedLinear, whiten
from whiten_layers.refresh.schedule import is_due
from whiten_layers.transforms.covariances import default_rows


def test_grouped_is_one_layer_a_group():
    torch.manual_seed(0)
    # One scalar corrects the norm of a whole layer, so groups know of each other by it.
    options = {"rescale": False, "bound": None}
    transform = FeatureWhitening(update_interval=1, output_power=0.5, **options)
    grouped = WhitenedConv2d(6, 8, 3, groups=2, dtype=torch.float64, transform=transform)
    singles = [WhitenedConv2d(3, 4, 3, dtype=torch.float64, transform=transform) for _ in range(2)]
    for i, single in enumerate(singles):
        with torch.no_grad():
            single.weight.copy_(grouped.weight.chunk(2)[i])
            single.bias.copy_(grouped.bias.chunk(2)[i])
    for _ in range(3):
        grouped.zero_grad()
        x = torch.randn(4, 6, 6, 6, dtype=torch.float64)
        grouped(x).square().sum().backward()
        for i, single in enumerate(singles):
            single.zero_grad()
            single(x.chunk(2, 1)[i]).square().sum().backward()
            torch.testing.assert_close(grouped.weight.grad.chunk(2)[i], single.weight.grad, rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(grouped.bias.grad.chunk(2)[i], single.bias.grad, rtol=1e-10, atol=1e-12)


def test_a_dead_group_does_not_stop_the_others():
    transform = FeatureWhitening(features="kronecker", output_power=0.5, update_interval=1)
    layer = WhitenedConv2d(3, 3, 3, groups=3, transform=transform)
    for _ in range(4):
        x = torch.randn(4, 3, 8, 8).cumsum(3)  # correlated: there is something to whiten, however few the images
        x[:, 1] = 0  # a channel that never fires
        y = layer(x)
        upstream = torch.randn_like(y)
        upstream[:, 2] = 0  # an output that nobody uses
        y.backward(upstream)
    assert layer.transform.num_batches_skipped == 0
    factors = {n: f for n, f in layer.transform.named_children() if n != "norms"}
    moved = {n: (f.running_covariance != 0).flatten(1).any(1).tolist() for n, f in factors.items()}
    assert moved == {"channels": [True, False, True], "taps": [True, False, True], "outputs": [True, True, False]}
    taps = layer.transform.taps.precision
    assert torch.equal(taps[1], torch.eye(9)) and not torch.equal(taps[0], torch.eye(9))


@pytest.mark.parametrize("power", [0.3, 0.5, 1.0])
@pytest.mark.parametrize("features", ["patch", "kronecker"])
@pytest.mark.parametrize("bias", [True, False])
def test_rescaling_keeps_the_expected_component_along_the_plain_gradient(power, features, bias):
    """The ratio is 1 in the geometric mean over new batches: k is never about one of them.

    Without a bias it is the component times the norm that stays, up to a root.
    """
    torch.manual_seed(0)
    transform = FeatureWhitening(features=features, power=power, update_interval=1, max_rows=None, bound=None)
    layer = WhitenedConv2d(6, 5, 3, bias=bias, dtype=torch.float64, transform=transform)
    mixing = torch.randn(6, 6, dtype=torch.float64)

    def batch():
        # Of separable covariance, so that the Kronecker form describes it exactly but for the borders.
        return torch.einsum("cd,ndhw->nchw", mixing, torch.randn(8, 6, 12, 12, dtype=torch.float64))

    for _ in range(30):
        output = layer(batch())
        output.backward(torch.randn_like(output))
    layer.transform.update_interval = 10**6
    logarithm = 0.0
    for _ in range(60):
        layer.zero_grad()
        x = batch()
        upstream = torch.randn(layer(x).shape, dtype=torch.float64)
        layer(x).backward(upstream)
        plain = torch.nn.grad.conv2d_weight(x, layer.weight.shape, upstream)
        kept = (layer.weight.grad * plain).sum() / plain.square().sum()
        if not bias:
            kept = (kept * layer.weight.grad.norm() / plain.norm()).sqrt()
        logarithm += kept.log().item() / 60
    # Of one batch it scatters by 0.1 (power 1): of 60, and of the 30 that were measured, by 0.02.
    assert abs(logarithm) < 0.08


def test_sampled_statistics_approach_those_of_all_rows():
    generator = torch.Generator().manual_seed(0)
    transforms = [FeatureWhitening(features="kronecker", max_rows=rows) for rows in (256, None)]
    layers = [WhitenedConv2d(4, 3, 3, transform=transform) for transform in transforms]
    for _ in range(100):
        x = torch.randn(16, 4, 12, 12, generator=generator).cumsum(2)
        for layer in layers:
            layer(x).sum().backward()
    for name in ("channels", "taps"):
        few, every = (getattr(layer.transform, name).running_covariance for layer in layers)
        assert (few - every).norm() / every.norm() < 0.15


@pytest.mark.parametrize(
    "features, decay, interval, rows",
    [(16, 0.99, 1, 64), (256, 0.99, 1, 82), (288, 0.99, 1, 93), (288, 0.9, 1, 512), (256, 0.99, 4, 328)],
)
def test_a_memory_holds_32_rows_of_each_feature(features, decay, interval, rows):
    assert [default_rows(batch, features, decay, interval) for batch in (1, 20, 21, 1000)] == [512, 512, rows, rows]
    assert rows in (64, 512) or rows / (1 - decay) / interval >= 32 * features


def test_fewer_rows_are_sampled_once_many_are_known():
    layer = WhitenedConv2d(4, 3, 3, bias=False, transform=FeatureWhitening(update_interval=1))
    counts = []
    for _ in range(24):
        layer(torch.randn(40, 4, 12, 12)).sum().backward()
        counts.append(layer.transform.inputs.running_count.item())
    rows = [now - 0.99 * before for before, now in itertools.pairwise([0, *counts])]
    assert rows == pytest.approx([480] * 20 + [40] * 4, rel=1e-4)  # 12 and one of each image; counts are float32


def test_a_layer_keeps_to_its_intervals():
    transform = FeatureWhitening(update_interval=4, statistics_interval=3, decay=0.8)
    layer = WhitenedLinear(3, 2, transform=transform)
    factor = layer.transform.inputs
    refreshed, observed = [], []
    weight = 0.0
    for batch in range(1, 25):
        before = factor.num_refreshes.clone(), weight
        layer(torch.randn(7, 3)).sum().backward()
        if factor.num_refreshes != before[0]:
            refreshed.append(batch)
        weight = factor.running_count.item() + (0 if factor.window is None else factor.window.rows.item())
        both = batch in refreshed and is_due(batch, 3)
        if weight != before[1] and (factor.window is not None or both):
            observed.append(batch)
    assert refreshed == [batch for batch in range(1, 25) if is_due(batch, 4)]
    assert observed == [batch for batch in range(1, 25) if is_due(batch, 3)]
    assert layer.transform.num_batches_tracked == 24


def test_a_layer_that_the_due_batch_does_not_reach_observes_the_next_that_does():
    transform = FeatureWhitening(update_interval=10, statistics_interval=10)
    model = whiten(nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 2)]), transform)
    third, fourth = [batch for batch in range(10, 40) if is_due(batch, 10)][:2]
    first, second = (layer.transform.inputs for layer in model)
    for batch in range(1, 32):
        x = torch.randn(7, 3)
        (model[0](x).sum() if batch == third else (model[1](model[0](x)).sum())).backward()
        assert first.window is None
        assert (second.window is not None) == (third < batch < fourth)
    assert [layer.transform.num_batches_tracked for layer in model] == [31, 31]
    assert first.num_refreshes == second.num_refreshes + 1


def test_damping_is_relative_to_the_variance():
    torch.manual_seed(0)
    x = torch.randn(50, 4, dtype=torch.float64)
    gradients = []
    for scale in (1.0, 1e-4, 1e4):
        layer = WhitenedLinear(4, 3, dtype=torch.float64, transform=FeatureWhitening(update_interval=1))
        for _ in range(2):
            layer.zero_grad()
            # δ without the inputs' scale, so that k·P sees the scale alone
            layer(x * scale).backward(torch.ones(50, 3, dtype=torch.float64))
        gradients.append(layer.weight.grad / scale)
    for gradient in gradients[1:]:
        torch.testing.assert_close(gradient, gradients[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", ["cholesky", "eigh", "newton_schulz", "recursive", "auto"])
def test_methods_agree(method):
    gradients = []
    for name in (method, "eigh"):
        torch.manual_seed(0)
        layer = WhitenedLinear(
            5, 3, dtype=torch.float64, transform=FeatureWhitening(name, power=1.0, update_interval=1)
        )
        for _ in range(3):
            layer.zero_grad()
            layer(torch.randn(20, 5, dtype=torch.float64)).square().sum().backward()
        gradients.append(layer.weight.grad)
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10)


def test_exact_is_the_papers_form_and_takes_options():
    transform = FeatureWhitening.exact("eigh", damping=0.5)
    assert (transform.method, transform.features, transform.power, transform.rescale) == ("eigh", "patch", 1.0, False)
    assert (transform.update_interval, transform.statistics_interval, transform.max_rows) == (1, 1, None)
    assert (transform.center, transform.shrink, transform.bound, transform.block_size) == (True, False, None, None)
    assert transform.damping == 0.5
    assert FeatureWhitening.exact(power=0.5).power == 0.5


@pytest.mark.parametrize(
    "options, message",
    [
        ({"method": "lu"}, "method='lu' is not possible: give one of auto, cholesky, eigh, newton_schulz, recursive"),
        ({"features": "channel"}, "features='channel' is not possible: give one of kronecker, patch"),
        ({"power": 1.5}, r"power=1.5 is not possible: give a number in \[0, 1\]"),
        ({"power": "1"}, r"power='1' is not possible: give a number in \[0, 1\]"),
        ({"power": float("nan")}, r"power=nan is not possible"),
        ({"output_power": -0.5}, r"output_power=-0.5 is not possible: give a number in \[0, 1\]"),
        (
            {"method": "cholesky"},
            "power=0.5 is not possible: give power=1, as 'cholesky' needs it, or method auto or eigh",
        ),
        (
            {"method": "cholesky", "power": 1, "output_power": 0.5},
            "output_power=0.5 is not possible: give output_power=1, as 'cholesky' needs it, or method auto",
        ),
        ({"damping": -1}, "damping=-1 is not possible: give a number of at least 0"),
        ({"damping": float("inf")}, "damping=inf is not possible"),
        ({"decay": 1.0}, r"decay=1.0 is not possible: give a number in \[0, 1\)"),
        ({"center": 1}, "center=1 is not possible: give True, False or None"),
        ({"shrink": 1}, "shrink=1 is not possible: give True or False"),
        ({"bound": 0.5}, "bound=0.5 is not possible: give a number of at least 1, or None"),
        ({"rescale": None}, "rescale=None is not possible: give True or False"),
        ({"update_interval": 0}, "update_interval=0 is not possible: give an integer of at least 1"),
        ({"statistics_interval": 2.5}, "statistics_interval=2.5 is not possible: give an integer of at least 1"),
        ({"block_size": 0}, "block_size=0 is not possible: give an integer of at least 1, 'auto', or None"),
        ({"rank": None}, "rank=None is not possible: give an integer of at least 1"),
        (
            {"method": "newton_schulz", "power": 0.25},
            "power=0.25 is not possible: give power=0.5 or power=1, as 'newton_schulz' needs it, or method auto",
        ),
        ({"max_rows": True}, "max_rows=True is not possible: give an integer of at least 1, 'auto', or None"),
    ],
)
def test_a_wrong_option_is_named_with_its_value_and_the_choices(options, message):
    with pytest.raises(ValueError, match=message):
        FeatureWhitening(**options)


def test_a_covariance_that_cannot_be_inverted_is_counted_and_changes_nothing():
    layer = WhitenedLinear(5, 3, transform=FeatureWhitening.exact(damping=0.0))
    layer(torch.randn(3, 5)).sum().backward()  # more features than rows, and nothing to damp
    factor = layer.transform.inputs
    assert factor.num_refreshes_failed == 1 and factor.num_refreshes == 0
    torch.testing.assert_close(factor.precision[0], torch.eye(5))
    for _ in range(5):
        layer(torch.randn(40, 5)).sum().backward()
    assert factor.num_refreshes_failed == 1 and factor.num_refreshes == 5


def test_pickles_and_copies_train_for_themselves():
    layer = WhitenedLinear(4, 3)
    layer(torch.randn(9, 4)).sum().backward()
    for clone in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert clone.transform.handle != layer.transform.handle
        clone(torch.randn(9, 4)).sum().backward()
        assert clone.transform.num_batches_tracked == 2
    assert layer.transform.num_batches_tracked == 1


def test_no_option_switched_on_is_the_plain_gradient():
    layer = WhitenedLinear(4, 3, transform=FeatureWhitening(power=0.0))
    plain = nn.Linear(4, 3)
    plain.load_state_dict(layer.state_dict(), strict=False)
    x = torch.randn(9, 4)
    for module in (layer, plain):
        module(x).square().sum().backward()
    torch.testing.assert_close(layer.weight.grad, plain.weight.grad, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("layer", "size", "features"),
    [
        (lambda **options: WhitenedConv2d(3, 4, 7, **options), (8, 3, 9, 9), "patch"),
        (lambda **options: WhitenedConv2d(32, 4, 3, **options), (8, 32, 5, 5), "patch"),
        (lambda **options: WhitenedConv2d(34, 4, 3, **options), (8, 34, 5, 5), "kronecker"),
        (lambda **options: WhitenedConv2d(64, 64, 3, groups=64, **options), (8, 64, 5, 5), "patch"),
        (lambda **options: WhitenedConv2d(1024, 32, 3, groups=32, **options), (8, 1024, 3, 3), "kronecker"),
        (lambda **options: WhitenedConvTranspose2d(16, 4, 3, stride=2, **options), (8, 16, 5, 5), "patch"),
        (lambda **options: WhitenedLinear(400, 4, **options), (8, 400), "kronecker"),
    ],
    ids=["stem", "32 channels", "34 channels", "depthwise", "many groups", "transposed", "linear"],
)
def test_auto_features_are_whole_patches_where_they_are_small(layer, size, features):
    torch.manual_seed(0)
    auto = layer()
    given = layer(transform=FeatureWhitening(features=features))
    given.load_state_dict(auto.state_dict(), strict=True)
    for seed in range(3):
        x = torch.randn(*size, generator=torch.Generator().manual_seed(seed))
        for one in (auto, given):
            one.zero_grad()
            one(x).square().mean().backward()
    torch.testing.assert_close(auto.weight.grad, given.weight.grad, rtol=0, atol=0)
    torch.testing.assert_close(dict(auto.state_dict()), dict(given.state_dict()), rtol=0, atol=0)
    assert hasattr(auto.transform, "inputs") == (features == "patch" or "Linear" in type(auto).__name__)
