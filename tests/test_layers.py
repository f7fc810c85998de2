"""What holds for every layer: the plain layer's numbers, the reference's gradients, and no trace in evaluation."""

import copy
from math import inf, nan

import pytest
import torch
from torch import nn

from whiten_layers import FeatureWhitening, WhitenedConv2d, WhitenedLinear, report, whiten
from whiten_layers.statistics.covariance import FeatureCovariance

from . import reference
from .cases import CASES, everywhere

TRANSFORMS = {
    "default": FeatureWhitening(),
    "patch": FeatureWhitening(features="patch"),
    "exact": FeatureWhitening.exact(damping=0.1),
    "both sides": FeatureWhitening(output_power=0.5),
    "about zero": FeatureWhitening(center=False, features="patch"),
}
each_transform = pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS.keys())


def state(layer: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in layer.state_dict().items()}


def assert_same(first: dict, second: dict) -> None:
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def backward(layer: nn.Module, x: torch.Tensor, seed: int = 3, scale: float = 1.0) -> dict[str, torch.Tensor]:
    """Gradients of the parameters and of the input for a random upstream gradient."""
    layer.zero_grad()
    x = x.clone().requires_grad_()
    y = layer(x)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(y)
    y.backward(scale * upstream)
    gradients = {name: parameter.grad.clone() for name, parameter in layer.named_parameters()}
    return gradients | {"input": x.grad, "output": y.detach(), "upstream": upstream}


@everywhere
@each_transform
def test_the_forward_pass_and_the_input_gradient_are_the_plain_layers(case, transform):
    plain, whitened = case.make_pair(transform)
    for seed in range(5):  # before the first refresh and after some
        x = case.make_input(seed)
        expected, result = backward(plain, x), backward(whitened, x)
        assert_same(expected["output"], result["output"])
        assert_same(expected["input"], result["input"])
    assert result["weight"].isfinite().all()


@everywhere
@each_transform
def test_until_the_first_refresh_the_gradient_is_plain(case, transform):
    plain, whitened = case.make_pair(transform)
    expected, result = backward(plain, case.make_input()), backward(whitened, case.make_input())
    for name in dict(plain.named_parameters()):
        torch.testing.assert_close(expected[name], result[name], rtol=1e-14, atol=1e-14)


@everywhere
@each_transform
def test_evaluation_and_frozen_weights_are_plain_and_leave_no_trace(case, transform):
    plain, whitened = case.make_pair(transform)
    backward(whitened, case.make_input())
    before = state(whitened)
    for freeze in (False, True):
        plain.train(freeze), whitened.train(freeze)
        plain.weight.requires_grad_(not freeze), whitened.weight.requires_grad_(not freeze)
        saved: dict[nn.Module, list] = {plain: [], whitened: []}
        for layer in saved:
            with torch.autograd.graph.saved_tensors_hooks(
                lambda t, kept=saved[layer]: kept.append(t.shape) or t, lambda t: t
            ):
                layer(case.make_input(2).requires_grad_()).sum().backward()
            with torch.no_grad():
                layer(case.make_input(2))
        assert saved[plain] == saved[whitened]
        assert_same(plain(case.make_input(2)), whitened(case.make_input(2)))
        assert_same(before, state(whitened))


@everywhere
@each_transform
def test_training_saves_no_tensor_that_the_plain_layer_does_not(case, transform):
    def storages(layer):
        found = set()
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: found.add(t.untyped_storage().data_ptr()) or t, lambda t: t
        ):
            layer(x)
        return len(found - {layer.weight.data_ptr()})

    plain, whitened = case.make_pair(transform)
    x = case.make_input().requires_grad_()
    # A convolution that pads "same" may save what it padded, and has no use for the input.
    padded = getattr(plain, "padding", 0) == "same" and plain.padding_mode == "zeros"
    assert storages(whitened) <= storages(plain) + padded


@everywhere
@each_transform
def test_between_refreshes_backward_is_linear_in_the_upstream_gradient(case, transform):
    transform = copy.deepcopy(transform)
    transform.update_interval, transform.bound = 5, None  # refreshes after batches 1, 2 and 4
    _, whitened = case.make_pair(transform)
    for seed in range(4):
        backward(whitened, case.make_input(seed))
    x = case.make_input(9)

    def gradient(*upstreams):
        layer = copy.deepcopy(whitened)
        layer.zero_grad()
        sum((layer(x) * upstream).sum() for upstream in upstreams).backward()
        return {name: parameter.grad for name, parameter in layer.named_parameters()}

    shape = whitened(x).shape
    first, second = (
        torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in (1, 2)
    )
    one, two, both = gradient(first), gradient(second), gradient(3 * first - 0.5 * second)
    for name in one:
        expected = 3 * one[name] - 0.5 * two[name]
        torch.testing.assert_close(both[name], expected, rtol=1e-10, atol=1e-10 * expected.abs().max().item())
    tiny = gradient(1e-20 * first)  # nothing depends on the gradient's size
    torch.testing.assert_close(tiny["weight"] * 1e20, one["weight"], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS.keys())
def test_accumulating_micro_batches_is_one_batch(transform):
    transform = copy.deepcopy(transform)
    transform.update_interval = 4
    torch.manual_seed(0)
    layer = WhitenedConv2d(4, 5, 3, padding=1, dtype=torch.float64, transform=transform)
    for _ in range(4):
        layer(torch.randn(6, 4, 5, 5, dtype=torch.float64)).square().sum().backward()
    x = torch.randn(6, 4, 5, 5, dtype=torch.float64)
    whole, parts = copy.deepcopy(layer), copy.deepcopy(layer)
    for copied in (whole, parts):
        copied.zero_grad()
    whole(x).square().sum().backward()
    for part in x.split([1, 3, 2]):  # no refresh is due after batches 5, 6 and 7
        parts(part).square().sum().backward()
    torch.testing.assert_close(whole.weight.grad, parts.weight.grad, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(whole.bias.grad, parts.bias.grad, rtol=1e-10, atol=1e-10)


@everywhere
@each_transform
def test_degenerate_batches_give_finite_gradients(case, transform):
    _, whitened = case.make_pair(transform)
    zeros = torch.zeros(case.input_shape, dtype=torch.float64)
    for x in (zeros, zeros + 1, case.make_input()[:1], case.make_input()):
        if x.dim() == len(case.input_shape) and (x.dim() > 1 or x.shape == zeros.shape):
            if x.shape[-1] != case.input_shape[-1] or (case.name.endswith("unbatched") and len(x) != len(zeros)):
                continue
            result = backward(whitened, x)
            assert result["weight"].isfinite().all()
    dead = case.make_input()  # one feature never varies
    (dead[..., 0] if isinstance(whitened, nn.Linear) else reference.batched(whitened, dead)[:, 0]).zero_()
    for _ in range(3):
        result = backward(whitened, dead)
        assert result["weight"].isfinite().all()
        assert all(factor.precision.isfinite().all() for factor in whitened.transform.factors())


# That a batch is bad is found before the layer matters: some layers stand for all, but for NaN.
KINDS = ["linear-bias", "conv2d-everything", "conv2d-depthwise", "transposed2d-everything"]
BAD = [(case, bad) for case in CASES for bad in ([nan, inf, -inf, 1e30] if case.name in KINDS else [nan])]


@pytest.mark.parametrize("case, bad", BAD, ids=lambda one: getattr(one, "name", str(one)))
@pytest.mark.parametrize("where", ["input", "upstream"])
@each_transform
def test_a_bad_batch_leaves_the_statistics_as_they_were_and_is_counted(case, transform, where, bad):
    plain, whitened = case.make_pair(transform, torch.float32)
    for seed in range(3):
        backward(whitened, case.make_input(seed, torch.float32))
    expected = copy.deepcopy(whitened)
    for one in expected.transform.modules():
        if isinstance(one, FeatureCovariance):
            one.close_window(elapsed=2)
    expected = state(expected)
    x = case.make_input(9, torch.float32)
    # Places of a transposed convolution may lie beyond its padding: take one that the other side depends on.
    if where == "input":
        x.view(-1)[backward(plain, x)["input"].abs().argmax()] = bad
    y = whitened(x)
    upstream = torch.ones_like(y)
    if where == "upstream":
        upstream.view(-1)[(plain(x) - plain(torch.zeros_like(x))).abs().argmax()] = bad
    # 1e30 is finite, and so may be the gradient; its square is not.
    y.backward(upstream)
    after = state(whitened)
    assert all(value.isfinite().all() for value in after.values() if value.is_floating_point())
    if where == "upstream" and bad == 1e30:
        return  # it may be a good one: a finite gradient of any size is
    # The refresh that was due, two batches after the last, sees the statistics of the batches before.
    unchanged = [name for name in expected if "running" in name]
    assert_same({name: expected[name] for name in unchanged}, {name: after[name] for name in unchanged})
    assert whitened.transform.num_batches_skipped == 1
    assert whitened.transform.num_batches_tracked == 4


@everywhere
def test_an_evaluating_layer_exports_as_plain_operations(case):
    plain, whitened = case.make_pair()
    x = (case.make_input(),)
    torch._dynamo.reset()  # each case is a program of its own
    programs = [torch.export.export(layer.eval(), x) for layer in (plain, whitened)]
    targets = [[node.target for node in program.graph.nodes if node.op == "call_function"] for program in programs]
    assert targets[0] == targets[1]


@everywhere
def test_gradcheck_of_the_input_gradient(case):
    _, whitened = case.make_pair()
    backward(whitened, case.make_input())
    assert torch.autograd.gradcheck(whitened, case.make_input().requires_grad_())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_state_is_never_narrower_than_float32(dtype):
    def check(layer):
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        state = layer.transform.state_dict()
        counts = {key for key in state if key.rpartition(".")[2].startswith(("num_", "_extra_state"))}
        assert {state[key].dtype for key in state.keys() - counts} == {wide}
        assert {state[key].dtype for key in counts} <= {torch.float32, torch.float64}
        layer(torch.randn(3, 4, dtype=dtype)).sum().backward()
        assert layer.weight.grad.dtype == dtype and layer.weight.grad.isfinite().all()

    check(WhitenedLinear(4, 3, dtype=dtype))
    check(WhitenedLinear(4, 3).to(dtype))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("options", [{}, {"power": 0.0, "output_power": 0.5}, {"center": False}])
def test_a_layer_goes_from_one_type_to_another(bias, options):
    layer = WhitenedLinear(4, 3, bias, transform=FeatureWhitening(update_interval=1, **options))
    for dtype in (torch.float64, torch.bfloat16, torch.float32, torch.float16, torch.float64):
        layer.to(dtype)
        backward(layer, torch.randn(9, 4, dtype=dtype))
        assert layer.weight.grad.dtype == dtype and layer.weight.grad.isfinite().all()


def test_casting_keeps_the_statistics():
    layer = WhitenedLinear(4, 3)
    backward(layer, torch.randn(9, 4))
    before = state(layer.transform)
    assert_same(before, state(layer.to(torch.bfloat16).transform))


def test_a_transform_is_copied_for_each_layer():
    transform = FeatureWhitening()
    first, second = (WhitenedLinear(4, 3, transform=transform) for _ in range(2))
    backward(first, torch.randn(9, 4))
    assert first.transform.num_batches_tracked == 1
    assert second.transform.num_batches_tracked == 0
    copied = copy.deepcopy(first)
    backward(copied, torch.randn(9, 4))
    assert first.transform.num_batches_tracked == 1
    assert copied.transform.num_batches_tracked == 2


def test_a_transform_taken_from_another_layer_starts_anew():
    convolution = WhitenedConv2d(4, 3, 3)
    backward(convolution, torch.randn(2, 4, 5, 5))
    layer = WhitenedLinear(4, 3, transform=convolution.transform)
    assert [name for name, _ in layer.transform.named_children()] == ["inputs", "norms"]
    assert layer.transform.num_batches_tracked == 0 and layer.transform.inputs.num_refreshes == 0
    backward(layer, torch.randn(9, 4))


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_layer_without_features_is_an_error_and_whiten_leaves_it():
    with pytest.raises(ValueError, match=r"a weight of shape \(3, 0\) is not possible: give at least one feature"):
        WhitenedLinear(0, 3)
    model = whiten(nn.Sequential(nn.Linear(0, 3), nn.Linear(3, 2)))
    assert type(model[0]) is nn.Linear and type(model[1]) is WhitenedLinear
    assert report(model).left == {"0": "Linear, without any feature"}


@each_transform
def test_a_jagged_input_is_its_rows(transform):
    layer, twin = (WhitenedLinear(4, 3, transform=copy.deepcopy(transform)) for _ in range(2))
    twin.load_state_dict(layer.state_dict())
    for _ in range(3):
        parts = [torch.randn(n, 4) for n in (2, 5, 3)]
        for net in (layer, twin):
            net.zero_grad()
        layer(torch.nested.nested_tensor(parts, layout=torch.jagged)).sin().values().sum().backward()
        twin(torch.cat(parts)).sin().sum().backward()
        torch.testing.assert_close(layer.weight.grad, twin.weight.grad)
    assert_same(state(layer), state(twin))


def test_what_a_layer_cannot_take_as_a_transform():
    with pytest.raises(TypeError, match=r"transform=3 is not possible: give a GradientTransform"):
        WhitenedLinear(4, 3, transform=3)
    with pytest.raises(ValueError, match=r"dtype=torch.complex64 is not possible"):
        WhitenedLinear(4, 3, dtype=torch.complex64)
    with pytest.raises(
        ValueError, match=r"transform='qr' is not possible: give one of optimal_gain, eigenbasis, auto, chol"
    ):
        WhitenedLinear(4, 3, transform="qr")
