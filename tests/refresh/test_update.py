"""The refresh at the end of a backward pass: together, in batches, in place."""

import threading

import pytest
import torch
from torch import nn

from whiten_layers import FeatureWhitening, WhitenedLinear, report, whiten
from whiten_layers.inverse import METHODS
from whiten_layers.refresh.update import refresh_factors
from whiten_layers.statistics.covariance import moments


def test_matrices_of_one_size_are_inverted_in_one_call(monkeypatch):
    calls = []
    method = METHODS["cholesky"]

    def counted(covariance, *rest):
        calls.append(tuple(covariance.shape))
        return method.inverse(covariance, *rest)

    monkeypatch.setitem(METHODS, "cholesky", method._replace(inverse=counted))
    model = nn.Sequential(*[nn.Conv2d(4, 4, 3, padding=1, groups=g) for g in (1, 2, 1)], nn.Flatten(), nn.Linear(16, 4))
    whiten(model, FeatureWhitening(features="kronecker", power=1.0))
    model(torch.randn(8, 4, 2, 2)).sum().backward()
    # Channels 4, 2 × 2 and 4; taps 9, 2 × 9 and 9; features 16.
    assert sorted(calls) == [(1, 16, 16), (2, 2, 2), (2, 4, 4), (4, 9, 9)]


def test_precision_and_mean_are_written_in_place_after_the_pass():
    layer = WhitenedLinear(4, 3)
    factor = layer.transform.inputs
    pointers = {name: value.data_ptr() for name, value in factor.named_buffers()}
    x = (torch.randn(9, 4) * torch.arange(1, 5) ** 2).requires_grad_()  # of few white rows nothing is believed
    y = layer(x)
    during = []
    x.register_hook(lambda grad: during.append(factor.precision.clone()))
    y.sum().backward()
    assert torch.equal(during[0][0], torch.eye(4))
    assert not torch.equal(factor.precision[0], torch.eye(4))
    assert pointers == {name: value.data_ptr() for name, value in factor.named_buffers()}


@pytest.mark.parametrize(
    "method, power, is_warm", [("newton_schulz", 1.0, True), ("newton_schulz", 0.5, False), ("recursive", 1.0, True)]
)
def test_a_refresh_goes_on_from_the_last_inverse_where_the_method_can(method, power, is_warm, monkeypatch):
    calls, original = [], METHODS[method]

    def recorded(covariance, power, warm_start, *rest):
        result = original.inverse(covariance, power, warm_start, *rest)
        calls.append((warm_start, result.matrix.clone()))
        return result

    monkeypatch.setitem(METHODS, method, original._replace(inverse=recorded))
    layer = WhitenedLinear(8, 3, transform=FeatureWhitening(method, power=power, rank=2, update_interval=1))
    for _ in range(2):
        layer(torch.randn(50, 8) * torch.arange(1, 9)).sum().backward()
    (first, result), (second, _) = calls
    assert [one is not None for one in (first, second)] == [is_warm, is_warm]
    if is_warm:
        assert first.matrix.isnan().all()  # there was none
        torch.testing.assert_close(second.matrix, result)


def test_outside_a_pass_a_refresh_follows_at_once():
    layer = WhitenedLinear(4, 3)
    layer(torch.randn(9, 4)).sum().backward()
    factor = layer.transform.inputs
    factor.observe(moments(torch.randn(1, 9, 4)))
    layer.transform.schedule.end_batch(layer.transform)
    assert factor.num_refreshes == 2 and factor.window is None


def test_two_models_train_in_two_threads_as_in_one():
    def train(model, generator):
        for _ in range(20):
            model.zero_grad()
            model(torch.randn(9, 4, generator=generator)).square().sum().backward()

    def make():
        torch.manual_seed(0)
        return WhitenedLinear(4, 3, transform=FeatureWhitening(update_interval=2))

    expected = []
    for seed in range(2):
        model = make()
        train(model, torch.Generator().manual_seed(seed))
        expected.append(model)
    models = [make() for _ in range(2)]
    threads = [
        threading.Thread(target=train, args=(model, torch.Generator().manual_seed(seed)))
        for seed, model in enumerate(models)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for a, b in zip(expected, models, strict=True):
        torch.testing.assert_close(a.weight.grad, b.weight.grad, rtol=0, atol=0)
        torch.testing.assert_close(dict(a.named_buffers()), dict(b.named_buffers()), rtol=0, atol=0)


@pytest.mark.parametrize("method, power", [("eigh", 0.5), ("eigh", 1.0), ("cholesky", 1.0), ("newton_schulz", 0.5)])
def test_features_that_are_all_alike_are_inverted_in_float64_if_not_in_float32(method, power):
    results = []
    for dtype in (torch.float32, torch.float64):
        transform = FeatureWhitening(method, power=power, shrink=False, block_size=None)
        layer = WhitenedLinear(512, 3, dtype=dtype, transform=transform)
        rows = torch.randn(2048, 1, generator=torch.Generator().manual_seed(0)).to(dtype).expand(2048, 512)
        layer(rows).sum().backward()
        factor = layer.transform.inputs
        assert factor.num_refreshes == 1 and factor.num_refreshes_failed == 0
        results.append(factor)
    narrow, wide = results
    assert wide.num_refreshes_rescued == 0
    if method == "eigh":  # the others know of no limit, and are off by the rounding of 512 in 0.03
        assert narrow.num_refreshes_rescued == 1
        torch.testing.assert_close(narrow.precision.double(), wide.precision, rtol=1e-3, atol=1e-3)


def test_what_failed_is_tried_again_behind_one_that_did_not_fail():
    model = whiten(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)), shrink=False)
    model(torch.randn(500, 4)).sum().backward()
    factors = [layer.transform.inputs for layer in model]
    factors[1].running_covariance.copy_(1.2 - 0.2 * torch.eye(4))  # indefinite
    refresh_factors(factors, names=dict(zip(factors, "01", strict=True)))
    assert [factor.num_refreshes_rescued.item() for factor in factors] == [0, 1]


def test_an_indefinite_covariance_is_damped_more_and_a_hopeless_one_keeps_the_last_inverse(caplog):
    model = whiten(nn.Sequential(nn.Linear(4, 3)), shrink=False)
    layer, factor = model[0], model[0].transform.inputs
    layer(torch.randn(500, 4)).sum().backward()
    before = factor.precision.clone()
    for correlation, rescued, failed in ((1.2, 1, 0), (3.0, 2, 0), (50.0, 2, 1)):
        # As an average of state dicts may have left it
        factor.running_covariance.copy_(torch.eye(4))
        factor.running_covariance[0, 0, 1] = factor.running_covariance[0, 1, 0] = correlation
        factor.running_mean.zero_()
        refresh_factors([factor], names={factor: "0"})
        assert (factor.num_refreshes_rescued, factor.num_refreshes_failed) == (rescued, failed)
        assert factor.precision.isfinite().all() and torch.linalg.eigvalsh(factor.precision).min() > 0
        before, last = factor.precision.clone(), before
    assert torch.equal(before, last)  # the hopeless one changed nothing
    assert "rescued" in str(report(model, full=True)) and "more damping: 0" in str(report(model))
    messages = [record.getMessage() for record in caplog.records if "covariance of 0" in record.getMessage()]
    assert len(messages) == 1 and "damping=" in messages[0]


def test_a_checkpoint_that_does_not_count_rescues_loads():
    model = whiten(nn.Sequential(nn.Linear(4, 3)))
    model(torch.randn(50, 4)).sum().backward()
    state = {key: value for key, value in model.state_dict().items() if "rescued" not in key}
    assert len(state) < len(model.state_dict())
    whiten(nn.Sequential(nn.Linear(4, 3))).load_state_dict(state, strict=True)
