"""Rows, patches and tap autocovariances against position-by-position references."""

import math

import pytest
import torch
from hypothesis import given, settings
from torch import nn

from whiten_layers.layers import TWINS
from whiten_layers.statistics import patches
from whiten_layers.statistics.patches import channel_rows, linear_rows, patch_rows, tap_autocovariance

from .. import reference
from ..cases import CASES
from ..strategies import convolutions

CONVOLUTIONS = [case for case in CASES if case.plain is not nn.Linear]
each_convolution = pytest.mark.parametrize("case", CONVOLUTIONS, ids=lambda case: case.name)


@each_convolution
def test_patches_are_the_reference_patches(case):
    layer, x = case.make_plain(), case.make_input()
    rows = patch_rows(reference.wrapped(layer, x), case.whitened.geometry(layer))
    torch.testing.assert_close(rows, reference.rows(layer, x), rtol=0, atol=0)


@each_convolution
def test_patches_times_the_weight_are_the_convolution(case):
    layer, x = case.make_plain(), case.make_input()
    rows = patch_rows(reference.wrapped(layer, x), case.whitened.geometry(layer))
    product = rows @ reference.matrix(layer, layer.weight).mT
    if layer.bias is not None:
        product = product + layer.bias.view(layer.groups, 1, -1)
    torch.testing.assert_close(product, reference.output_rows(layer, layer(x)), rtol=1e-12, atol=1e-12)


def centre(layer, x):
    return torch.linspace(-0.3, 0.9, x.shape[-len(layer.kernel_size) - 1], dtype=x.dtype).view(layer.groups, -1)


@each_convolution
def test_tap_autocovariance_is_the_reference(case):
    layer, x = case.make_plain(), case.make_input()
    mean = centre(layer, x)
    positions, _, result = tap_autocovariance(x, case.whitened.geometry(layer), mean)
    assert positions == x.numel() / (mean.numel())
    torch.testing.assert_close(result, reference.tap_autocovariance(layer, x, mean), rtol=1e-10, atol=1e-12)
    assert torch.linalg.eigvalsh(result).min() > -1e-12
    diagonal = result.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(diagonal, diagonal[:, :1].expand_as(diagonal))


def test_images_are_the_samples_that_effective_rows_of_taps_count():
    layer = nn.Conv2d(4, 6, 3, groups=2).double()
    x = torch.randn(7, 4, 8, 9, dtype=torch.float64) * torch.linspace(0.2, 3, 7).view(-1, 1, 1, 1)
    mean = centre(layer, x)
    positions, effective, _ = tap_autocovariance(x, TWINS[nn.Conv2d].geometry(layer), mean)
    alone = [reference.tap_autocovariance(layer, image.unsqueeze(0), mean) for image in x]
    expected = [reference.effective_rows([matrices[group] for matrices in alone], positions) for group in (0, 1)]
    assert effective.tolist() == pytest.approx(expected, rel=1e-9)
    assert max(expected) < positions / 2


@pytest.mark.parametrize("cut", [1, 2])
def test_tap_autocovariance_is_a_mean_over_images_whoever_has_which(cut):
    layer = nn.Conv2d(4, 6, 3, groups=2).double()
    x, geometry = torch.randn(3, 4, 6, 7, dtype=torch.float64), TWINS[nn.Conv2d].geometry(layer)
    mean = centre(layer, x)
    _, _, whole = tap_autocovariance(x, geometry, mean)
    parts = [tap_autocovariance(part, geometry, mean) for part in x.split(cut)]
    total = sum(positions * part for positions, _, part in parts) / sum(positions for positions, _, _ in parts)
    torch.testing.assert_close(total, whole, rtol=1e-12, atol=1e-12)


def test_the_phase_brings_every_image_in_turn():
    layer = nn.Conv2d(2, 3, 3).double()
    x, geometry = torch.randn(100, 2, 4, 5, dtype=torch.float64), TWINS[nn.Conv2d].geometry(layer)
    mean = centre(layer, x)
    positions, _, whole = tap_autocovariance(x, geometry, mean)
    parts = [tap_autocovariance(x, geometry, mean, max_rows=1, phase=phase) for phase in range(4)]
    assert [part[0] for part in parts] == [positions / 4] * 4  # 25 images each: 32 at most
    torch.testing.assert_close(sum(part[2] for part in parts) / 4, whole, rtol=1e-12, atol=1e-12)


def test_taps_farther_apart_than_the_image_is_wide_do_not_vary_together():
    layer = nn.Conv2d(2, 3, 3, dilation=4, padding=4).double()
    x = torch.randn(2, 2, 3, 5, dtype=torch.float64)
    mean = centre(layer, x)
    _, _, result = tap_autocovariance(x, TWINS[nn.Conv2d].geometry(layer), mean)
    torch.testing.assert_close(result, reference.tap_autocovariance(layer, x, mean), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("max_rows", [1, 7, 40, 10_000, None])
@pytest.mark.parametrize("shape", [(1, 3), (50, 3), (8, 6, 3), (4, 5, 6, 3), (7,)])
def test_sampled_linear_rows_are_rows_and_few(shape, max_rows):
    x = torch.randn(shape)
    seen = set()
    for phase in range(130):
        rows = linear_rows(x, max_rows, phase)
        assert rows.dim() == 3 and 1 <= rows.shape[1] <= (max_rows or rows.shape[1])
        every = {tuple(row) for row in x.reshape(-1, shape[-1]).tolist()}
        seen |= {tuple(row) for row in rows[0].tolist()}
        assert seen <= every
    assert seen == every  # the phase brings every row in turn


@pytest.mark.parametrize("length, max_rows, every", [(6, 200, 5), (7, 200, 2), (12, 100, 5), (12, 400, 1), (2, 300, 3)])
def test_rows_are_no_fewer_than_a_step_that_shares_no_divisor_with_the_length_takes(length, max_rows, every):
    assert len(linear_rows(torch.randn(400 // length, length, 3), max_rows)[0]) == math.ceil(
        400 // length * length / every
    )


@pytest.mark.parametrize("max_rows", [1, 5, 33, 200, 10_000, None])
@pytest.mark.parametrize("shape", [(1, 2, 1, 9), (6, 4, 5, 7), (40, 2, 3, 3), (3, 2, 12, 12)])
def test_sampled_positions_are_positions_and_few(shape, max_rows):
    x = torch.randn(shape)
    for phase in range(20):
        rows = channel_rows(x, 2, 2, max_rows, phase)
        assert rows.shape[0] == 2 and rows.shape[2] == shape[1] // 2
        assert 1 <= rows.shape[1] <= (max_rows or rows.shape[1])
        every = {tuple(row) for row in x.movedim(1, -1).reshape(-1, shape[1]).tolist()}
        assert {tuple(row) for row in torch.cat(list(rows), -1).tolist()} <= every


@pytest.mark.parametrize("sizes", [(1,), (40,), (8, 8), (5, 7), (32, 32), (4, 3, 6)])
@pytest.mark.parametrize("images, max_rows", [(1, 1), (3, 2), (16, 64), (100, 33)])
def test_every_position_is_sampled_as_often_as_any_other(sizes, images, max_rows):
    number = math.prod(sizes)
    places = torch.arange(images * number).view(images, 1, *sizes)
    seen = torch.zeros(images, number)
    for phase in range(number):
        rows = channel_rows(places, 1, len(sizes), max_rows, phase).flatten()
        assert len(rows.unique()) == len(rows) == min(images * number, max_rows // images * images or max_rows)
        seen.view(-1)[rows] += 1
    assert seen.sum(0).unique().numel() == 1
    if max_rows >= images:
        assert seen.sum(1).unique().numel() == 1


def test_the_positions_of_one_batch_lie_all_over_the_images():
    places = torch.arange(1024).view(1, 1, 32, 32).expand(64, 1, 32, 32)
    for phase in range(1024):
        row = channel_rows(places, 1, 2, 64, phase).flatten()
        quarters = torch.bincount(row // 512 * 2 + row % 32 // 16, minlength=4)
        assert quarters.min() >= 12 and quarters.max() <= 20  # of 64 positions, 16 if they lay evenly


def test_sampling_thins_space_before_the_batch():
    x = torch.arange(32.0).view(32, 1, 1, 1).expand(32, 2, 16, 16)
    assert channel_rows(x, 1, 2, max_rows=64).unique().numel() == 32


@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels last", "a part of a larger tensor", "one image for all"])
def test_picked_patches_are_the_unfolded_ones_in_any_layout(case, layout):
    layer, x = case.make_plain(), case.make_input()
    geometry = case.whitened.geometry(layer)
    if layout == "channels last":
        x = x.movedim(-geometry.spatial_dims - 1, -1).contiguous().movedim(-1, -geometry.spatial_dims - 1)
    elif layout == "a part of a larger tensor":
        x = torch.stack([x, -x], -1).repeat_interleave(2, 0)[1::2, ..., 1]
    elif x.dim() > geometry.spatial_dims + 1 and layout == "one image for all":
        x = x[:1].expand(x.shape)
    torch.testing.assert_close(patch_rows(x, geometry, 10**9), patch_rows(x, geometry), rtol=0, atol=0)


@pytest.mark.parametrize("max_rows", [1, 9, 60, 10**9])
def test_places_that_are_kept_are_those_worked_out_anew(max_rows, monkeypatch):
    for case in CONVOLUTIONS:
        layer, x = case.make_plain(), case.make_input()
        geometry = case.whitened.geometry(layer)
        kept = [patch_rows(x, geometry, max_rows, phase) for phase in range(4)]
        with monkeypatch.context() as patched:
            patched.setattr(patches, "LARGEST_TABLE", 0)
            anew = [patch_rows(x, geometry, max_rows, phase) for phase in range(4)]
        torch.testing.assert_close(anew, kept, rtol=0, atol=0)


@pytest.mark.parametrize("max_rows", [1, 9, 60])
def test_sampled_patches_are_patches(max_rows):
    for case in CONVOLUTIONS:
        layer, x = case.make_plain(), case.make_input()
        geometry = case.whitened.geometry(layer)
        every = {tuple(row) for row in patch_rows(x, geometry)[0].tolist()}
        for phase in range(4):
            rows = patch_rows(x, geometry, max_rows, phase)[0]
            assert 1 <= len(rows) <= max_rows
            assert {tuple(row) for row in rows.tolist()} <= every


@settings(deadline=None, max_examples=150)
@given(convolutions())
def test_patches_and_tap_autocovariances_of_random_configurations(example):
    layer, x = example
    geometry = TWINS[type(layer)].geometry(layer)
    rows = patch_rows(reference.wrapped(layer, x), geometry)
    picked = patch_rows(reference.wrapped(layer, x), geometry, 10**9)
    torch.testing.assert_close(picked, rows, rtol=0, atol=0)
    product = rows @ reference.matrix(layer, layer.weight).mT
    if layer.bias is not None:
        product = product + layer.bias.view(layer.groups, 1, -1)
    torch.testing.assert_close(product, reference.output_rows(layer, layer(x)), rtol=1e-10, atol=1e-10)
    _, _, covariance = tap_autocovariance(x, geometry, centre(layer, x))
    torch.testing.assert_close(covariance, covariance.mT, rtol=0, atol=0)
    assert torch.linalg.eigvalsh(covariance).min() > -1e-9
