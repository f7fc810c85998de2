"""Two-stage training: HWO is whitening, the gains minimise their model, and no stage raises the error."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from whiten_layers import FeatureWhitening, TwoStageNetwork, WhitenedLinear, two_stage
from whiten_layers.inverse.cholesky import cholesky
from whiten_layers.two_stage import (
    augmented,
    gain_model,
    inverse_second_moment,
    least_squares,
    least_squares_cost,
    negative_gradient,
)

TRAINERS = [(direction, gains) for direction in ("bp", "hwo") for gains in (False, True)]
each_trainer = pytest.mark.parametrize("direction, gains", TRAINERS)


def problem(rows=60, features=4, outputs=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(rows, features, generator=generator, dtype=torch.float64)
    inputs = noise + 0.7 * noise.cumsum(1) + 0.5
    weight = torch.randn(features, outputs, generator=generator, dtype=torch.float64)
    return inputs, (inputs @ weight).sin() + 0.1 * inputs @ weight.cos()


def hidden_stage(seed=0, features=4):
    """What a hidden stage begins with, at a network of which only the outputs are solved for."""
    inputs, targets = problem(features=features, seed=seed)
    network = TwoStageNetwork(5, seed=seed)
    next(network.iterate(inputs, targets))
    rows = augmented(inputs)
    values = (rows @ network.hidden_weight.mT).sigmoid()
    residuals = targets - values @ network.output_weight.mT - rows @ network.direct_weight.mT
    return inputs, targets, network, rows, values * (1 - values), residuals


def error(network, inputs, targets):
    return (targets - network.predict(inputs)).square().sum(-1).mean().item()


def test_hwo_is_the_gradient_on_whitened_inputs():
    inputs, targets, network, rows, slopes, residuals = hidden_stage()
    gradient = negative_gradient(rows, slopes, network.output_weight, residuals)
    direction = gradient @ inverse_second_moment(rows, 0.0)
    transform = FeatureWhitening.exact(center=True, rescale=False, power=1.0, damping=0.0)
    layer = WhitenedLinear(4, 5, dtype=torch.float64, transform=transform)
    with torch.no_grad():
        layer.weight.copy_(network.hidden_weight[:, :-1])
        layer.bias.copy_(network.hidden_weight[:, -1])
    found = []
    for _ in range(2):  # the first gradient is the plain one, of which P is not yet known
        layer.zero_grad()
        outputs = layer(inputs).sigmoid() @ network.output_weight.mT + rows @ network.direct_weight.mT
        (targets - outputs).square().sum(1).mean().backward()
        found.append(-torch.cat([layer.weight.grad, layer.bias.grad[:, None]], 1))
    torch.testing.assert_close(found[0], gradient, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found[1], direction, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("whitened", [False, True])
def test_the_gradient_and_the_models_are_autograds(whitened):
    _, targets, network, rows, slopes, residuals = hidden_stage()
    gradient = negative_gradient(rows, slopes, network.output_weight, residuals)
    direction = gradient @ inverse_second_moment(rows, 1e-8) if whitened else gradient

    def outputs(gains):
        weight = network.hidden_weight + direction * gains
        return (rows @ weight.mT).sigmoid() @ network.output_weight.mT + rows @ network.direct_weight.mT

    def loss(gains):
        return (targets - outputs(gains)).square().sum(1).mean()

    start = torch.zeros(5, dtype=torch.float64)
    curvature, slope = gain_model(direction, gradient, rows, slopes, network.output_weight)
    torch.testing.assert_close(slope, -torch.autograd.functional.jacobian(loss, start), rtol=1e-9, atol=1e-12)
    jacobian = torch.autograd.functional.jacobian(outputs, start).flatten(0, 1)
    torch.testing.assert_close(curvature, 2 / len(rows) * jacobian.mT @ jacobian, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("whitened", [False, True])
def test_no_line_through_the_solved_gains_leads_lower(whitened, seed):
    *_, network, rows, slopes, residuals = hidden_stage(seed)
    gradient = negative_gradient(rows, slopes, network.output_weight, residuals)
    direction = gradient @ inverse_second_moment(rows, 1e-8) if whitened else gradient
    curvature, slope = gain_model(direction, gradient, rows, slopes, network.output_weight)
    gains = least_squares(curvature, slope.unsqueeze(1)).squeeze(1)

    def model(gains):
        return gains @ curvature @ gains / 2 - slope @ gains

    lowest, generator = model(gains), torch.Generator().manual_seed(0)
    for _ in range(100):
        line = gains.norm() * torch.randn(5, generator=generator, dtype=torch.float64)
        for step in (-1.0, -0.1, -1e-3, 1e-3, 0.1, 1.0):
            assert model(gains + step * line) >= lowest - 1e-12 * lowest.abs()
    moved = slopes * (rows @ (direction * gains).mT) @ network.output_weight.mT
    newton = (residuals * moved).sum() / moved.square().sum()
    assert newton == pytest.approx(1, rel=1e-6)  # with optimal gains nothing is left for the scalar step


@each_trainer
def test_features_without_information_leave_every_step_finite(direction, gains):
    inputs, targets = problem()
    copies = torch.cat([inputs, inputs[:, :2], torch.zeros(60, 1).double(), torch.ones(60, 1).double()], 1)
    network = TwoStageNetwork(5, direction=direction, gains=gains, iterations=10).fit(copies, targets)
    assert network.hidden_weight.isfinite().all() and network.direct_weight.isfinite().all()
    assert network.history[-1].error < network.history[0].error


@settings(deadline=None, max_examples=60)
@given(
    trainer=st.sampled_from(TRAINERS),
    activation=st.sampled_from(["sigmoid", "tanh"]),
    rows=st.integers(1, 30),
    features=st.integers(1, 5),
    outputs=st.integers(1, 3),
    hidden=st.integers(1, 6),
    scales=st.lists(st.sampled_from([0.0, 1e-6, 1.0, 1e3]), min_size=5, max_size=5),
    seed=st.integers(0, 1000),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_no_stage_raises_the_training_error(trainer, activation, rows, features, outputs, hidden, scales, seed, dtype):
    inputs, targets = problem(rows, features, outputs, seed)
    inputs = inputs * torch.tensor(scales[:features], dtype=torch.float64)
    options = {"direction": trainer[0], "gains": trainer[1], "activation": activation, "dtype": dtype, "seed": seed}
    network = TwoStageNetwork(hidden, iterations=6, **options)
    last = torch.inf
    for progress in network.iterate(inputs, targets):
        assert progress.error <= progress.hidden_error <= last
        last = progress.error
        # The same by predictions, to the rounding of what is added up in them.
        rows = augmented(inputs).to(dtype)
        terms = network.output_weight.abs().sum() + (rows.abs() @ network.direct_weight.mT.abs()).max()
        found = error(network, inputs.to(dtype), targets.to(dtype))
        assert found**0.5 <= last**0.5 + 10 * torch.finfo(dtype).eps * (1 + terms.item())


@pytest.mark.parametrize("size", [1e120, 1e150])
@each_trainer
def test_inputs_so_large_that_curvatures_overflow_leave_the_weights_finite(direction, gains, size):
    inputs, targets = problem()
    network = TwoStageNetwork(5, direction=direction, gains=gains, iterations=3).fit(size * inputs, targets)
    assert network.hidden_weight.isfinite().all() and network.history[-1].error <= network.history[0].hidden_error


def test_the_caller_of_iterate_keeps_its_own_mode():
    for _ in TwoStageNetwork(3, iterations=2).iterate(*problem()):
        assert torch.is_grad_enabled()


def test_with_gains_fewer_iterations_reach_an_error():
    inputs, targets = problem(200, 6)
    for direction in ("bp", "hwo"):
        plain, gains = (
            TwoStageNetwork(8, direction=direction, gains=gains, iterations=30).fit(inputs, targets)
            for gains in (False, True)
        )
        assert gains.history[-1].error < plain.history[-1].error


@each_trainer
@pytest.mark.parametrize("rows, features, outputs, hidden", [(50, 3, 2, 4), (80, 7, 1, 5), (30, 2, 4, 9)])
def test_multiplications_of_products_are_those_that_are_done(direction, gains, rows, features, outputs, hidden):
    """Exactly: the counter sees every product, and no least squares and no inverse."""
    inputs, targets = problem(rows, features, outputs)
    network = TwoStageNetwork(hidden, direction=direction, gains=gains, iterations=7)
    with FlopCounterMode(display=False) as counter:
        network.fit(inputs, targets)
    width, solved = features + 1, len(network.history)
    others = solved * least_squares_cost(rows, hidden + width, outputs)
    others += (solved - 1) * gains * least_squares_cost(width, width, 1) + (direction == "hwo") * (width**3 // 2)
    assert network.multiplications == network.history[-1].multiplications
    assert counter.get_total_flops() / 2 == network.multiplications - others


def test_several_batches_lower_the_error_of_all():
    inputs, targets = problem(600, 5)
    network = TwoStageNetwork(6, batches=3, iterations=20, seed=1).fit(inputs, targets)
    assert len(network.history) == 21 and network.history[-1].error < 0.9 * network.history[0].error
    assert network.history[-1].error == pytest.approx(error(network, inputs, targets))


def test_targets_of_one_dimension_and_a_fit_anew():
    inputs, targets = problem(outputs=1)
    flat = TwoStageNetwork(4, iterations=3).fit(inputs, targets.squeeze(1))
    column = TwoStageNetwork(4, iterations=5).fit(inputs, 2 * targets)
    assert flat.predict(inputs).shape == (60,) and column.predict(inputs).shape == (60, 1)
    before = column.history
    column.iterations = 3
    column.fit(inputs, targets)
    assert before != column.history == flat.history
    assert len(flat.history) == 4
    torch.testing.assert_close(flat.predict(inputs), column.predict(inputs).squeeze(1), rtol=0, atol=0)


def test_it_ends_where_nothing_would_change():
    targets = problem()[1]
    network = TwoStageNetwork(3, iterations=50).fit(torch.zeros(60, 4), targets)
    assert len(network.history) <= 3 and network.history[-1].error == pytest.approx(
        (targets - targets.mean(0)).square().sum(1).mean().item()
    )


@pytest.mark.parametrize(
    "options, message",
    [
        ({"hidden": 0}, "hidden=0 is not possible: give an integer of at least 1"),
        ({"direction": "lm"}, "direction='lm' is not possible: give one of bp, hwo"),
        ({"gains": 1}, "gains=1 is not possible: give True or False"),
        ({"activation": "relu"}, "activation='relu' is not possible: give one of sigmoid, tanh"),
        ({"damping": -1.0}, r"damping=-1.0 is not possible: give a number in \[0, 1\]"),
        ({"dtype": torch.float16}, "dtype=torch.float16 is not possible"),
    ],
)
def test_a_wrong_option_is_named_with_its_value_and_the_choices(options, message):
    with pytest.raises(ValueError, match=message):
        TwoStageNetwork(**({"hidden": 3} | options))


@pytest.mark.parametrize(
    "inputs, targets, message",
    [
        (torch.zeros(3), torch.zeros(3), r"inputs of shape \(3,\)"),
        (torch.zeros(3, 2), torch.zeros(4, 1), "3 rows of inputs and 4 of targets do not fit"),
        (torch.zeros(3, 2), torch.full((3, 1), float("nan")), "targets hold a NaN or Inf"),
        (torch.zeros(0, 2), torch.zeros(0, 1), r"inputs of shape \(0, 2\)"),
        (torch.zeros(1, 2), torch.zeros(1, 1), "batches=2 is not possible: there are 1 rows"),
    ],
)
def test_data_that_do_not_fit_are_an_error(inputs, targets, message):
    with pytest.raises(ValueError, match=message):
        TwoStageNetwork(3, batches=2).fit(inputs, targets)


def test_arrays_and_a_network_that_was_not_trained():
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    with pytest.raises(RuntimeError, match="call fit first"):
        TwoStageNetwork(2).predict(x)
    network = TwoStageNetwork(2, iterations=2).fit(x.numpy(), x[:, 0].numpy())
    assert network.predict(x.numpy()).shape == (40,)
    with pytest.raises(ValueError, match="inputs of 2 features are not those of the training inputs"):
        network.predict(x[:, :2])


def test_what_cannot_be_inverted_is_damped_ten_times_more(monkeypatch):
    rows, tried = problem()[0], []

    def failing(matrices):
        tried.append(matrices)
        return cholesky(matrices * (torch.nan if len(tried) < 3 else 1))

    monkeypatch.setattr(two_stage, "cholesky", failing)
    inverse = inverse_second_moment(rows, 1e-4)
    second = rows.mT @ rows / len(rows)
    damping = 1e-2 * second.diagonal().mean() * torch.eye(4, dtype=torch.float64)
    torch.testing.assert_close(inverse, torch.linalg.inv(second + damping))
