"""What holds for every whitening normalization: the formulas, their gradients, what a batch normalization promises."""

import copy
import itertools
import re

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from whiten_layers import convert_batchnorm

from .. import reference
from .cases import CHANNELS, KINDS, PLAIN, any_kind, any_shape, draw, make, state

EPS = 1e-5


def truth(layer, x, kind, whitening=None):
    """The layer's output by the formulas, with plain autograd."""

    def matrix(covariance, number):
        if kind == "decorrelated":
            return reference.inverse_root(covariance, EPS)
        if kind == "iter_norm":
            return reference.iterated_root(covariance, EPS, layer.iterations)
        size = len(covariance)
        learned = whitening[number, :size, :size]
        if layer.training:
            step = float(layer.step_size)
            learned = reference.learning_whitening(learned, covariance.detach(), step, layer.criterion, EPS)
        return learned @ torch.diag((covariance.diagonal() + EPS) ** -0.5)

    def running(number):
        first = number * layer.width
        mean = layer.running_mean[first : first + layer.width]
        if kind == "decorrelated":
            return mean, layer.running_covariance[number, : len(mean), : len(mean)]
        return mean, torch.diag(layer.running_var[first : first + layer.width]) if kind == "swbn" else None

    if kind == "iter_norm" and not layer.training:
        groups = layer.running_whitening

        def matrix(_, number):
            size = len(running(number)[0])
            return groups[number, :size, :size]

    moments = None if layer.training else running
    return reference.normalized(x, layer.weight, layer.bias, layer.group_size, matrix, moments)


@pytest.mark.parametrize("kind, criterion", [*((kind, "kl") for kind in KINDS), ("swbn", "frobenius")])
@any_shape
@pytest.mark.parametrize("group_size", [None, 3], ids=["together", "ragged"])
@pytest.mark.parametrize("training", [True, False])
def test_outputs_and_gradients_are_those_of_the_formulas(kind, shape, group_size, criterion, training):
    options = {"criterion": criterion, "step_size": 0.01} if kind == "swbn" else {}
    x = draw(shape).requires_grad_()
    layer = make(kind, x, group_size=group_size, **options)
    if not training:
        layer(draw((16, *shape[1:]), seed=2))
    layer.train(training)
    whitening = layer.whitening.clone() if kind == "swbn" else None
    output = layer(x)
    expected = truth(layer, x, kind, whitening)
    torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-9)
    direction = draw(shape, seed=3)
    inputs = [x, layer.weight, layer.bias]
    gradients = [torch.autograd.grad(result, inputs, direction) for result in (output, expected)]
    for ours, theirs in zip(*gradients, strict=True):
        # Covariances of few samples are nearly singular: what is 1/√ε there magnifies rounding to its cube.
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6 * float(theirs.abs().max()))


@pytest.fixture(
    params=itertools.product(KINDS, [True, False], [{}, {"group_size": 3}, {"affine": False}, {"bias": False}]), ids=str
)
def smooth(request):
    """A layer whose matrix does not learn, in training or not, and what it can be differentiated by."""
    kind, training, options = request.param
    x = draw((4, CHANNELS, 2)).requires_grad_()
    layer = make(kind, x, eps=1e-2, **options, **({"step_size": 0.0} if kind == "swbn" else {}))
    layer(draw((4, CHANNELS, 2), seed=2))
    return layer.train(training), [x, *layer.parameters()]


def test_gradcheck(smooth):
    layer, inputs = smooth
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), inputs)


def test_equal_eigenvalues_have_a_gradient():
    x = torch.linalg.qr(draw((12, 4)) - draw((12, 4)).mean(0))[0] * 12**0.5  # of covariance I, all of it degenerate
    layer = KINDS["decorrelated"][0](4, group_size=None, dtype=torch.float64)
    assert torch.linalg.cond(x.T.cov(correction=0)) < 1 + 1e-9
    assert torch.autograd.gradcheck(layer, [x.requires_grad_()])
    constant = torch.full((6, 4), 2.0, dtype=torch.float64, requires_grad=True)  # of no variance at all
    layer(constant).square().sum().backward()
    assert constant.grad.isfinite().all()


def test_second_derivatives(smooth):
    layer, inputs = smooth
    assert torch.autograd.gradgradcheck(lambda x, *_: layer(x), inputs)
    first = [torch.autograd.grad(layer(inputs[0]).sin().sum(), inputs, create_graph=again) for again in (False, True)]
    torch.testing.assert_close(*first, rtol=1e-9, atol=1e-9)


def test_second_derivatives_where_eigenvalues_are_equal():
    layer = KINDS["decorrelated"][0](4, group_size=None, dtype=torch.float64)
    x = torch.linalg.qr(draw((12, 4)) - draw((12, 4)).mean(0))[0] * 12**0.5  # of covariance I, all of it degenerate
    assert torch.autograd.gradgradcheck(layer, [x.requires_grad_()])
    dead = torch.cat([draw((12, 2)), torch.full((12, 2), 2.0, dtype=torch.float64)], 1).requires_grad_()
    (first,) = torch.autograd.grad(layer(dead).square().sum(), dead, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), dead)
    assert second.isfinite().all()


@any_kind
def test_a_gradient_penalty_asks_only_for_what_is_needed(kind):
    layer = make(kind, draw((6, CHANNELS)), **({"step_size": 0.0} if kind == "swbn" else {}))
    layer.weight.requires_grad_(False)
    x = draw((6, CHANNELS)).requires_grad_()
    (of_input,) = torch.autograd.grad(layer(x).sin().sum(), x, create_graph=True)
    of_input.square().sum().backward()
    assert x.grad.isfinite().all() and x.grad.any() and layer.weight.grad is None and layer.bias.grad is not None
    (of_bias,) = torch.autograd.grad(layer(x.detach()).sin().sum(), layer.bias, create_graph=True)
    torch.testing.assert_close(of_bias, layer(x.detach()).cos().sum(0))


@any_kind
def test_only_the_biases_gradient_is_that_of_all_three(kind):
    layer = make(kind, draw((6, CHANNELS)), **({"step_size": 0.0} if kind == "swbn" else {}))
    x = draw((6, CHANNELS))
    (expected,) = torch.autograd.grad(layer(x).sin().sum(), layer.bias)
    layer.weight.requires_grad_(False)
    layer(x).sin().sum().backward()
    torch.testing.assert_close(layer.bias.grad, expected)


@pytest.mark.parametrize("group_size", [None, 3])
def test_outputs_are_white(group_size):
    noise = torch.randn(64, CHANNELS, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mild = noise + 0.4 * noise.roll(1, 1)  # condition number 5: the iteration comes to its end before rounding grows

    def covariances(kind, x, **options):
        layer = KINDS[kind][1](CHANNELS, affine=False, group_size=group_size, dtype=torch.float64, **options)
        return [channels.cov(correction=0).view(len(channels), -1) for channels in groups(layer(x))]

    def groups(samples):
        return samples.transpose(0, 1).flatten(1).split(group_size or CHANNELS)

    for covariance in covariances("decorrelated", draw(noise.shape), eps=1e-9):  # eigenvalues λ / (λ + ε)
        torch.testing.assert_close(covariance, torch.eye(len(covariance), dtype=torch.float64), rtol=0, atol=1e-6)
    for covariance in covariances("iter_norm", mild, eps=1e-9, iterations=9):
        torch.testing.assert_close(covariance, torch.eye(len(covariance), dtype=torch.float64), rtol=0, atol=1e-6)
    for covariance, group in zip(covariances("iter_norm", mild, eps=0.0), groups(mild), strict=True):
        # After five steps an eigenvalue λ of Σ/tr Σ has come to λ p², the same iteration on a number.
        values = torch.linalg.eigvalsh(group.cov(correction=0).view(len(group), -1))
        values, p = values / values.sum(), torch.ones_like(values)
        for _ in range(5):
            p = 1.5 * p - 0.5 * p**3 * values
        torch.testing.assert_close(torch.linalg.eigvalsh(covariance), (values * p**2).sort().values)


def test_many_steps_of_iter_norm_come_to_decorrelated_batch_norm_in_float32():
    x = draw((64, CHANNELS, 2, 2), dtype=torch.float32)
    covariance = x.transpose(0, 1).flatten(1).cov(correction=0)
    exact = KINDS["decorrelated"][1](CHANNELS, group_size=None)(x)
    # Rounding of 6e-8 times the condition number; each step doubles the smallest eigenvalue at least.
    assert torch.linalg.cond(covariance) < 1e3
    for iterations in (15, 30):
        torch.testing.assert_close(KINDS["iter_norm"][1](CHANNELS, iterations=iterations)(x), exact, rtol=0, atol=6e-5)


@any_kind
@pytest.mark.parametrize("momentum", [0.3, None])
def test_running_statistics_are_averages_and_evaluation_leaves_them_alone(kind, momentum):
    batches = [draw((6, CHANNELS, 3, 3), seed=seed) for seed in range(4)]
    layer = make(kind, batches[0], momentum=momentum, group_size=3)
    plain = nn.BatchNorm2d(CHANNELS, momentum=momentum, dtype=torch.float64)
    for batch in batches:
        layer(batch), plain(batch)
    torch.testing.assert_close(layer.running_mean, plain.running_mean)
    assert layer.num_batches_tracked == 4
    if kind == "swbn":
        torch.testing.assert_close(layer.running_var, plain.running_var)
    if kind == "decorrelated":
        diagonal = layer.running_covariance.diagonal(dim1=1, dim2=2).flatten()[:CHANNELS]
        torch.testing.assert_close(diagonal, plain.running_var)
    if kind == "iter_norm" and momentum is None:
        groups = [batch.transpose(0, 1).flatten(1)[:3].cov(correction=0) for batch in batches]
        mean = sum(reference.iterated_root(group, EPS, 5) for group in groups) / 4
        torch.testing.assert_close(layer.running_whitening[0], mean)
    before = state(layer.eval())
    first, alone = layer(batches[0]), layer(batches[0][:1])
    torch.testing.assert_close(first[:1], alone)  # by the running statistics: a sample's output is its own
    assert all(torch.equal(before[name], value) for name, value in layer.named_buffers())


@any_kind
def test_without_running_statistics_evaluation_takes_the_batchs(kind):
    x = draw((6, CHANNELS))
    layer = make(kind, x, track_running_stats=False)
    assert layer.running_mean is None and "num_batches_tracked" not in layer.state_dict()
    if kind == "swbn":
        layer.step_size.zero_()
    trained = layer(x)
    torch.testing.assert_close(layer.eval()(x), trained)


@any_kind
def test_errors_are_batch_normalizations(kind):
    for dims, (ours, theirs) in enumerate(zip(KINDS[kind], PLAIN, strict=True), start=1):
        ours, theirs = ours(4), theirs(4)
        for shape in [(4,), (3, 4), (3, 4, 5), (3, 4, 5, 5), (3, 4, 5, 5, 5), (1, 4, *[1] * dims), (1, 4)]:
            x = torch.randn(shape)
            try:
                theirs(x)
            except ValueError as error:
                with pytest.raises(ValueError, match=re.escape(str(error))):
                    ours(x)
            else:
                assert ours(x).shape == x.shape
        with pytest.raises(ValueError, match=r"expected 4 channels in dimension 1 \(got input size"):
            ours(torch.randn(3, 5, *[2] * (dims if dims > 1 else 0)))
        with pytest.raises(ValueError, match=r"floating-point type \(got torch.int64\)"):
            ours(torch.ones(3, 4, *[2] * (dims if dims > 1 else 0), dtype=torch.long))


@pytest.mark.parametrize(
    "kind, options",
    [
        ("iter_norm", {"iterations": 0}),
        ("iter_norm", {"group_size": 0}),
        ("decorrelated", {"num_features": 0}),
        ("swbn", {"criterion": "mse"}),
        ("swbn", {"step_size": -1.0}),
    ],
)
def test_an_option_that_is_not_possible_is_named(kind, options):
    (name, value), *_ = options.items()
    with pytest.raises(ValueError, match=f"{name}={value!r} is not possible: give"):
        KINDS[kind][0](**{"num_features": 4} | options)


@any_kind
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("group_size", [None, 3])
def test_a_bad_batch_leaves_no_mark_and_is_counted(kind, momentum, value, group_size):
    x = draw((6, CHANNELS, 2, 2))
    layer = make(kind, x, momentum=momentum, group_size=group_size, **({"step_size": 0.1} if kind == "swbn" else {}))
    layer(x)
    before = state(layer)
    x[3, 6, 1, 0] = value  # of the last group
    output = layer(x.requires_grad_())
    output.sum().backward()  # runs to its end
    assert not output.isfinite().all()
    assert before.pop("num_batches_skipped") == 0 and layer.num_batches_skipped == 1
    assert all(torch.equal(value, layer.get_buffer(name)) for name, value in before.items())
    assert layer(draw((6, CHANNELS, 2, 2), seed=5)).isfinite().all()


@any_kind
@pytest.mark.parametrize("rows, scale, mean", [(3, 1, 0), (5, 100, 0), (64, 1, 1000)])
def test_float32_is_near_float64_where_it_is_hard(kind, rows, scale, mean):
    """Fewer samples than channels, large ones, ones far from zero: errors that 1/√ε magnifies, not more."""
    results = []
    narrow = make(kind, draw((rows, CHANNELS)), dtype=torch.float32)
    for layer, dtype in [(copy.deepcopy(narrow), torch.float32), (narrow.double(), torch.float64)]:
        x = (scale * draw((rows, CHANNELS), dtype=torch.float32) + mean).to(dtype).requires_grad_()
        output = layer(x)
        output.backward(draw((rows, CHANNELS), 2, dtype))
        results.append((output.detach().double(), x.grad.double()))
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).norm() <= 0.03 * theirs.norm()


@any_kind
def test_one_tensor_of_the_inputs_size_is_kept_for_backward_the_input(kind):
    x = torch.randn(32, 8, 16, 16).requires_grad_()
    layer = KINDS[kind][1](8)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        layer(x)
    large = [tensor for tensor in kept if tensor.numel() >= x.numel() // 8]
    assert [tensor.data_ptr() for tensor in large] == [x.data_ptr()]


@any_kind
@pytest.mark.parametrize("training", [True, False])
def test_under_autocast_nothing_is_narrower_than_float32(kind, training):
    x = draw((6, CHANNELS, 3, 3), dtype=torch.bfloat16)
    narrow, wide = (make(kind, x, dtype=torch.float32).train(training) for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        output = narrow(x)
        same = narrow.eval()(x.float())
    assert output.dtype == torch.bfloat16 and same.dtype == torch.float32
    torch.testing.assert_close(output, wide(x.float()).bfloat16(), rtol=0, atol=0)
    assert all(torch.equal(a, b) for a, b in zip(narrow.buffers(), wide.buffers(), strict=True))


@any_kind
def test_a_layer_cast_to_bfloat16_keeps_its_statistics_in_float32(kind):
    layer = KINDS[kind][0](CHANNELS).bfloat16()
    layer(draw((6, CHANNELS), dtype=torch.bfloat16)).sum().backward()
    assert layer.weight.dtype == layer.weight.grad.dtype == torch.bfloat16
    assert {b.dtype for b in layer.buffers()} == {torch.float32, torch.long}
    assert {b.dtype for b in layer.double().buffers()} == {torch.float64, torch.long}


@any_kind
@pytest.mark.parametrize("group_size", [None, 3])
def test_memory_format_stays(kind, group_size):
    x = draw((3, CHANNELS, 4, 5))
    plain, strided = make(kind, x, group_size=group_size), make(kind, x, group_size=group_size)
    inputs = x.clone().requires_grad_(), x.clone(memory_format=torch.channels_last).requires_grad_()
    outputs = plain(inputs[0]), strided(inputs[1])
    torch.testing.assert_close(*outputs)
    assert outputs[1].is_contiguous(memory_format=torch.channels_last)
    direction = draw(x.shape, seed=2)
    for output in outputs:
        output.backward(direction)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)


@any_kind
@pytest.mark.filterwarnings("ignore")  # the compilers of some versions warn of themselves
def test_compiled_is_eager_in_one_graph(kind):
    x = draw((6, CHANNELS, 3, 3))
    layer = make(kind, x, group_size=3)
    compiled = torch.compile(copy.deepcopy(layer), backend="aot_eager", fullgraph=True)
    for seed in range(3):
        results = []
        for one in (layer, compiled):
            input = draw((6, CHANNELS, 3, 3), seed).requires_grad_()
            one(input).backward(x)
            results.append(input.grad)
        torch.testing.assert_close(*results)
    for name, buffer in compiled.named_buffers():
        torch.testing.assert_close(buffer, layer.get_buffer(name.removeprefix("_orig_mod.")))


@any_kind
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_counts_a_batch_once(kind, use_reentrant):
    options = {"step_size": 0.1} if kind == "swbn" else {}
    x = draw((6, CHANNELS))
    plain, checkpointed = make(kind, x, **options), make(kind, x, **options)
    gradients = []
    for layer in (plain, checkpointed):
        input = x.clone().requires_grad_()
        run = (lambda x: checkpoint(checkpointed, x, use_reentrant=use_reentrant)) if layer is checkpointed else layer
        (run(input) * draw((6, CHANNELS), 4)).sum().backward()
        gradients.append(input.grad)
    torch.testing.assert_close(*gradients, rtol=0, atol=0)
    assert all(torch.equal(a, b) for a, b in zip(plain.buffers(), checkpointed.buffers(), strict=True))


@any_kind
def test_an_evaluating_pass_outlives_a_training_one(kind):
    x = draw((6, CHANNELS)).requires_grad_()
    layer = make(kind, x)
    expected = torch.autograd.grad(layer.eval()(x).sin().sum(), x)[0]
    output = layer(x)
    layer.train()(x)
    torch.testing.assert_close(torch.autograd.grad(output.sin().sum(), x)[0], expected)


@any_kind
def test_two_forward_passes_before_two_backward_passes_and_work_in_place(kind):
    x = draw((6, CHANNELS)).requires_grad_()
    layer, results = make(kind, x), []
    first, second = (torch.relu_(layer(x)).sin().sum() for _ in range(2))
    for loss in (second, first):
        results.append(torch.autograd.grad(loss, x)[0])
    if kind != "swbn":  # whose matrix has moved between
        torch.testing.assert_close(*results)
    assert all(result.isfinite().all() for result in results)


@any_kind
@pytest.mark.parametrize("training", [True, False])
def test_input_and_layer_of_different_precision(kind, training):
    x = draw((30, CHANNELS), dtype=torch.float32)
    layer = make(kind, x).train(training)
    torch.testing.assert_close(layer(x), layer(x.double()).float(), rtol=1e-4, atol=1e-4)


@any_kind
def test_torch_func_differentiates_what_keeps_no_running_statistics(kind):
    x, layer = draw((6, CHANNELS)), make(kind, draw((6, CHANNELS)), track_running_stats=False).eval()
    parameters = dict(layer.named_parameters())

    def loss(parameters, x):
        return torch.func.functional_call(layer, parameters, (x,)).sin().sum()

    gradients, of_input = torch.func.grad(loss, argnums=(0, 1))(parameters, x)
    expected = torch.autograd.grad(loss(parameters, x.requires_grad_()), [*parameters.values(), x])
    torch.testing.assert_close([*gradients.values(), of_input], list(expected))


@any_kind
def test_state_is_saved_copied_and_made_on_meta(kind):
    x = draw((6, CHANNELS, 2, 2))
    layer = make(kind, x, group_size=3)
    layer(x)
    layer.eval()
    with torch.device("meta"):
        other = KINDS[kind][1](CHANNELS, group_size=3, dtype=torch.float64)
    assert str(other) == str(layer)
    other.to_empty(device="cpu").reset_parameters()
    fresh = KINDS[kind][1](CHANNELS, group_size=3, dtype=torch.float64)
    assert all(torch.equal(a, b) for a, b in zip(fresh.state_dict().values(), other.state_dict().values(), strict=True))
    other.load_state_dict(layer.state_dict())
    for one in (other.eval(), copy.deepcopy(layer)):
        assert torch.equal(one(x), layer(x))


@any_kind
def test_torchs_converter_of_batch_normalizations_leaves_them_alone(kind):
    model = nn.Sequential(KINDS[kind][0](4))
    assert type(nn.SyncBatchNorm.convert_sync_batchnorm(model)[0]) is KINDS[kind][0]


def test_a_batch_normalization_that_counts_no_batches_is_converted():
    plain = nn.BatchNorm2d(4)
    plain.num_batches_tracked = None
    made = convert_batchnorm(nn.Sequential(plain), "iter_norm")[0]
    assert made.num_batches_tracked == 0
    torch.testing.assert_close(made.running_mean, plain.running_mean)
