"""Global covariance pooling: the formulas, their gradients, what a layer promises."""

import copy
import io
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from whiten_layers import CovariancePooling1d, CovariancePooling2d

from . import reference

METHODS = ["eigh", "newton_schulz", "pade"]
LAYERS = [
    CovariancePooling2d("eigh"),
    CovariancePooling2d("newton_schulz"),
    CovariancePooling2d("newton_schulz", iterations=1),
    CovariancePooling2d("newton_schulz", iterations=9),
    CovariancePooling2d("pade"),
    CovariancePooling2d("pade", degree=1),
    CovariancePooling2d("pade", degree=12),
]
any_method = pytest.mark.parametrize("method", METHODS)
any_layer = pytest.mark.parametrize("layer", LAYERS, ids=str)


def draw(*shape, seed=1, dtype=torch.float64):
    """Samples whose channels are correlated, unequal and not centred."""
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    scale = torch.linspace(0.5, 2, shape[1], dtype=torch.float64).view(-1, *[1] * (len(shape) - 2))
    return (scale * (noise + 0.5 * noise.cumsum(1)) + 3).to(dtype)


def truth(layer, x):
    root_of = {
        "eigh": reference.square_root,
        "newton_schulz": lambda covariance: reference.newton_square_root(covariance, layer.iterations),
        "pade": lambda covariance: reference.pade_square_root(covariance, layer.degree),
    }
    return reference.covariance_pooled(x, root_of[layer.method])


def matrices(vectors):
    """The symmetric matrices that have these upper triangles."""
    size = int((2 * vectors.shape[1]) ** 0.5)
    rows, columns = torch.triu_indices(size, size)
    result = vectors.new_zeros(len(vectors), size, size)
    result[:, rows, columns] = result[:, columns, rows] = vectors
    return result


@any_layer
@pytest.mark.parametrize("shape", [(3, 4, 3, 5), (2, 1, 2, 2), (1, 6, 4, 4)])
def test_outputs_and_gradients_are_those_of_the_formulas(layer, shape):
    x = draw(*shape).requires_grad_()
    output, expected = layer(x), truth(layer, x)
    torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-9)
    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    ours, theirs = (torch.autograd.grad(result, x, direction)[0] for result in (output, expected))
    # Autograd differentiates eigenvectors: it divides by differences of eigenvalues, of 1e-2 and more.
    torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-7)


@any_layer
@pytest.mark.parametrize("shape", [(2, 5, 2, 2), (2, 7, 1, 2)])
def test_outputs_of_fewer_positions_than_channels_are_those_of_the_formulas(layer, shape):
    x = draw(*shape)
    # Of eigenvalues of 0 the reference's decomposition makes 1e-16, whose roots are 1e-8.
    torch.testing.assert_close(layer(x), truth(layer, x), rtol=1e-7, atol=1e-7)


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from(METHODS),
    st.integers(1, 3),
    st.integers(1, 5),
    st.integers(2, 7),
    st.integers(1, 6),
    st.integers(0, 2**20),
)
def test_gradcheck(method, samples, channels, positions, steps, seed):
    x = draw(samples, channels, positions, seed=seed).requires_grad_()
    assert torch.autograd.gradcheck(CovariancePooling1d(method, iterations=steps, degree=steps), [x])


@any_method
def test_equal_eigenvalues_have_a_gradient(method):
    noise = draw(12, 5)
    x = torch.linalg.qr(noise - noise.mean(0))[0].T[None].contiguous()  # of covariance I / 12
    torch.testing.assert_close(x[0].cov(correction=0), torch.eye(5, dtype=torch.float64) / 12)
    layer = CovariancePooling1d(method)
    pairs = torch.cat([x[0, :2], x[0, :2].flip(0)])[None].requires_grad_()  # two eigenvalues are equal, two are 0
    assert torch.autograd.gradcheck(layer, [x.requires_grad_()])
    layer(pairs).sum().backward()
    assert pairs.grad.isfinite().all() and pairs.grad.norm() > 0.1


@any_method
def test_rank_one_has_the_gradient_of_maps_of_rank_one(method):
    """A root has no derivative where the rank grows; here it stays."""
    torch.manual_seed(0)
    channels, positions = torch.randn(2, 4, 1).double().requires_grad_(), torch.randn(2, 1, 6).double().requires_grad_()
    layer = CovariancePooling1d(method)
    assert torch.autograd.gradcheck(lambda a, b: layer(a * b), [channels, positions])


@any_method
@pytest.mark.parametrize("value", [0.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_constant_map_has_a_root_and_a_gradient_of_0(method, value, dtype):
    x = draw(3, 4, 3, 3, dtype=dtype)
    x[1] = value
    x.requires_grad_()
    output = CovariancePooling2d(method)(x)
    output.sum().backward()
    assert not output[1].any() and not x.grad[1].any()
    assert x.grad[[0, 2]].flatten(1).any(1).all()


@any_method
@settings(deadline=None, max_examples=25)
@given(channels=st.integers(1, 5), positions=st.integers(2, 8), seed=st.integers(0, 2**20), scale=st.floats(1e-3, 1e3))
def test_invariances(method, channels, positions, seed, scale):
    layer, x = CovariancePooling1d(method), draw(2, channels, positions, seed=seed)
    output = layer(x)
    # A root of rounding errors, 1e-16, is 1e-8.
    close = {"rtol": 1e-7, "atol": 1e-7}
    order = torch.randperm(positions, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(layer(x[..., order]), output, **close)
    torch.testing.assert_close(layer(x + torch.arange(channels)[:, None]), output, **close)
    torch.testing.assert_close(layer(scale * x) / scale, output, **close)
    torch.testing.assert_close(layer(x.flip(0)), output.flip(0), **close)
    turn = torch.linalg.qr(draw(channels, channels, seed=seed))[0]
    torch.testing.assert_close(matrices(layer(turn @ x)), turn @ matrices(output) @ turn.T, **close)


@any_method
@pytest.mark.parametrize("shape", [(4, 8, 7, 7), (4, 32, 3, 3)])
@pytest.mark.parametrize("scale, mean", [(1, 0), (1e-15, 0), (1e6, 0), (1, 100)])
def test_float32_is_near_float64_where_it_is_hard(method, shape, scale, mean):
    results = []
    for dtype in (torch.float32, torch.float64):
        x = (scale * (draw(*shape, dtype=torch.float32) - 3) + mean).to(dtype).requires_grad_()
        output = CovariancePooling2d(method)(x)
        output.backward(draw(*output.shape, seed=2, dtype=dtype))
        results.append((output.detach().double(), x.grad.double()))
    for ours, theirs in zip(*results, strict=True):
        # Rounding of 6e-8: of numbers a hundred times as large as their deviations, or of the approximant's fractions,
        # which add up to 11 and leave 1 / 11. Seen: 8e-6.
        assert (ours - theirs).norm() <= 5e-5 * theirs.norm()


@any_method
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.filterwarnings("ignore")  # the compilers of some versions warn of themselves
def test_a_bad_sample_leaves_the_others_alone(method, value, compiled):
    layer = CovariancePooling2d(method)
    run = torch.compile(layer, backend="aot_eager", fullgraph=True) if compiled else layer
    x = draw(3, 4, 3, 3, dtype=torch.float32)
    good = x.clone().requires_grad_()
    layer(good).sum().backward()
    x[1, 2, 0, 1] = value
    x.requires_grad_()
    output = run(x)
    output.sum().backward()
    assert not output[1].isfinite().any() and not x.grad[1].isfinite().all()
    torch.testing.assert_close(output[[0, 2]], layer(good)[[0, 2]])
    torch.testing.assert_close(x.grad[[0, 2]], good.grad[[0, 2]])


@any_method
@pytest.mark.filterwarnings("ignore")
def test_compiled_is_eager_in_one_graph(method):
    layer = CovariancePooling2d(method)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for samples, size in [(3, 4), (3, 4), (5, 3)]:
        results = []
        for run in (layer, compiled):
            x = draw(samples, 4, size, size).requires_grad_()
            output = run(x)
            output.sin().sum().backward()
            results.append((output, x.grad))
        torch.testing.assert_close(*results)


@any_method
def test_under_autocast_nothing_is_narrower_than_float32(method):
    layer = CovariancePooling2d(method)
    results = []
    for casts in (True, False):
        x = draw(3, 6, 3, 3, dtype=torch.float32).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=casts):
            output = layer(x)
            output.sum().backward()
        results.append((output, x.grad))
    assert results[0][0].dtype == torch.float32
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


@any_method
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_inputs_have_narrow_outputs_of_float32s_numbers(method, dtype):
    layer = CovariancePooling2d(method)
    x = draw(3, 6, 3, 3, dtype=dtype).requires_grad_()
    wide = x.detach().float().requires_grad_()
    output, expected = layer(x), layer(wide)
    assert output.dtype == dtype and torch.equal(output, expected.to(dtype))
    output.sum().backward()
    expected.sum().backward()
    assert x.grad.dtype == dtype and torch.equal(x.grad, wide.grad.to(dtype))


@any_method
def test_memory_format_stays(method):
    layer = CovariancePooling2d(method)
    plain = draw(3, 4, 4, 5).requires_grad_()
    strided = plain.detach().clone(memory_format=torch.channels_last).requires_grad_()
    torch.testing.assert_close(layer(plain), layer(strided))
    for x in (plain, strided):
        layer(x).sin().sum().backward()
    torch.testing.assert_close(plain.grad, strided.grad)
    assert strided.grad.is_contiguous(memory_format=torch.channels_last)


@any_method
def test_one_dimension_is_two_of_which_one_is_1(method):
    x = draw(3, 4, 6)
    assert torch.equal(CovariancePooling1d(method)(x), CovariancePooling2d(method)(x.unsqueeze(-1)))


@any_method
def test_an_empty_batch_and_the_meta_device(method):
    layer = CovariancePooling2d(method)
    x = torch.randn(0, 4, 3, 3, requires_grad=True)
    output = layer(x)
    output.sum().backward()
    assert output.shape == (0, 10) and x.grad.shape == x.shape
    assert layer(torch.empty(2, 4, 3, 3, device="meta")).shape == (2, 10)


@any_layer
def test_it_is_copied_saved_and_has_no_state(layer):
    x = draw(2, 3, 3, 3)
    assert not layer.state_dict()
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(file)):
        assert str(other) == str(layer) and torch.equal(other(x), layer(x))


@any_method
def test_a_model_that_has_it_is_traced(method):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), CovariancePooling2d(method), nn.Linear(10, 2))
    x = torch.randn(2, 3, 5, 5)
    assert torch.equal(torch.fx.symbolic_trace(model)(x), model(x))


@any_method
def test_torch_func_differentiates_and_a_second_derivative_is_an_error(method):
    layer, x = CovariancePooling1d(method), draw(2, 3, 5).requires_grad_()
    (gradient,) = torch.autograd.grad(layer(x).sin().sum(), x, create_graph=True)
    torch.testing.assert_close(torch.func.grad(lambda x: layer(x).sin().sum())(x.detach()), gradient.detach())
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"method": "svd"}, "method='svd' is not possible: give one of eigh, newton_schulz, pade"),
        ({"iterations": 0}, "iterations=0 is not possible: give an integer of at least 1"),
        ({"iterations": 2.5}, "iterations=2.5 is not possible"),
        ({"degree": True}, "degree=True is not possible"),
    ],
)
def test_an_option_that_is_not_possible_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        CovariancePooling2d(**options)


@pytest.mark.parametrize(
    "layer, input, message",
    [
        (CovariancePooling2d(), torch.ones(4, 3, 3), r"2d expects an input \(N, C, H, W\), got size \(4, 3, 3\)"),
        (CovariancePooling1d(), torch.ones(1, 4, 3, 3), r"1d expects an input \(N, C, L\), got size \(1, 4, 3, 3\)"),
        (CovariancePooling1d(), torch.ones(1, 4, 3, dtype=torch.long), "floating-point type, got torch.int64"),
        (CovariancePooling1d(), torch.ones(1, 4, 3, dtype=torch.cfloat), "floating-point type, got torch.complex64"),
        (CovariancePooling2d(), torch.ones(2, 4, 1, 1), r"at least 1 channel and 2 positions, got size \(2, 4, 1, 1\)"),
        (CovariancePooling1d(), torch.ones(2, 0, 4), "at least 1 channel and 2 positions"),
    ],
)
def test_an_input_that_is_not_possible_is_described(layer, input, message):
    with pytest.raises(ValueError, match=message):
        layer(input)
