"""EigenbasisScaling: what an optimizer steps by, when, and what is left of it afterwards."""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from whiten_layers import (
    Chain,
    EigenbasisScaling,
    FeatureWhitening,
    WhitenedConv2d,
    WhitenedLinear,
    estimate,
    report,
    whiten,
)
from whiten_layers.refresh.update import refresh_factors
from whiten_layers.statistics.eigenbasis import Eigenbasis

from .. import reference
from ..cases import everywhere
from ..helpers import compilers_may_warn

EVERY_STEP = EigenbasisScaling(interval=1, max_rows=None, decay=0.9, variance_decay=0.8, damping=1e-3)


class Noted(torch.optim.SGD):
    """Keeps the gradients that it steps by, and moves nothing."""

    def __init__(self, parameters):
        super().__init__(parameters, lr=0.0)
        self.seen = []

    def step(self, closure=None):
        loss = None if closure is None else closure()
        self.seen.append([p.grad.clone() for group in self.param_groups for p in group["params"]])
        return loss


def plain():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=2, bias=False), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(4 * 16, 5)).double()


def batch(seed, number=8):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(number, 3, 6, 6, generator=generator, dtype=torch.float64)
    return x + x.cumsum(2), torch.randint(0, 5, (number,), generator=generator)


def train(model, steps, optimizer=None, call=None):
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), 0.01)
    for step in steps:
        x, y = batch(step)
        optimizer.zero_grad()
        F.cross_entropy((call or model)(x), y).backward()
        optimizer.step()
    return model


def expected_scaling(layer, batches, gradients, options):
    """What the last of some gradients ``(S, M)`` becomes, for a layer of one group and whole patches, in float64."""
    variance = None
    for step, gradient in enumerate(gradients, 1):
        bases = []
        for rows in ([reference.rows(layer, x)[0] for x, _ in batches[:step]], [d for _, d in batches[:step]]):
            mean, covariance = reference.weighted_moments(rows, options.decay)
            bases.append(torch.linalg.eigh(covariance + torch.outer(mean, mean)).eigenvectors)
        right, left = bases
        rotated = left.T @ gradient @ right
        if variance is not None and rotated.square().mean() > 9 * variance.mean():  # three times the usual length
            rotated = rotated * 3 * (variance.mean() / rotated.square().mean()).sqrt()
        share = max(1 / step, 1 - options.variance_decay)
        variance = rotated.square() if variance is None else variance + share * (rotated.square() - variance)
        scaled = rotated / (variance + options.damping * variance.mean()).sqrt()
    return left @ scaled @ right.T


@everywhere
def test_backward_is_the_plain_layers(case):
    layer, ours = case.make_pair(EVERY_STEP)
    for seed in range(3):
        results = []
        for one in (layer, ours):
            one.zero_grad()
            x = case.make_input(seed).requires_grad_()
            y = one(x)
            y.backward(y.detach().cos())
            results.append([y.detach(), x.grad, *(p.grad for p in one.parameters())])
        torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize(
    "make",
    [
        lambda transform: WhitenedLinear(5, 4, dtype=torch.float64, transform=transform),
        lambda transform: WhitenedConv2d(3, 4, 2, dtype=torch.float64, transform=transform),
    ],
    ids=["linear", "conv"],
)
@pytest.mark.parametrize("lengths", [[1] * 6, [0.1, 1, 1, 50, 1, 200]], ids=["alike", "some are long"])
def test_an_optimizer_steps_by_the_gradient_over_its_deviation_in_the_eigenbases(make, lengths):
    torch.manual_seed(0)
    layer = make(EVERY_STEP)
    optimizer, batches, gradients = Noted(layer.parameters()), [], []
    for length in lengths:
        x = torch.randn(9, 5) if isinstance(layer, nn.Linear) else torch.randn(4, 3, 4, 4)
        x = x.double().cumsum(1) + 0.5
        optimizer.zero_grad()
        y = layer(x)
        upstream = length * torch.randn_like(y)
        y.backward(upstream)
        deltas = reference.output_rows(layer, upstream)[0]
        batches.append((x, deltas / deltas.square().sum(1).mean().sqrt()))
        gradients.append(layer.weight.grad.flatten(1).clone())
        bias = layer.bias.grad.clone()
        optimizer.step()
        expected = expected_scaling(layer, batches, gradients, EVERY_STEP).view_as(layer.weight)
        torch.testing.assert_close(optimizer.seen[-1], [expected, bias], rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(layer.weight.grad.flatten(1), gradients[-1], rtol=0, atol=0)  # plain again


@pytest.mark.parametrize("size", [1e3, 1e19, 1e30])
def test_a_bad_batch_is_forgotten_in_twenty_steps(size):
    """Also where the square of its gradient overflows. A layer whose first gradients are zero begins at any size."""
    torch.manual_seed(0)
    layer = WhitenedLinear(5, 4, transform=EigenbasisScaling())
    optimizer, upstream = Noted(layer.parameters()), torch.randn(4)
    for step in range(45):
        optimizer.zero_grad()
        scale = {0: 0.0, 20: size}.get(step, 1.0)
        (layer(torch.randn(9, 5)) * torch.randn(9, 4) * upstream * scale).sum().backward()
        optimizer.step()
    lengths = [seen[0].norm().item() / 20**0.5 for seen in optimizer.seen]
    assert lengths[0] == 0 and 0 < lengths[1] < 3
    usual = sum(lengths[10:20]) / 10
    assert lengths[20] < 3 * usual
    assert sum(lengths[40:]) / 5 > 0.7 * usual


@everywhere
@pytest.mark.parametrize("features", ["patch", "kronecker"])
@pytest.mark.parametrize("block_size", [None, 2])
def test_the_bases_are_orthogonal(case, features, block_size):
    options = {"features": features, "block_size": block_size, "variance_decay": 0.0, "interval": 1}
    layer = case.make_pair(EigenbasisScaling(**options))[1]
    layer(case.make_input()).square().sum().backward()
    transform, gradient = layer.transform, layer.weight.grad
    assert all(isinstance(factor, Eigenbasis) and factor.num_refreshes == 1 for factor in transform.factors())
    rotated = transform._rotated(transform.geometry.matrix(gradient))
    assert rotated.norm().item() == pytest.approx(gradient.norm().item(), rel=1e-9)
    assert rotated.shape == transform.variance.shape
    back = transform._rotated_back(rotated).view_as(transform.geometry.matrix(gradient))
    back, level = transform.geometry.weight(back, gradient), gradient.square().mean().sqrt().item()
    torch.testing.assert_close(back, gradient, rtol=1e-9, atol=1e-9 * level)


@pytest.mark.parametrize("channels", [4, 7])
def test_a_blocks_eigenvectors_are_those_of_its_part_and_what_fills_it_up_comes_last(channels):
    torch.manual_seed(0)
    factor = Eigenbasis(2, channels, 3, decay=0.9, block_size=3, dtype=torch.float64)
    rows = torch.randn(2, 50, channels * 3, dtype=torch.float64).cumsum(2) + 1
    factor.observe_rows(rows)
    factor.close_window(1)
    refresh_factors([factor])
    rotated = factor.rotate(rows)
    torch.testing.assert_close(factor.rotate_back(rotated), rows, rtol=1e-9, atol=1e-9)
    moments = rotated.mT @ rotated / 50
    size = factor.precision.shape[-1]
    for group in moments:
        for part in torch.arange(channels * 3).split(size):
            block = group[part][:, part]
            torch.testing.assert_close(block, block.diagonal().diag(), rtol=0, atol=1e-8 * block.trace().item())
            assert (block.diagonal().diff() >= -1e-9).all()  # ascending, as of `eigh`


def test_between_observed_steps_the_layer_is_the_plain_one():
    model = whiten(plain(), EigenbasisScaling(interval=10))
    optimizer, observed = torch.optim.AdamW(model.parameters(), 0.01), []
    for step in range(1, 41):
        x, y = batch(step)
        output = model[0](x)
        observed.append(type(output.grad_fn).__name__ != "ConvolutionBackward0")
        optimizer.zero_grad()
        F.cross_entropy(model[1:](output), y).backward()
        optimizer.step()
    assert [step for step in range(1, 11) if observed[step - 1]][:4] == [1, 2, 4, 8] and sum(observed) in (6, 7, 8)
    assert model[0].transform.num_batches_tracked == sum(observed) and model[0].transform.num_steps == 40
    assert model[0].transform.inputs.num_refreshes == sum(observed)


def test_steps_are_observed_more_rarely_as_training_goes_on():
    torch.manual_seed(0)
    model = whiten(nn.Linear(3, 2), "eigenbasis")
    optimizer, observed = torch.optim.AdamW(model.parameters()), {}
    for step in range(1400):
        observed[step] = int(model.transform.num_batches_tracked)
        optimizer.zero_grad()
        model(torch.randn(4, 3)).square().mean().backward()
        optimizer.step()
    between = [observed[500] - observed[100], observed[1000] - observed[500], observed[1399] - observed[1000]]
    for number, expected in zip(between, (400 / 5, 500 / 10, 400 / 20), strict=True):
        assert abs(number - expected) <= 2  # each stretch has one, at a place of its own


def test_accumulated_micro_batches_make_one_step_of_the_whole_gradient():
    model = whiten(plain(), EigenbasisScaling())
    optimizer = Noted(model.parameters())
    for step in range(5):
        x, y = batch(step)
        optimizer.zero_grad()
        for part in (slice(0, 2), slice(2, 8)):
            (F.cross_entropy(model(x[part]), y[part], reduction="sum") / 8).backward()
        whole = model[4].weight.grad.clone()
        optimizer.step()
    assert model[4].transform.num_steps == 5
    again = copy.deepcopy(model[4].transform)
    again.variance.copy_(model[4].transform.variance)
    rotated = again._rotated(again.geometry.matrix(whole))
    least = again.damping * again.variance.mean()
    expected = again._rotated_back(rotated / (again.variance + least).sqrt()).view_as(whole)
    torch.testing.assert_close(optimizer.seen[-1][-2], expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("named", [True, False])
def test_a_closure_is_called_before_the_gradient_is_scaled(named):
    models = [whiten(plain(), EigenbasisScaling()) for _ in range(2)]
    optimizers = [torch.optim.AdamW(model.parameters(), 0.01) for model in models]
    train(models[0], range(12), optimizers[0])
    for step in range(12):
        x, y = batch(step)

        def closure():
            optimizers[1].zero_grad()
            loss = F.cross_entropy(models[1](x), y)  # noqa: B023
            loss.backward()
            return loss

        loss = optimizers[1].step(closure=closure) if named else optimizers[1].step(closure)
        assert math.isfinite(loss.item())
    torch.testing.assert_close(models[0].state_dict(), models[1].state_dict(), rtol=0, atol=0)
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=0)


@pytest.mark.parametrize("fused", [False, True])
def test_a_loss_that_is_scaled_changes_nothing(fused):
    """The fused optimizers divide by the scale themselves, in the step."""
    models = [whiten(plain(), EigenbasisScaling()).float() for _ in range(2)]
    optimizers = [torch.optim.AdamW(model.parameters(), 0.01, fused=fused) for model in models]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=4)
    for step in range(14):
        x, y = batch(step)
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x.float() * (math.inf if step == 5 else 1)), y)
            if model is models[0]:
                if step != 5:  # which the scaler skips
                    loss.backward()
                    optimizer.step()
            else:
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
    assert scaler.get_scale() != 2.0**10
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("copied", ["deepcopy", "pickle", "state dict"])
def test_training_goes_on_bit_for_bit(copied):
    model = whiten(plain(), EigenbasisScaling())
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    train(model, range(13), optimizer)
    if copied == "state dict":
        other = whiten(plain(), EigenbasisScaling())
        other.load_state_dict(model.state_dict())
    else:
        other = copy.deepcopy(model) if copied == "deepcopy" else pickle.loads(pickle.dumps(model))
    others = torch.optim.AdamW(other.parameters(), 0.01)
    others.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, range(13, 40), optimizer)
    train(other, range(13, 40), others)
    torch.testing.assert_close(model.state_dict(), other.state_dict(), rtol=0, atol=0)


def test_a_gradient_that_is_not_finite_or_zero_leaves_no_mark():
    model = whiten(plain(), EigenbasisScaling())
    optimizer = Noted(model.parameters())
    train(model, range(5), optimizer)
    before = model[4].transform.variance.clone()
    for value in (math.nan, math.inf):
        model[4].weight.grad.fill_(value)
        optimizer.step()
        assert not optimizer.seen[-1][-2].isfinite().any()
    torch.testing.assert_close(model[4].transform.variance, before, rtol=0, atol=0)
    fresh = whiten(plain(), EigenbasisScaling())
    optimizer = Noted(fresh.parameters())
    (fresh(batch(0)[0]).sum() * 0).backward()
    optimizer.step()
    assert all(not gradient.any() for gradient in optimizer.seen[-1])


@pytest.mark.parametrize("kind", ["no optimizer", "parametrized", "another optimizer"])
def test_a_layer_that_keeps_its_plain_gradients_warns(kind):
    layer = WhitenedLinear(3, 2, transform=EigenbasisScaling())
    if kind == "parametrized":
        weight_norm(layer)
    others = [nn.Parameter(torch.zeros(2))]
    trained = {"no optimizer": None, "parametrized": layer.parameters(), "another optimizer": others}[kind]
    optimizer = torch.optim.SGD(trained, 0.1) if trained is not None else None
    with pytest.warns(
        UserWarning, match="keeps its plain gradients: no torch.optim optimizer steps its weight"
    ) as seen:
        for _ in range(120):
            layer(torch.randn(4, 3)).square().sum().backward()
            if optimizer is not None:
                optimizer.step()
    assert len(seen) == 1


@pytest.mark.parametrize("options", [{}, {"fused": True}, {"foreach": True}], ids=str)
def test_strides_and_types_of_a_gradient_stay(options):
    model = whiten(plain(), EigenbasisScaling()).bfloat16().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01, **options)
    seen = []
    torch.optim.Optimizer.register_step_pre_hook(optimizer, lambda *_: seen.append(model[0].weight.grad))
    for step in range(3):
        x, y = batch(step)
        optimizer.zero_grad()
        F.cross_entropy(model(x.bfloat16().to(memory_format=torch.channels_last)).float(), y).backward()
        optimizer.step()
        plain_gradient = model[0].weight.grad
        assert seen[-1] is not plain_gradient and seen[-1].stride() == plain_gradient.stride()
        assert seen[-1].dtype == torch.bfloat16 and seen[-1].isfinite().all()
    assert model[0].weight.stride() == (27, 1, 9, 3) and model[0].transform.variance.dtype == torch.float32


class Around(torch.optim.Optimizer):
    """Steps by another optimizer, as Lookahead and ZeroRedundancyOptimizer do."""

    def __init__(self, inner):
        super().__init__(inner.param_groups, {})
        self.inner = inner

    def step(self, closure=None):
        return self.inner.step(closure)


@pytest.mark.parametrize("has_closure", [False, True])
def test_an_optimizer_around_another_scales_once(has_closure):
    models = [whiten(plain(), EigenbasisScaling()) for _ in range(2)]
    inner = [torch.optim.AdamW(model.parameters(), 0.01) for model in models]
    outer = [inner[0], Around(inner[1])]
    for step in range(5):
        x, y = batch(step)
        for model, optimizer in zip(models, outer, strict=True):

            def closure(model=model, x=x, y=y):
                model.zero_grad()
                loss = F.cross_entropy(model(x), y)
                loss.backward()
                return loss

            if has_closure:
                optimizer.step(closure)
            else:
                closure()
                optimizer.step()
    torch.testing.assert_close(models[0].state_dict(), models[1].state_dict(), rtol=0, atol=0)
    assert models[1][4].transform.num_steps == 5
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=0)


def test_a_step_inside_autocast_is_as_precise():
    models = [whiten(plain().float(), EigenbasisScaling()) for _ in range(2)]
    for model in models:
        optimizer = torch.optim.AdamW(model.parameters(), 0.01)
        for step in range(5):
            x, y = batch(step)
            optimizer.zero_grad()
            F.cross_entropy(model(x.float()), y).backward()
            with torch.autocast("cpu", torch.bfloat16, enabled=model is models[0]):
                optimizer.step()
    torch.testing.assert_close(models[0].state_dict(), models[1].state_dict(), rtol=0, atol=0)


def test_a_weight_that_two_layers_share_is_scaled_once():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)).double()
    model[2].weight = model[0].weight
    whiten(model, EigenbasisScaling())
    optimizer = Noted(model.parameters())
    last = copy.deepcopy(model[2].transform)
    for steps in range(1, 120):
        optimizer.zero_grad()
        model(torch.randn(9, 4).double()).square().sum().backward()
        last.load_state_dict(model[2].transform.state_dict())
        expected = last.scale_at_step(model[0].weight.grad)
        optimizer.step()
        torch.testing.assert_close(optimizer.seen[-1][0], expected, rtol=0, atol=0)
        # Each counts the steps, so that each observes as rarely as it should, and none warns that it is not stepped.
        assert model[0].transform.num_steps == model[2].transform.num_steps == steps
    assert model[0].transform.outputs.num_refreshes < 30


def test_in_a_chain_it_scales_what_the_others_made_of_the_gradient():
    torch.manual_seed(0)
    model = whiten(plain(), Chain(FeatureWhitening(power=1.0), EigenbasisScaling()))
    optimizer = Noted(model.parameters())
    for step in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(batch(step)[0]), batch(step)[1]).backward()
        whitened = model[4].weight.grad.clone()
        optimizer.step()
    assert (optimizer.seen[-1][-2] - whitened).norm() > 0.1
    assert model[4].transform.is_watching and len(report(model).rows) == 3 * 3


@compilers_may_warn
def test_a_compiled_model_trains_alike():
    """Every batch is observed: in directions that none has shown, rounding chooses the basis."""
    eager, compiled = (whiten(plain(), EVERY_STEP) for _ in range(2))
    train(eager, range(20))
    train(compiled, range(20), call=torch.compile(compiled))
    torch.testing.assert_close(compiled.state_dict(), eager.state_dict(), rtol=1e-6, atol=1e-6)


@compilers_may_warn
def test_a_compiled_step_of_the_optimizer_is_the_same():
    eager, other = (whiten(plain(), EVERY_STEP) for _ in range(2))
    train(eager, range(5))
    optimizer = torch.optim.AdamW(other.parameters(), 0.01)
    step = torch.compile(optimizer.step)
    for number in range(5):
        optimizer.zero_grad()
        F.cross_entropy(other(batch(number)[0]), batch(number)[1]).backward()
        step()
    assert other[0].transform.num_steps == 5
    for one, expected in zip(other.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(one, expected, rtol=0, atol=1e-5)  # a compiled AdamW computes in float32 in part


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"damping": -1}, "damping=-1 is not possible: give a number of at least 0"),
        ({"variance_decay": 1.0}, r"variance_decay=1.0 is not possible: give a number in \[0, 1\)"),
        ({"interval": 0}, "interval=0 is not possible: give an integer of at least 1, or 'auto'"),
        ({"features": "channel"}, "features='channel' is not possible"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        EigenbasisScaling(**options)


def test_it_has_a_name_and_its_cost_is_told():
    model = whiten(plain(), "eigenbasis", interval=5, features="kronecker")
    assert model[0].transform.interval == 5
    made = estimate(plain(), "eigenbasis", features="kronecker")
    train(model, range(3))
    shown = report(model)
    kept = [buffer for i in (0, 2, 4) for factor in model[i].transform.factors() for buffer in factor.buffers()]
    kept += [model[i].transform.variance for i in (0, 2, 4)]
    assert made.bytes == shown.bytes == sum(buffer.nbytes for buffer in kept)
    assert {row.whitened for row in shown.rows} == {None} and all(row.condition >= 1 for row in shown.rows)
    assert "–" in str(shown) and "eigenbasis" in str(made)
    assert "eigenbases, features='kronecker'" in str(model[0])


def test_it_is_far_ahead_of_adamw_at_adamws_best_rate():
    """Inputs of unequal variances that are correlated; three rates, of which AdamW has the best of 0.003 to 0.03."""
    ratios = []
    for seed in range(5):
        torch.manual_seed(seed)
        mixing = torch.randn(20, 20) @ torch.logspace(0, -2, 20).diag()
        teacher = nn.Sequential(nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, 3))
        network = nn.Sequential(nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, 3))
        data = torch.randn(512, 20)
        targets, x = teacher(data).detach(), data @ mixing
        best = []
        for make in (copy.deepcopy, lambda one: whiten(copy.deepcopy(one), "eigenbasis")):
            losses = []
            for rate in (0.003, 0.01, 0.03):
                model = make(network)
                optimizer = torch.optim.AdamW(model.parameters(), rate)
                for _ in range(150):
                    optimizer.zero_grad()
                    loss = F.mse_loss(model(x), targets)
                    loss.backward()
                    optimizer.step()
                losses.append(loss.item())
            best.append(min(losses))
        ratios.append(best[1] / best[0])
    assert sorted(ratios)[2] < 0.5


def test_a_layer_that_starts_afresh_forgets_its_steps():
    model, fresh = train(whiten(plain(), EVERY_STEP), range(5)), whiten(plain(), EVERY_STEP)
    model[4].reset_parameters()
    assert model[4].transform.num_steps == 0 and not model[4].transform.variance.any()
    for one in (fresh, model):
        one.load_state_dict({name: p.detach() for name, p in whiten(plain(), EVERY_STEP).named_parameters()})
    optimizers = Noted(model[4].parameters()), Noted(fresh[4].parameters())
    for one, optimizer in zip((model, fresh), optimizers, strict=True):
        train(one, range(5, 8), optimizer)
    torch.testing.assert_close(optimizers[0].seen, optimizers[1].seen, rtol=0, atol=0)


def test_a_gradient_that_is_replaced_while_the_optimizer_steps_stays():
    class Clears(Noted):
        def step(self):
            super().step()
            self.zero_grad()

    model = train(whiten(plain(), EVERY_STEP), range(3))
    train(model, range(3, 5), Clears(model.parameters()))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_state_of_the_default_loads_with_a_warning():
    torch.manual_seed(0)
    other, model = whiten(nn.Linear(4, 3)), whiten(nn.Linear(4, 3), "eigenbasis")
    other(torch.randn(8, 4)).sum().backward()
    with pytest.warns(UserWarning, match="made with other options"):
        model.load_state_dict(other.state_dict())
    torch.testing.assert_close(model.weight, other.weight, rtol=0, atol=0)
    assert model.transform.num_steps == 0 and not model.transform.variance.any()
