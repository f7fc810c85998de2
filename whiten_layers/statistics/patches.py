"""Rows of features that a layer sees: sampled positions, patches, and the autocovariance of a kernel's taps.

A linear layer sees the rows of its input; a convolution sees a patch of its input at every output position. Statistics
need only a sample of those rows, so everything here takes ``max_rows`` and a ``phase``. Rows are spread evenly over the
batch and over space. The phase (the number of the batch) moves them on, so a run needs no random numbers and can be
repeated.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, lru_cache

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ..state import safe_to_load
from .covariance import effective_rows

MIN_IMAGES = 32  # of a batch that has as many, in `tap_autocovariance`
LARGEST_TABLE, TABLES = 2**15, 64  # places that are kept for the next batch, and of how many layers: 51 MiB at most


@safe_to_load
@dataclass(frozen=True)
class Geometry:
    """Shape of a layer and the way it reads its input. Channels are counted within one group.

    A linear layer has no kernel: ``kernel_size == ()``, and its features are its channels. Padding with anything but
    zeros is not part of the geometry, since the layer's input has then been padded already.
    """

    in_channels: int
    out_channels: int
    groups: int = 1
    kernel_size: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()  # as F.pad takes it: last dimension first, both sides
    has_bias: bool = False
    upsampling: tuple[int, ...] = ()  # transposed convolution: step of the spread input
    inputs_first: bool = False  # the weight is (C, S, *kernel), not (S, C, *kernel)
    positions_first: bool = False  # inputs and outputs are (L, N, ·), a sequence's positions before the sequences

    @cached_property
    def taps(self) -> int:
        """Positions of the kernel; 1 for a linear layer."""
        return math.prod(self.kernel_size)

    @cached_property
    def spread(self) -> int:
        """Factor by which inserted zeros multiply the positions of a transposed convolution's input; otherwise 1."""
        return math.prod(self.upsampling)

    @cached_property
    def spatial_dims(self) -> int:
        """Dimensions of the kernel; 0 for a linear layer."""
        return len(self.kernel_size)

    @property
    def precedes_normalization(self) -> bool:
        """Whether a normalization is taken to follow: behind a convolution without a bias.

        Linear layers have no bias in many networks that do not normalise what they return, such as language models.
        """
        return self.spatial_dims > 0 and not self.has_bias

    def has_shapes_of(self, other: "Geometry") -> bool:
        """Tell whether statistics of one layer have the shapes, and the meaning, of the other's.

        They do where only stride, dilation or padding differ, but for inserted zeros.
        """
        free = {"stride": (), "dilation": (), "padding": ()}
        return replace(self, **free) == replace(other, **free)  # type: ignore[arg-type]

    def matrix(self, weight: Tensor) -> Tensor:
        """View a weight, or its gradient, as ``(groups, S, C, taps)``."""
        if self.inputs_first:
            return weight.reshape(self.groups, self.in_channels, self.out_channels, self.taps).transpose(1, 2)
        return weight.reshape(self.groups, self.out_channels, self.in_channels, self.taps)

    def rows(self, weight: Tensor) -> Tensor:
        """View a weight, or its gradient, as ``(groups, S, C·taps)``."""
        if self.inputs_first:
            return self.matrix(weight).flatten(2)
        return weight.reshape(self.groups, self.out_channels, -1)

    def weight(self, matrix: Tensor, like: Tensor) -> Tensor:
        """Undo `matrix` or `rows`: give it the shape and the strides of the weight, or of its gradient, `like`."""
        if self.inputs_first and matrix.dim() == 3:
            matrix = matrix.unflatten(2, (self.in_channels, self.taps))
        weight = (matrix.transpose(1, 2) if self.inputs_first else matrix).reshape(like.shape)
        if weight.stride() == like.stride():
            return weight
        # channels_last, for instance: fused optimizers and the buckets of DDP insist
        return torch.empty_like(like, dtype=weight.dtype).copy_(weight)


@lru_cache
def _coprime(least: int, number: int) -> int:
    """Return an integer that has no common divisor with a number: its multiples, modulo the number, come to each."""
    return next(step for step in itertools.count(least) if math.gcd(step, number) == 1)


def _multiples(number: int, step: int, modulus: int, device: torch.device, times: int = 1) -> Tensor:
    """Return so many multiples of a step, from 0 on, modulo a number, each several times: ``(number·times,)``.

    They depend on shapes alone, and are kept: elsewhere than on a CPU each operation that is spared is a kernel less.
    """
    make = _kept_multiples if number * times <= LARGEST_TABLE else _new_multiples
    return make(number, step, modulus, device, times)


def _new_multiples(number: int, step: int, modulus: int, device: torch.device, times: int) -> Tensor:
    return (torch.arange(number, device=device) * step % modulus).repeat_interleave(times)


_kept_multiples = lru_cache(2 * TABLES)(_new_multiples)


def _sampled_positions(
    images: int, positions: int, max_rows: int | None, phase: int, device: torch.device
) -> tuple[Tensor | None, Tensor, int]:
    """Choose at most `max_rows` positions in images, as many in each.

    Returns:
        The images ``(n,)``, None for all; the positions ``(n·each,)``; and how many there are in each image.

    Space is thinned before the batch, since two images tell more than two positions of one image. Every image has
    positions of its own, and the batches of as many phases as there are positions come to each position equally often.
    """
    chosen, each = images, positions
    if max_rows is not None and images * positions > max_rows:
        chosen = min(images, max_rows)
        each = max_rows // chosen
    which = None
    if chosen < images:
        which = (torch.arange(chosen, device=device) * images // chosen + phase) % images
    if each == positions:
        return which, _multiples(chosen * each, 1, positions, device), each
    # Each row is the golden section of all positions farther than the one before, and each batch goes on from near
    # there: so few positions lie evenly too.
    golden = _coprime(round(positions * (math.sqrt(5) - 1) / 2), positions)
    first = phase * _coprime(chosen * each + 1, positions) * golden % positions
    return which, (_multiples(chosen * each, golden, positions, device) + first) % positions, each


def _batched(input: Tensor, spatial_dims: int) -> Tensor:
    """Reshape an input with no batch dimension, or (under `torch.vmap`) with several, to have one."""
    return input.reshape(-1, *input.shape[-spatial_dims - 1 :])


def _spread(input: Tensor, upsampling: tuple[int, ...]) -> Tensor:
    """Insert zeros between the positions of an input, so that they lie `upsampling` apart."""
    if all(step == 1 for step in upsampling):
        return input
    sizes = [(size - 1) * step + 1 for size, step in zip(input.shape[2:], upsampling, strict=True)]
    spread = input.new_zeros(*input.shape[:2], *sizes)
    places = tuple(slice(None, None, step) for step in upsampling)
    spread[(slice(None), slice(None), *places)] = input
    return spread


def count_samples(input: Tensor, spatial_dims: int, max_rows: int | None = None) -> int:
    """Count the independent samples that sampled rows of an input come from: images, sequences, or single rows."""
    if spatial_dims:
        number = _batched(input, spatial_dims).shape[0]
        return number if max_rows is None else min(number, max_rows)
    return input.shape[0] if input.dim() > 1 else 1


def linear_rows(input: Tensor, max_rows: int | None = None, phase: int = 0) -> Tensor:
    """Sample rows of a linear layer's input (or output gradient): ``(..., M) -> (1, rows, M)``."""
    rows = input.reshape(-1, input.shape[-1])
    every = 1 if max_rows is None else max(1, math.ceil(len(rows) / max_rows))
    # A step that shares a divisor with the sequence length would sample the same positions of every sequence.
    length = input.shape[-2] if input.dim() > 2 else 1
    while every < len(rows) and math.gcd(every, length) > 1:
        every += 1
    return rows[phase % every :: every].unsqueeze(0)


def channel_rows(input: Tensor, groups: int, spatial_dims: int, max_rows: int | None = None, phase: int = 0) -> Tensor:
    """Take the channels at sampled positions: ``(N, groups·C, *space) -> (groups, rows, C)``."""
    input = _batched(input, spatial_dims)
    if max_rows is None:
        return rearrange(input, "n (g c) ... -> g (n ...) c", g=groups)
    ones, channels = (1,) * spatial_dims, input.shape[1] // groups
    return _picked_patches(input, Geometry(channels, 1, groups, ones, ones, ones), max_rows, phase)


def from_channel_rows(rows: Tensor, like: Tensor, spatial_dims: int) -> Tensor:
    """Undo `channel_rows` of all positions: give them the shape of the input `like`."""
    positions = math.prod(like.shape[-spatial_dims:])
    return rearrange(rows, "g (n p) c -> n (g c) p", p=positions).reshape(like.shape)


def output_sizes(geometry: Geometry, sizes: Sequence[int]) -> list[int]:
    """Count the output positions of `patch_rows` along each spatial dimension, for an input of these sizes."""
    padding = geometry.padding or (0, 0) * len(sizes)
    outputs = []
    for axis, size in enumerate(sizes):
        spread = (size - 1) * (geometry.upsampling[axis] if geometry.upsampling else 1) + 1
        spread += sum(padding[len(padding) - 2 * axis - 2 :][:2])
        span = geometry.dilation[axis] * (geometry.kernel_size[axis] - 1) + 1
        outputs.append((spread - span) // geometry.stride[axis] + 1)
    return outputs


def patch_rows(input: Tensor, geometry: Geometry, max_rows: int | None = None, phase: int = 0) -> Tensor:
    """Unfold the patches at sampled output positions: ``(N, groups·C, *space) -> (groups, rows, C·taps)``.

    Exact for every stride, padding, dilation and number of groups: ``rows @ weight.flatten(1).T``
    is the convolution's output at those positions.
    """
    input = _batched(input, geometry.spatial_dims)
    if max_rows is not None:
        return _picked_patches(input, geometry, max_rows, phase)
    window = _spread(input, geometry.upsampling)
    if any(geometry.padding):
        window = F.pad(window, geometry.padding)
    for axis in range(geometry.spatial_dims):
        span = geometry.dilation[axis] * (geometry.kernel_size[axis] - 1) + 1
        window = window.unfold(axis + 2, span, geometry.stride[axis])[..., :: geometry.dilation[axis]]
    if geometry.upsampling:
        window = window.flip([*range(2 + geometry.spatial_dims, window.dim())])  # the kernel is flipped
    window = window.flatten(2 + geometry.spatial_dims)
    return rearrange(window, "n (g c) ... taps -> g (n ...) (c taps)", g=geometry.groups)


def _places(
    geometry: Geometry, sizes: Sequence[int], strides: Sequence[int], positions: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Work out where output positions ``(n,)`` read an image, and whether that is outside of it: both ``(n, taps)``.

    Places are counted in memory, from the first number of the image's channel. Outside is the padding, and what lies
    between the positions of a transposed convolution's input; None where there is neither.
    """
    dims, outputs = geometry.spatial_dims, output_sizes(geometry, sizes)
    places, outside = positions.new_zeros(()), torch.zeros((), dtype=torch.bool, device=positions.device)
    for axis in reversed(range(dims)):
        here, positions = positions % outputs[axis], positions // outputs[axis]
        before = geometry.padding[2 * (dims - 1 - axis)] if geometry.padding else 0
        step = geometry.upsampling[axis] if geometry.upsampling else 1
        taps = torch.arange(geometry.kernel_size[axis], device=positions.device)
        taps = taps.flip(0) if geometry.upsampling else taps  # the kernel is flipped
        reads = (here * geometry.stride[axis] - before).unsqueeze(1) + taps * geometry.dilation[axis]
        inside = (reads // step).clamp(0, sizes[axis] - 1)
        shape = [len(reads), *[1] * axis, reads.shape[1], *[1] * (dims - 1 - axis)]
        places = places + (inside * strides[axis]).view(shape)
        outside = outside | (inside * step != reads).view(shape)
    return places.flatten(1), outside.flatten(1) if any(geometry.padding) or geometry.upsampling else None


@lru_cache(TABLES)
def _all_places(
    geometry: Geometry, sizes: Sequence[int], strides: Sequence[int], number: int, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """Work out `_places` of all positions: at every step a layer reads images of the same sizes."""
    return _places(geometry, sizes, strides, torch.arange(number, device=device))


def _picked_patches(input: Tensor, geometry: Geometry, max_rows: int, phase: int) -> Tensor:
    """Pick the numbers of few patches one by one: padding the whole input would take longer than all the rest."""
    strides, sizes, device = input.stride(), input.shape, input.device
    number, taps = math.prod(output_sizes(geometry, sizes[2:])), geometry.taps
    images, positions, each = _sampled_positions(sizes[0], number, max_rows, phase, device)
    if number * taps <= LARGEST_TABLE:
        places, outside = _all_places(geometry, sizes[2:], strides[2:], number, device)
        places, outside = places[positions], None if outside is None else outside[positions]
    else:
        places, outside = _places(geometry, sizes[2:], strides[2:], positions)
    memory_size = 1 + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
    if images is None:
        starts = _multiples(sizes[0], strides[0], memory_size, device, each)
    else:
        starts = (images * strides[0]).repeat_interleave(each)
    channels = _multiples(sizes[1], strides[1], memory_size, device).view(geometry.groups, 1, -1, 1)
    index = (places + starts.unsqueeze(1)).unsqueeze(1) + channels
    memory = input.as_strided((memory_size,), (1,), input.storage_offset())
    rows = memory.index_select(0, index.flatten()).view(index.shape)
    if outside is not None:
        rows.masked_fill_(outside.unsqueeze(1), 0)
    return rows.flatten(2)


@cache
def _displacements(
    kernel_size: tuple[int, ...], dilation: tuple[int, ...], upsampling: tuple[int, ...]
) -> tuple[list[tuple[int, ...] | None], list[int]]:
    """List the distinct displacements between two taps, and which of them belongs to each of taps × taps pairs.

    They are in positions of the input. Two opposite displacements are one, since an autocovariance is even. None stands
    for those at which one of the two positions is always an inserted zero.
    """
    taps = list(itertools.product(*map(range, kernel_size)))
    places: dict[tuple[int, ...], int] = {}
    pairs = []
    for here, there in itertools.product(taps, taps):
        displacement = tuple((b - a) * d for a, b, d in zip(here, there, dilation, strict=True))
        displacement = max(displacement, tuple(-d for d in displacement))
        pairs.append(places.setdefault(displacement, len(places)))
    distinct: list[tuple[int, ...] | None] = []
    for displacement in places:
        steps = list(zip(displacement, upsampling or (1,) * len(kernel_size), strict=True))
        reached = all(d % step == 0 for d, step in steps)
        distinct.append(tuple(d // step for d, step in steps) if reached else None)
    return distinct, pairs


def tap_autocovariance(
    input: Tensor, geometry: Geometry, mean: Tensor, max_rows: int | None = None, phase: int = 0
) -> tuple[int, Tensor, Tensor]:
    """Measure how the input varies together at the taps of a kernel: ``(N, groups·C, *space) -> (groups, taps, taps)``.

    The entry of two taps is the autocovariance of the channels about `mean` ``(groups, C)``, summed over channels, at
    the displacement from one tap to the other: a sum over positions, divided by their number. So it is linear in the
    images, and several processes can add up their results. The spread input of a transposed convolution is mostly
    inserted zeros; the diagonal counts only the positions that are not such zeros. The image counts as zero outside its
    borders, so the result is positive semidefinite. Whole images are sampled: at least `MIN_IMAGES`, since one does not
    tell how images differ, and otherwise at most `max_rows` positions.

    No patch is unfolded. With zeros behind each row, a displacement is an offset in memory. Its autocovariance is the
    inner product of the images with themselves, shifted by that offset.

    Returns:
        The number of positions, the `effective_rows` ``(groups,)`` with images as samples, and the autocovariances.
    """
    input = _batched(input, geometry.spatial_dims)
    sizes = input.shape[2:]
    most = input.shape[0] if max_rows is None else max(MIN_IMAGES, max_rows // math.prod(sizes))
    every = max(1, math.ceil(input.shape[0] / most))
    images = rearrange(input[phase % every :: every], "n (g c) ... -> g c n ...", g=geometry.groups)
    images = images.to(torch.promote_types(images.dtype, torch.float32))
    images = images - mean.view(*mean.shape, *[1] * (images.dim() - 2)).to(images.dtype)
    positions = math.prod(images.shape[2:])

    reach = [(k - 1) * d for k, d in zip(geometry.kernel_size, geometry.dilation, strict=True)]
    margins = [min(r, size - 1) for r, size in zip(reach, sizes, strict=True)]
    images = F.pad(images, [side for margin in reversed(margins) for side in (0, margin)])
    strides = images.stride()[3:]
    lines = images.flatten(3)

    def autocovariances(displacement: tuple[int, ...] | None) -> Tensor:
        if displacement is None or any(abs(d) >= size for d, size in zip(displacement, sizes, strict=True)):
            return lines.new_zeros(lines.shape[0], lines.shape[2])
        offset = sum(d * stride for d, stride in zip(displacement, strides, strict=True))
        return torch.linalg.vecdot(lines[..., : lines.shape[3] - offset], lines[..., offset:]).sum(1)

    distinct, pairs = _displacements(geometry.kernel_size, geometry.dilation, geometry.upsampling)
    values = torch.stack([autocovariances(displacement) for displacement in distinct], -1)  # (groups, images, distinct)
    samples = values.shape[1]
    table = values.sum(1)[:, pairs].view(-1, geometry.taps, geometry.taps)
    trace = table.diagonal(dim1=1, dim2=2).sum(1)
    squared = (values[..., pairs] / trace[:, None, None]).square().sum((1, 2)) * samples
    return positions, effective_rows(table, squared, samples, positions), table / positions
