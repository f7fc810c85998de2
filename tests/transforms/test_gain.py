"""OptimalInputGain: gains that minimise their model, as a fixed map that no scale of the loss changes."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call, grad, vmap

from whiten_layers import Chain, FeatureWhitening, OptimalInputGain, WhitenedConv2d, WhitenedLinear, unwhiten, whiten
from whiten_layers.transforms.gain import Gains, nonnegative_minimum

from ..cases import everywhere
from ..helpers import compilers_may_warn

EVERY_BATCH = {"update_interval": 1, "statistics_interval": 1, "max_rows": None, "damping": 0.03}
WHITENING = FeatureWhitening(shrink=False, bound=None, update_interval=1, statistics_interval=1)


def inputs(seed, rows=40, features=4):
    noise = torch.randn(rows, features, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (noise + noise.cumsum(1)) * torch.logspace(-1, 1, features, dtype=torch.float64) + 0.3


def network(transform="optimal_gain"):
    torch.manual_seed(0)
    return whiten(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double(), transform)


def train(model, seeds, scale=1.0, copies=1, call=None):
    """Plain steps, the loss scaled for backward, every batch so many times over."""
    for seed in seeds:
        x = inputs(seed).repeat(copies, 1)
        model.zero_grad()
        ((call or model)(x).cos().sum(1).mean() * scale).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.01 / scale * parameter.grad
    return model


def gains(model):
    return [module.gains for module in model.modules() if isinstance(module, Gains)]


@given(seed=st.integers(0, 10**6), features=st.integers(1, 12), rank=st.integers(1, 12))
@settings(deadline=None)
def test_the_minimum_is_that_of_the_gains_that_are_at_least_zero(seed, features, rank):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(3, rank, features, generator=generator, dtype=torch.float64)
    matrix = rows.mT @ rows + 1e-3 * torch.eye(features, dtype=torch.float64)
    slope = torch.randn(3, features, generator=generator, dtype=torch.float64)
    found = nonnegative_minimum(matrix, slope)
    left = (matrix @ found.unsqueeze(-1)).squeeze(-1) - slope
    # The conditions of Karush, Kuhn and Tucker, which are sufficient for a convex model.
    assert (found >= 0).all() and (left >= -1e-8).all() and (left * found).abs().max() < 1e-8


@pytest.mark.parametrize("chained", [False, True])
def test_no_other_gains_lower_the_model_of_the_loss(chained):
    """Of rows gathered by hand: E[(Σ r v)²] / 2 − E[Σ r v] and what damping adds, over gains of that scale."""
    torch.manual_seed(0)
    transform = OptimalInputGain(**EVERY_BATCH)
    layer = WhitenedLinear(4, 3, dtype=torch.float64, transform=Chain(WHITENING, transform) if chained else transform)
    if chained:  # a map that is not the identity any more, and then stays
        train(layer, range(4))
        whitening, transform = layer.transform.members()
        whitening.update_interval, transform.slopes.decay = 10**6, 0.0
    else:
        transform = layer.transform
    plain = unwhiten(copy.deepcopy(layer))
    x = inputs(7)
    layer.zero_grad()
    layer(x).cos().sum(1).mean().backward()
    y = plain(x)
    y.retain_grad()
    y.cos().sum(1).mean().backward()
    direction = plain.weight.grad, plain.bias.grad
    if chained:
        direction = whitening.transform(*direction, None)
    rows = torch.cat([x * (y.grad @ direction[0]), (y.grad @ direction[1])[:, None]], 1).detach()
    rows = rows / (len(x) * y.grad.square().sum(1).mean())
    curvature, slope = rows.T @ rows / len(x), rows.mean(0)
    damping = 0.03 * curvature.diagonal().mean()
    common = slope.sum() / curvature.sum()

    def model(gain):
        return gain @ curvature @ gain / 2 - slope @ gain + damping * (gain - common).square().sum() / 2

    def best_scale(gain):
        matrix = curvature + damping * torch.eye(5, dtype=torch.float64)
        return gain * ((slope + damping * common) @ gain / (gain @ matrix @ gain))

    found = transform.slopes.gains[0]
    assert (found >= 0).all() and (found.max() - found.min()) > 0.1
    lowest = model(best_scale(found))
    generator = torch.Generator().manual_seed(0)
    for size in (1e-3, 1e-1, 1.0):
        for _ in range(200):
            other = found + size * torch.randn(5, generator=generator, dtype=torch.float64)
            assert model(best_scale(other.clamp(min=0))) >= lowest - 1e-12 * lowest.abs()
    torch.testing.assert_close(found.square() @ slope.clamp(min=0), slope.clamp(min=0).sum())


def test_independent_rows_have_the_curvature_of_the_second_moments():
    """R ∘ (Dᵀ Δ D), which takes inputs and output gradients for independent, is what the rows tend to."""
    torch.manual_seed(0)
    layer = WhitenedLinear(4, 3, bias=False, dtype=torch.float64, transform=OptimalInputGain(**EVERY_BATCH))
    x, upstream = inputs(1, rows=60), torch.randn(50, 3, dtype=torch.float64) @ torch.randn(3, 3, dtype=torch.float64)
    upstream += 1.0
    x, upstream = x.repeat_interleave(50, 0), upstream.repeat(60, 1)  # every pair once
    plain = unwhiten(copy.deepcopy(layer))
    for module in (layer, plain):
        module(x).backward(upstream)
    direction, rows = plain.weight.grad, len(x)
    expected = (x.T @ x / rows) * (direction.T @ (upstream.T @ upstream / rows) @ direction)
    expected /= expected.trace()  # batches count alike
    slopes = layer.transform.slopes
    found = slopes.running_covariance[0] + slopes.running_mean[0, :, None] * slopes.running_mean[0]
    torch.testing.assert_close(found[:4, :4], expected, rtol=1e-9, atol=1e-9 * expected.abs().max().item())


def test_features_of_which_nothing_is_known_and_copies_get_finite_gains():
    layer = WhitenedLinear(6, 3, dtype=torch.float64, transform=OptimalInputGain(**EVERY_BATCH))
    for seed in range(3):
        x = inputs(seed)
        x = torch.cat([x, x[:, :1], torch.zeros(len(x), 1, dtype=torch.float64)], 1)  # a copy, and one always zero
        layer(x).cos().sum().backward()
    (found,) = gains(layer)[0]
    assert found.isfinite().all() and (found >= 0).all() and found[5] > 0
    torch.testing.assert_close(found[0], found[4], rtol=1e-6, atol=1e-9)
    assert layer.transform.slopes.num_refreshes == 3 and layer.transform.slopes.num_refreshes_failed == 0


@pytest.mark.parametrize("damping", [0.0, 0.03])
def test_one_row_gives_a_finite_map(damping):
    layer = WhitenedLinear(4, 3, transform=OptimalInputGain(**(EVERY_BATCH | {"damping": damping})))
    for _ in range(2):
        layer.zero_grad()
        layer(torch.ones(1, 4)).sum().backward()
        assert layer.weight.grad.isfinite().all() and layer.weight.grad.any()


def test_much_damping_is_the_plain_gradient():
    torch.testing.assert_close(
        unwhiten(train(network(OptimalInputGain(damping=1e9)), range(5))).state_dict(),
        train(unwhiten(network()), range(5)).state_dict(),
    )


@pytest.mark.parametrize(
    "change",
    [{"scale": 65536.0}, {"scale": 1e-4}, {"copies": 3}],
    ids=["scaled up", "scaled down", "each row thrice"],
)
def test_no_scale_of_the_loss_and_no_repetition_of_the_rows_changes_the_gains(change):
    transform = Chain(WHITENING, OptimalInputGain(**EVERY_BATCH))
    for made in (OptimalInputGain(**EVERY_BATCH), transform):
        first, second = train(network(made), range(6)), train(network(made), range(6), **change)
        torch.testing.assert_close(gains(second), gains(first), rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(unwhiten(second).state_dict(), unwhiten(first).state_dict(), rtol=1e-7, atol=1e-9)
        assert all((gain - 1).abs().max() > 0.1 for gain in gains(first))


@everywhere
def test_the_rows_of_every_layer_sum_to_the_slopes_of_its_gradient(case):
    """Σ_p v_pm = Σ_k G_km², channel by channel: inputs and output gradients of a row are of one position."""
    _, layer = case.make_pair(OptimalInputGain(update_interval=1, statistics_interval=1, max_rows=None))
    output = layer(case.make_input())
    output.backward(torch.randn(output.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    geometry = layer.transform.geometry
    slopes = geometry.matrix(layer.weight.grad).square().sum((1, 3))
    if layer.bias is not None:
        slopes = torch.cat([slopes, layer.bias.grad.view(geometry.groups, -1).square().sum(1, keepdim=True)], 1)
    found = layer.transform.slopes.running_mean[:, : slopes.shape[1]]
    torch.testing.assert_close(found / found.sum(1, keepdim=True), slopes / slopes.sum(1, keepdim=True))


def test_after_another_map_the_gains_follow_what_it_has_become():
    """Without a scale of its own: exact whitening turns a gradient into one of another size by orders."""
    whitening = FeatureWhitening.exact(damping=1e-3)
    layer = WhitenedLinear(4, 3, dtype=torch.float64, transform=Chain(whitening, OptimalInputGain(**EVERY_BATCH)))
    forgetful = copy.deepcopy(layer)
    list(forgetful.transform.members())[1].slopes.decay = 0.0
    for one in (layer, forgetful):
        for seed in range(60):
            one.zero_grad()
            one(10 * inputs(seed)).cos().sum(1).mean().backward()
    remembered, last = (gains(one)[0] for one in (layer, forgetful))
    plain = WhitenedLinear(4, 3, dtype=torch.float64, transform=OptimalInputGain(**EVERY_BATCH))
    plain.load_state_dict({"weight": forgetful.weight, "bias": forgetful.bias})
    plain(10 * inputs(0)).cos().sum(1).mean().backward()
    first = plain.transform.slopes.gains
    assert (remembered - last).norm() < (remembered - first).norm()


def test_what_a_pass_has_left_is_not_saved():
    layer = WhitenedLinear(4, 3, transform="optimal_gain")
    layer.transform.observe_output(torch.ones(500, 3))  # as in a pass that then fails
    assert layer.transform._grad_output is not None
    assert copy.deepcopy(layer).transform._grad_output is None


@everywhere
@pytest.mark.parametrize(
    "transform", [OptimalInputGain(), Chain(FeatureWhitening(bound=None), OptimalInputGain())], ids=str
)
def test_between_refreshes_the_map_is_linear_and_a_gain_a_channel(case, transform):
    plain, layer = case.make_pair(transform)
    x = case.make_input()
    for module in (plain, layer):
        y = module(x)
        upstream = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape)
        y.backward(upstream)
    torch.testing.assert_close(layer.weight.grad, plain.weight.grad, rtol=1e-12, atol=1e-12)  # nothing is known yet
    part = layer.transform.parts()[-1]
    found = part.slopes.gains.clone()
    assert part.slopes.num_refreshes == 1 and found.isfinite().all() and (found >= 0).all()
    gradients = [torch.randn_like(layer.weight) for _ in range(2)]
    mapped = [layer.transform.transform(gradient, None, None)[0] for gradient in gradients]
    both = layer.transform.transform(2 * gradients[0] - 3 * gradients[1], None, None)[0]
    torch.testing.assert_close(both, 2 * mapped[0] - 3 * mapped[1], rtol=1e-9, atol=1e-9)
    if not isinstance(layer.transform, Chain):
        geometry = part.geometry
        expected = geometry.matrix(gradients[0]) * found[:, None, :-1, None]
        torch.testing.assert_close(geometry.matrix(mapped[0]), expected)


def test_grouped_is_one_layer_a_group():
    torch.manual_seed(0)
    transform = OptimalInputGain(**EVERY_BATCH)
    grouped = WhitenedConv2d(6, 8, 3, groups=2, dtype=torch.float64, transform=transform)
    singles = [WhitenedConv2d(3, 4, 3, dtype=torch.float64, transform=transform) for _ in range(2)]
    for _ in range(3):
        x = torch.randn(4, 6, 6, 6, dtype=torch.float64)
        for i, single in enumerate(singles):
            with torch.no_grad():
                single.weight.copy_(grouped.weight.chunk(2)[i])
                single.bias.copy_(grouped.bias.chunk(2)[i])
            single(x.chunk(2, 1)[i]).sin().sum().backward()
        grouped(x).sin().sum().backward()
        expected = torch.cat([gains(single)[0] for single in singles])
        torch.testing.assert_close(gains(grouped)[0], expected, rtol=1e-9, atol=1e-12)


def test_an_output_size_changes_nothing_but_the_positions():
    case = nn.ConvTranspose2d(3, 4, 3, stride=3)
    layer = whiten(copy.deepcopy(case), OptimalInputGain(**EVERY_BATCH))
    for size in ([12, 13], [14, 14]):
        layer(torch.randn(2, 3, 4, 4), output_size=size).sin().sum().backward()
    assert layer.transform.slopes.num_refreshes == 2 and layer.transform.num_batches_skipped == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("chained", [False, True])
def test_a_bad_batch_leaves_no_mark_and_is_counted(value, chained):
    transform = OptimalInputGain(**EVERY_BATCH)
    model = train(network(Chain(WHITENING, transform) if chained else transform), range(3))
    part = model[0].transform.parts()[-1]  # beyond the tanh an infinite input is a 1
    before = copy.deepcopy(part.slopes)
    x = inputs(3)
    x[5, 1] = value
    model(x).sum().backward()
    for name in ("running_count", "running_mean", "running_covariance", "gains"):
        torch.testing.assert_close(getattr(part.slopes, name), getattr(before, name), rtol=0, atol=0)
    assert part.num_batches_skipped == 1


def test_a_batch_without_a_gradient_tells_nothing_and_is_no_bad_one():
    model = train(network(OptimalInputGain(**EVERY_BATCH)), range(3))
    before = copy.deepcopy(gains(model))
    (model(inputs(3)) * 0).sum().backward()
    model(inputs(4)[:0]).sum().backward()  # an empty one
    torch.testing.assert_close(gains(model), before, rtol=0, atol=0)
    assert model[0].transform.num_batches_skipped == 0


@pytest.mark.parametrize(
    "transform", ["optimal_gain", Chain(FeatureWhitening(bound=None), OptimalInputGain())], ids=str
)
def test_copies_pickles_and_checkpoints_go_on_bit_for_bit(transform):
    model = train(network(transform), range(8))
    loaded = network(transform)
    loaded.load_state_dict(model.state_dict(), strict=True)
    others = [loaded, copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    train(model, range(8, 14))
    for other in others:
        train(other, range(8, 14))
        torch.testing.assert_close(other.state_dict(), model.state_dict(), rtol=0, atol=0)
    model[0].transform.reset_state()
    torch.testing.assert_close(model[0].transform.state_dict(), network(transform)[0].transform.state_dict())


@compilers_may_warn
def test_compiled_is_eager():
    torch._dynamo.reset()
    transform = Chain(FeatureWhitening(), OptimalInputGain())
    eager, compiled = train(network(transform), range(5)), network(transform)
    train(compiled, range(5), call=torch.compile(compiled, backend="aot_eager", fullgraph=True))
    torch.testing.assert_close(compiled.state_dict(), eager.state_dict(), rtol=1e-9, atol=1e-12)


def test_gradients_of_single_samples_are_one_batch():
    models = [network(OptimalInputGain(**EVERY_BATCH)) for _ in range(2)]
    x = inputs(0)
    parameters = {name: parameter.detach() for name, parameter in models[0].named_parameters()}
    of_sample = grad(lambda p, x: functional_call(models[0], p, (x[None],)).cos().sum())
    vmap(of_sample, in_dims=(None, 0))(parameters, x)
    models[1](x).cos().sum().backward()
    torch.testing.assert_close(gains(models[0]), gains(models[1]), rtol=1e-9, atol=1e-12)


def test_state_keeps_32_bits_in_a_narrower_layer():
    layer = WhitenedLinear(4, 3, dtype=torch.bfloat16, transform=OptimalInputGain(**EVERY_BATCH))
    layer(torch.randn(20, 4, dtype=torch.bfloat16)).sum().backward()
    layer.half()
    assert layer.transform.slopes.gains.dtype == layer.transform.slopes.running_covariance.dtype == torch.float32
    assert layer.weight.grad.dtype == torch.float16 and layer.transform.slopes.gains.isfinite().all()


@pytest.mark.parametrize("before", [[], [FeatureWhitening()], [FeatureWhitening(power=1.0)]], ids=["alone", "½", "1"])
def test_a_badly_scaled_problem_converges_faster(before):
    """Features of scales 0.1 to 10: what the gains are for. The same rate for both, the norm being kept.

    Where power 1 has done most of the work a tenth is left to gain.
    """
    target = torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 4)

    def last_loss(*transforms):
        torch.manual_seed(0)
        layer = nn.Linear(4, 3).double()
        if transforms:
            whiten(layer, Chain(*transforms))
        for seed in range(200):
            x = inputs(seed)
            layer.zero_grad()
            loss = (layer(x) - x @ target.T).square().sum(1).mean()
            loss.backward()
            torch.optim.SGD(layer.parameters(), 1e-3).step()
        return loss.item()

    most = 0.9 if before and before[0].power == 1 else 0.8
    assert last_loss(*before, OptimalInputGain(damping=0.03)) < most * last_loss(*before)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"damping": -1}, "damping=-1 is not possible: give a number of at least 0"),
        ({"decay": 1.0}, r"decay=1.0 is not possible: give a number in \[0, 1\)"),
        ({"update_interval": 0}, "update_interval=0 is not possible: give an integer of at least 1"),
        ({"max_rows": 0}, "max_rows=0 is not possible: give an integer of at least 1, or None"),
    ],
)
def test_a_wrong_option_is_named_with_its_value_and_the_choices(options, message):
    with pytest.raises(ValueError, match=message):
        OptimalInputGain(**options)


def test_the_name_stands_for_the_defaults():
    layer = WhitenedLinear(4, 3, transform="optimal_gain")
    assert isinstance(layer.transform, OptimalInputGain)
    assert all(isinstance(module.transform, OptimalInputGain) for module in network() if hasattr(module, "transform"))


def test_without_a_minimum_the_steps_end_with_nan_or_a_number():
    """A matrix that is not positive definite, as rounding may leave it: the search must not go on for ever."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(200, 6, 6, generator=generator, dtype=torch.float64)
    slope = torch.randn(200, 6, generator=generator, dtype=torch.float64)
    gains = nonnegative_minimum(matrix + matrix.mT, slope)
    assert (gains.isnan() | (gains >= 0)).all() and gains.isnan().any()
