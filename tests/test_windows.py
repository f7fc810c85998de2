"""Windows: what was observed since the last refresh is saved beside a state dict, and training resumes bit for bit."""

import copy

import pytest
import torch

from whiten_layers import FeatureWhitening, WhitenedLinear, load_window_state_dict, window_state_dict
from whiten_layers.statistics.covariance import FeatureCovariance

from .helpers import batch, buffers, network

OFTEN = FeatureWhitening(output_power=0.5, update_interval=10, statistics_interval=1, block_size=3)


def train(model, steps):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step in steps:
        optimizer.zero_grad()
        model(batch(step)).square().sum().backward()
        optimizer.step()


def test_a_run_that_is_saved_between_two_refreshes_resumes_bit_for_bit():
    whole = network(OFTEN)
    train(whole, range(19))
    state, windows = copy.deepcopy(whole.state_dict()), window_state_dict(whole)
    assert windows and not windows.keys() & state.keys()
    train(whole, range(19, 30))  # through a refresh
    resumed = network(OFTEN)
    train(resumed, range(3))
    resumed.load_state_dict(state)
    load_window_state_dict(resumed, windows)
    train(resumed, range(19, 30))
    torch.testing.assert_close(buffers(resumed), buffers(whole), rtol=0, atol=0)
    torch.testing.assert_close(resumed.state_dict(), whole.state_dict(), rtol=0, atol=0)


def test_what_is_saved_and_loaded_is_a_copy_and_takes_the_place_of_all_windows():
    model = network(OFTEN)
    train(model, range(19))
    windows = window_state_dict(model)
    kept = copy.deepcopy(windows)
    load_window_state_dict(model, windows)
    train(model, range(19, 20))
    torch.testing.assert_close(windows, kept, rtol=0, atol=0)
    load_window_state_dict(model, {})
    assert not window_state_dict(model)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda state: {"other.window_mean": torch.ones(1)}, "other.window_mean: the model has no such statistics"),
        (
            lambda state: state | {"transform.inputs.window_mean": torch.ones(1, 5)},
            r"mean of shape \(1, 5\) .* \(1, 4\)",
        ),
        (lambda state: {k: v for k, v in state.items() if "count" not in k}, "inputs.window_count is missing"),
        (lambda state: state | {"transform.inputs.other": torch.ones(1)}, "inputs.other is no part of a window"),
        (
            lambda state: state | {"transform.inputs.pending_3_by_1": torch.ones(1, 5, 3)},
            r"pending_3_by_1 of shape \(1, 5, 3\) is not possible: give \(1, any number, 4\)",
        ),
    ],
)
def test_windows_of_another_model_are_an_error_and_change_nothing(change, message):
    layer = WhitenedLinear(4, 3, transform=FeatureWhitening(statistics_interval=1))
    for _ in range(3):
        layer(torch.randn(5, 4)).sum().backward()
    assert all(one.window for one in layer.modules() if isinstance(one, FeatureCovariance))  # pending rows are in it
    before = window_state_dict(layer)
    with pytest.raises(ValueError, match=message):
        load_window_state_dict(layer, change(before))
    torch.testing.assert_close(window_state_dict(layer), before, rtol=0, atol=0)
