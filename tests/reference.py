"""The truth, slow and in float64: what the library must equal, written from the formulas, not from its code."""

import itertools
import math
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def is_transposed(layer: Any) -> bool:
    return isinstance(layer, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d))


def batched(layer: Any, x: Tensor) -> Tensor:
    return x if x.dim() == len(layer.kernel_size) + 2 else x[None]


def spread(layer: Any, x: Tensor) -> Tensor:
    """The input of a transposed convolution with ``stride − 1`` zeros between its positions; of another one itself."""
    if not is_transposed(layer):
        return x
    sizes = [(size - 1) * step + 1 for size, step in zip(x.shape[2:], layer.stride, strict=True)]
    result = torch.zeros(*x.shape[:2], *sizes, dtype=x.dtype)
    places: Any = itertools.product(*map(range, x.shape[2:]))
    for place in places:
        target = tuple(p * step for p, step in zip(place, layer.stride, strict=True))
        result[(slice(None), slice(None), *target)] = x[(slice(None), slice(None), *place)]
    return result


def wrapped(layer: Any, x: Tensor) -> Tensor:
    """The input of a layer, padded with what is not zeros: of a convolution of such a mode that is its input."""
    if getattr(layer, "padding_mode", "zeros") == "zeros":
        return x
    return F.pad(x, padding_sides(layer), mode=layer.padding_mode)


def padded(layer: Any, x: Tensor) -> Tensor:
    """The input of a convolution with what its padding adds, for every spelling of padding."""
    if layer.padding_mode != "zeros":
        return wrapped(layer, x)
    return F.pad(spread(layer, x), padding_sides(layer))


def padding_sides(layer: Any) -> list[int]:
    """As `F.pad` takes them."""
    sizes = list(zip(layer.dilation, layer.kernel_size, strict=True))
    if is_transposed(layer):
        more = zip(sizes, layer.padding, layer.output_padding, strict=True)
        sides = [(d * (k - 1) - p, d * (k - 1) - p + o) for (d, k), p, o in more]
    elif layer.padding == "valid":
        sides = [(0, 0)] * len(sizes)
    elif layer.padding == "same":
        totals = [d * (k - 1) for d, k in sizes]
        sides = [(total // 2, total - total // 2) for total in totals]
    else:
        sides = [(p, p) for p in layer.padding]
    return [side for pair in reversed(sides) for side in pair]


def rows(layer: Any, x: Tensor) -> Tensor:
    """What each row of the weight is multiplied with: ``(groups, rows, M)``, differentiable in x."""
    if isinstance(layer, nn.Linear):
        return x.reshape(1, -1, x.shape[-1])
    x = padded(layer, batched(layer, x))
    reaches = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    steps = [1] * len(reaches) if is_transposed(layer) else layer.stride
    places = [range(0, size - r, step) for size, r, step in zip(x.shape[2:], reaches, steps, strict=True)]
    patches = []
    for image, *corner in itertools.product(range(len(x)), *places):
        window: Any = [slice(c, c + r + 1, d) for c, r, d in zip(corner, reaches, layer.dilation, strict=True)]
        patch = x[(image, slice(None), *window)]
        if is_transposed(layer):
            patch = patch.flip(list(range(1, patch.dim())))
        patches.append(patch.reshape(layer.groups, -1))
    return torch.stack(patches, dim=1)


def output_rows(layer: Any, y: Tensor) -> Tensor:
    """An output (or its gradient) as ``(groups, rows, S)``, in the order of `rows`."""
    if isinstance(layer, nn.Linear):
        return y.reshape(1, -1, y.shape[-1])
    return (
        batched(layer, y)
        .movedim(1, 0)
        .reshape(layer.groups, y.shape[-len(layer.kernel_size) - 1] // layer.groups, -1)
        .mT
    )


def matrix(layer: Any, weight: Tensor) -> Tensor:
    """A weight, or its gradient, as ``(groups, S, M)``: ``rows @ matrix.mT`` is the layer's output."""
    groups = getattr(layer, "groups", 1)
    if is_transposed(layer):  # its weight lies (groups · C, S, taps)
        return torch.stack([part.transpose(0, 1).flatten(1) for part in weight.chunk(groups)])
    return torch.stack([part.flatten(1) for part in weight.chunk(groups)])


def weight(layer: Any, matrix: Tensor) -> Tensor:
    """The inverse of `matrix`."""
    if is_transposed(layer):
        channels = layer.weight.shape[0] // layer.groups
        return torch.cat([part.view(len(part), channels, *layer.kernel_size).transpose(0, 1) for part in matrix])
    return matrix.reshape(layer.weight.shape)


def moments(x: Tensor, center: bool = True) -> tuple[Tensor, Tensor]:
    """Mean and covariance of ``(rows, M)``, row by row."""
    zero = torch.zeros_like(x[0])
    mean = sum(x, zero) / len(x) if center else zero
    return mean, sum((torch.outer(row - mean, row - mean) for row in x), torch.outer(zero, zero)) / len(x)


def weighted_moments(batches: list[Tensor], decay: float) -> tuple[Tensor, Tensor]:
    """Mean and covariance of all rows of all batches, a row's weight being ``decay^age`` of its batch."""
    ages = range(len(batches) - 1, -1, -1)
    weights = torch.cat(
        [torch.full((len(b),), decay**age, dtype=b.dtype) for b, age in zip(batches, ages, strict=True)]
    )
    x = torch.cat(batches)
    first = x[0]  # from which rows that are all the same differ by nothing, not by rounding
    shift = (weights[:, None] * (x - first)).sum(0) / weights.sum()
    centred = x - first - shift
    return first + shift, (centred.T * weights) @ centred / weights.sum()


def samples_of(layer: Any, x: Tensor) -> int:
    """How many independent samples an input has: images, sequences, or rows of their own."""
    if isinstance(layer, nn.Linear):
        return len(x) if x.dim() > 1 else 1
    return len(batched(layer, x))


def effective_rows(parts: list[Tensor], rows: int) -> float:
    """How many Gaussian rows tell as much as samples with these covariances do (Ledoit & Wolf 2004), at most `rows`."""
    if len(parts) == 1:
        return 1.0
    whole = sum(parts, torch.zeros_like(parts[0])) / len(parts)
    error = sum(((part - whole) ** 2).sum().item() for part in parts) / len(parts) / (len(parts) - 1)
    gaussian = ((whole**2).sum() + whole.trace() ** 2).item()
    return max(1.0, min(rows, gaussian / error if error > 0 else rows))


def covariances_of_samples(x: Tensor, samples: int) -> list[Tensor]:
    """Of each sample alone, about the mean of all rows ``(rows, M)``."""
    parts = (x - x.mean(0)).chunk(samples)
    return [part.T @ part / len(part) for part in parts]


def shrunk(covariance: Tensor, mean: Tensor, rows: float, about_zero: bool) -> Tensor:
    """What rows, as many as that, tell of the covariance, or of the second moment; the rest spread evenly."""
    size, trace, identity = len(covariance), covariance.trace(), torch.eye(len(covariance)).to(covariance)
    weight = torch.tensor(1.0).to(covariance)
    difference = (covariance**2).sum() - trace**2 / size
    if trace > 0 and difference > 0 and rows >= 1:
        weight = (((covariance**2).sum() + trace**2) / (rows * difference)).clamp(max=1)  # n + 1 of OAS, less the mean
    covariance = (1 - weight) * covariance + weight * trace / size * identity
    if not about_zero:
        return covariance
    energy = mean @ mean
    certain = 1 - trace / ((rows - 1) * energy) if rows > 1 and energy > 0 else torch.zeros_like(trace)
    certain = certain.clamp(min=0)
    return covariance + certain * torch.outer(mean, mean) + (1 - certain) * energy / size * identity


def block_diagonal(matrix: Tensor, block_size: int | None, taps: int = 1) -> Tensor:
    """Zeros between channels of different blocks: as equal as can be, in order, of at most `block_size` channels."""
    channels = len(matrix) // taps
    number = math.ceil(channels / (block_size or channels))
    block = torch.arange(channels).repeat_interleave(taps) // math.ceil(channels / number)
    return matrix * (block[:, None] == block)


def inverse_power(covariance: Tensor, power: float, damping: float, rescale: bool, between: bool = False) -> Tensor:
    """``k (C + λI)^(-p)``, λ relative to the mean variance, by a singular value decomposition."""
    size = len(covariance)
    damped = covariance + damping * covariance.trace() / size * torch.eye(size, dtype=covariance.dtype)
    u, s, _ = torch.linalg.svd(damped)
    inverse = u @ torch.diag(s**-power) @ u.T
    scale = covariance.trace() / (inverse @ covariance).trace() if rescale else 1.0
    if rescale and between:
        scale = (scale * (covariance.trace() / (inverse @ covariance @ inverse).trace()) ** 0.5) ** 0.5
    return scale * inverse


def with_spectrum(values: Tensor, seed: int = 0) -> Tensor:
    """A covariance with these eigenvalues, in a random basis."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator, dtype=torch.float64)).Q
    matrix = (basis * values.double()) @ basis.mT
    return (matrix + matrix.mT) / 2


def condition(inverse: Tensor, covariance: Tensor) -> float:
    """Of ``P^½ C P^½``; not a number where P is not positive definite."""
    lower, info = torch.linalg.cholesky_ex(inverse.double())
    values = torch.linalg.eigvalsh(lower.mT @ covariance.double() @ lower)
    return (values[-1] / values[0]).item() if info == 0 else float("nan")


def tap_autocovariance(layer: Any, x: Tensor, mean: Tensor) -> Tensor:
    """``(groups, taps, taps)``: autocovariance of the channels about `mean` ``(groups, C)``, a position at a time.

    Of a transposed convolution: of the spread input, over the positions that are not put in between.
    """
    x = batched(layer, x)
    taps = list(itertools.product(*map(range, layer.kernel_size)))
    result = []
    for group, centre in zip(x.chunk(layer.groups, dim=1), mean, strict=True):
        centred = spread(layer, group - centre.view(-1, *[1] * (group.dim() - 2)))
        sizes = centred.shape[2:]

        def at(*step: int, centred: Tensor = centred, sizes: tuple = sizes) -> Tensor:
            total = torch.zeros((), dtype=centred.dtype)
            places: Any = itertools.product(*map(range, sizes))
            for place in places:
                other = [p + s for p, s in zip(place, step, strict=True)]
                if all(0 <= p < size for p, size in zip(other, sizes, strict=True)):
                    total = total + (centred[(..., *place)] * centred[(..., *other)]).sum()
            return total

        values: dict[tuple, Tensor] = {}
        for here, there in itertools.product(taps, taps):
            step = tuple((b - a) * d for a, b, d in zip(here, there, layer.dilation, strict=True))
            if step not in values:
                values[step] = at(*step)
        rows = [[tuple((b - a) * d for a, b, d in zip(x, y, layer.dilation, strict=True)) for y in taps] for x in taps]
        positions = len(group) * math.prod(group.shape[2:])
        result.append(torch.stack([torch.stack([values[step] for step in row]) for row in rows]) / positions)
    return torch.stack(result)


def transformed(
    layer: Any,
    grad_weight: Tensor,
    grad_bias: Tensor | None,
    mean: Tensor | None,
    precision: Tensor,
    output_precision: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """``Ĝ = Q (G − g μᵀ) P`` and ``ĝ = Q g − Ĝ μ``, group by group; None for Q stands for the identity.

    g ``(S,)``, μ ``(groups, M)``, P ``(groups, M, M)``, Q ``(groups, S / groups, S / groups)``.
    """
    groups = len(precision)
    weights, biases = [], []
    for i, part in enumerate(matrix(layer, grad_weight)):
        q = torch.eye(len(part), dtype=part.dtype) if output_precision is None else output_precision[i]
        if grad_bias is None:
            weights.append(q @ part @ precision[i])
            continue
        bias = grad_bias.chunk(groups)[i]
        shift = torch.zeros_like(precision[i][0]) if mean is None else mean[i]
        weights.append(q @ (part - torch.outer(bias, shift)) @ precision[i])
        biases.append(q @ bias - weights[-1] @ shift)
    return weight(layer, torch.stack(weights)), torch.cat(biases) if biases else None


def precedes_normalization(layer: Any) -> bool:
    """Whether a normalization is taken to follow: behind a convolution without a bias."""
    return layer.bias is None and not isinstance(layer, nn.Linear)


class Whitening:
    """What a layer under `FeatureWhitening` does that updates at every batch from every row, in float64.

    `options` are `FeatureWhitening`'s own, without a bound. Its map is that of the batches observed so far. For each
    batch `transformed` comes before `observe`.
    """

    def __init__(
        self,
        layer: Any,
        method: str = "auto",
        *,
        features: str = "auto",
        power: float = 0.5,
        output_power: float = 0.0,
        damping: float = 0.03,
        decay: float = 0.99,
        center: bool | None = None,
        rescale: bool = True,
        shrink: bool = True,
        block_size: int | None = None,
    ) -> None:
        self.layer, self.groups = layer, getattr(layer, "groups", 1)
        self.taps = 1 if isinstance(layer, nn.Linear) else math.prod(layer.kernel_size)
        size = self.taps * getattr(layer, "in_channels", 1) // self.groups
        whole = features == "patch" or (features == "auto" and size <= 300 and self.groups * size**3 <= 2**28)
        self.separable = not whole and self.taps > 1
        self.power, self.output_power, self.damping, self.decay = power, output_power, damping, decay
        self.center = precedes_normalization(layer) if center is None else center
        self.rescale, self.shrink, self.block_size = rescale, shrink, block_size
        self.between = precedes_normalization(layer) and method != "recursive"
        self.inputs: list[Tensor] = []  # each batch's rows, of whole patches or of channels
        self.outputs: list[Tensor] = []  # each batch's gradients, scaled to a second moment of trace 1
        self.correlations: list[Tensor] = []
        self.samples: list[int] = []
        self.correlation_rows: list[Tensor] = []  # effective ones
        self.logarithms: list[float] = []  # of ⟨Ĝ, G⟩ / ‖G‖², each without the correction
        self.ratio: float | None = 1.0  # of the batch that is mapped but not observed; the first is not mapped
        self.condition = 1.0  # of what the last map inverted, all factors together

    def observe(self, x: Tensor, upstream: Tensor) -> None:
        x, deltas = x.double(), output_rows(self.layer, upstream.double())
        self.samples.append(samples_of(self.layer, x))
        if self.separable:
            x = wrapped(self.layer, batched(self.layer, x))
            channels = x.movedim(1, -1).reshape(-1, self.groups, x.shape[1] // self.groups).movedim(1, 0)
            mean = torch.zeros_like(channels[:, 0])
            if self.center:
                # About the mean of the batches before; of the first batch there is none.
                mean = torch.full_like(channels[:, 0], math.nan)
                if self.inputs:
                    histories = ([batch[group] for batch in self.inputs] for group in range(self.groups))
                    mean = torch.stack([weighted_moments(batches, self.decay)[0] for batches in histories])
            self.inputs.append(channels)
            zeros = math.prod(self.layer.stride) if is_transposed(self.layer) else 1
            covariance = tap_autocovariance(self.layer, x, mean)
            self.correlations.append(covariance / covariance[:, :1, :1] / zeros)
            images = [tap_autocovariance(self.layer, image[None], mean) for image in x]
            most = len(x) * math.prod(x.shape[2:])
            of_groups = [effective_rows([image[group] for image in images], most) for group in range(self.groups)]
            self.correlation_rows.append(torch.tensor(of_groups, dtype=torch.float64))
        else:
            self.inputs.append(rows(self.layer, x))
        traces = deltas.square().sum((1, 2)) / deltas.shape[1]
        self.outputs.append(deltas / traces.sqrt()[:, None, None])
        if self.ratio is not None and 0 < self.ratio < math.inf:
            self.logarithms.append(math.log(self.ratio))
        self.ratio = None

    def _age(self, values: list[Any]) -> Any:
        """Sum up numbers or tensors of all batches, each weighted by the age of its batch."""
        ages = range(len(values) - 1, -1, -1)
        return sum(self.decay**age * value for value, age in zip(values, ages, strict=True))

    @property
    def correction(self) -> float:
        if not (self.rescale and self.logarithms) or self.between:
            return 1.0
        number = len(self.logarithms)
        weights = [self.decay ** (10 * age) for age in reversed(range(number))]  # norms are forgotten faster
        return math.exp(-sum(map(operator.mul, weights, self.logarithms)) / sum(weights))

    def _inverse(self, covariance: Tensor, power: float, damping: float) -> Tensor:
        if power == 0 or covariance.trace() == 0:
            return torch.eye(len(covariance), dtype=torch.float64)
        values = torch.linalg.eigvalsh(covariance)
        floor = damping * values.sum() / len(values)
        self.condition *= ((values[-1] + floor) / (values[0] + floor)).item()
        return inverse_power(covariance, power, damping, self.rescale, self.between)

    def _estimate(self, batches: list[Tensor], about_zero: bool, taps: int = 1) -> tuple[Tensor, Tensor]:
        """The covariance or second moment of a group's rows, block by block, and their mean."""
        known = [i for i, batch in enumerate(batches) if batch.isfinite().all()]
        features = batches[0].shape[1]
        whole, mean = torch.zeros(features, features).double(), torch.zeros(features).double()
        if not known:
            return whole, mean
        batches, samples = [batches[i] for i in known], [self.samples[i] for i in known]
        mean, covariance = weighted_moments(batches, self.decay)
        number = math.ceil(features // taps / (self.block_size or features))
        for block in torch.arange(features).split(math.ceil(features // taps / number) * taps):
            part, middle = covariance[block][:, block], mean[block]
            if self.shrink:
                counts = [
                    effective_rows(covariances_of_samples(batch[:, block], each), len(batch))
                    for batch, each in zip(batches, samples, strict=True)
                ]
                part = shrunk(part, middle, self._age(counts), about_zero)
            elif about_zero:
                part = part + torch.outer(middle, middle)
            whole[block[:, None], block] = part
        return whole, mean

    def _correlation(self, group: int) -> Tensor:
        """That of the taps, a batch in which nothing varies (0/0) left out; zeros where nothing ever did."""
        known = [i for i, one in enumerate(self.correlations) if one[group].isfinite().all()]
        if not known:
            return torch.zeros(self.taps, self.taps).double()
        counts = [self.inputs[i].shape[1] / self._zeros for i in known]
        weighted = [count * self.correlations[i][group] for count, i in zip(counts, known, strict=True)]
        correlation = self._age(weighted) / self._age(counts)
        effective = self._age([self.correlation_rows[i][group].item() for i in known])
        return shrunk(correlation, correlation[0], effective, about_zero=False) if self.shrink else correlation

    @property
    def _zeros(self) -> int:
        return math.prod(self.layer.stride) if is_transposed(self.layer) else 1

    def is_clear(self) -> bool:
        """Whether no variance is so small, against the values, that its digits are those of rounding."""
        groups = torch.cat(self.inputs, 1)
        variances = groups.var(1, correction=0).mean(-1)
        return bool(((variances == 0) | (variances > 1e-4 * groups.square().mean((1, 2)))).all())

    def transformed(self, grad_weight: Tensor, grad_bias: Tensor | None = None) -> list[Tensor]:
        """The plain gradients, mapped."""
        means, precisions, outputs = [], [], []
        self.condition = 1.0
        for group in range(self.groups):
            of_group = [batch[group] for batch in self.inputs]
            covariance, mean = self._estimate(of_group, not self.center, 1 if self.separable else self.taps)
            if not self.center or covariance.trace() == 0:  # about zero, or no refresh has succeeded
                mean = torch.zeros_like(mean)
            if self.separable:
                # (A + √λ) ⊗ (B + √λ), whose smallest eigenvalue is at least λ
                root_damping = math.sqrt(self.damping)
                precision = torch.kron(
                    self._inverse(covariance, self.power, root_damping),
                    self._inverse(self._correlation(group), self.power, root_damping),
                )
                mean = mean.repeat_interleave(self.taps) / self._zeros
            else:
                precision = self._inverse(covariance, self.power, self.damping)
            means.append(mean if self.power else torch.zeros_like(mean))
            precisions.append(precision)
            moment, _ = self._estimate([batch[group] for batch in self.outputs], about_zero=True)
            outputs.append(self._inverse(moment, self.output_power, self.damping))
        stacked = torch.stack(means), self.correction * torch.stack(precisions), torch.stack(outputs)
        mapped = transformed(self.layer, grad_weight, grad_bias, *stacked)
        plain = matrix(self.layer, grad_weight)
        if grad_bias is not None:
            plain = plain - grad_bias.reshape(self.groups, -1, 1) * stacked[0].unsqueeze(1)
        if plain.norm() > 0:
            component = (matrix(self.layer, mapped[0]) * plain).sum() / plain.square().sum()
            self.ratio = component.item() / self.correction
        return [gradient for gradient in mapped if gradient is not None]


def root(matrix: Tensor) -> Tensor:
    """A root T, ``TᵀT = matrix``; any will do, so not a symmetric one."""
    return torch.linalg.cholesky(matrix).T


class SampleWhitening:
    """The layer that whitens its samples: ``y = R (W̃ T (x − μ) + b̃)``, with W̃ and b̃ as its parameters.

    ``TᵀT = P`` and ``RRᵀ = Q``; `reparametrise` chooses new T, μ and R for the same function. Without
    a bias nothing can absorb a shift: ``y = R W̃ T x``.
    """

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        self.groups = getattr(layer, "groups", 1)
        weight = matrix(layer, layer.weight.detach().clone())
        _, self.out_features, features = weight.shape
        self.transform = torch.eye(features).expand(self.groups, -1, -1).to(weight)
        self.mean = torch.zeros(self.groups, features).to(weight)
        self.output = torch.eye(self.out_features).expand(self.groups, -1, -1).to(weight)
        self.weight = weight.requires_grad_()
        self.bias = None
        if layer.bias is not None:
            self.bias = layer.bias.detach().clone().view(self.groups, self.out_features).requires_grad_()

    def parameters(self) -> list[Tensor]:
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    def __call__(self, x: Tensor) -> Tensor:
        self.seen = rows(self.layer, x)
        shift = 0 if self.bias is None else self.mean[:, None]
        hidden = (self.seen - shift) @ self.transform.mT @ self.weight.mT
        if self.bias is not None:
            hidden = hidden + self.bias[:, None]
        self.result = hidden @ self.output.mT
        self.result.retain_grad()
        return self._shaped(x)

    def _shaped(self, x: Tensor) -> Tensor:
        if isinstance(self.layer, nn.Linear):
            return self.result[0].view(*x.shape[:-1], -1)
        with torch.no_grad():
            spatial = self.layer(x).shape[2:]
        y = self.result.mT.reshape(self.groups * self.out_features, len(x), *spatial)
        return y.transpose(0, 1)

    @torch.no_grad()
    def plain(self) -> tuple[Tensor, Tensor | None]:
        """The plain parameters ``W = R W̃ T`` and ``b = R b̃ − W μ``."""
        product = self.output @ self.weight @ self.transform
        bias = None
        if self.bias is not None:
            bias = (self.output @ self.bias[..., None] - product @ self.mean[..., None]).flatten()
        return weight(self.layer, product), bias

    @torch.no_grad()
    def reparametrise(self, transform: Tensor, mean: Tensor, output: Tensor) -> None:
        plain, bias = self.plain()
        product = matrix(self.layer, plain)
        self.transform, self.mean, self.output = transform, mean, output
        self.weight = (torch.linalg.inv(output) @ product @ torch.linalg.inv(transform)).requires_grad_()
        if bias is not None:
            bias = bias.view(self.groups, self.out_features)[..., None] + product @ mean[..., None]
            self.bias = (torch.linalg.inv(output) @ bias).squeeze(-1).requires_grad_()


def normalized(x: Tensor, weight: Tensor, bias: Tensor, group_size: int | None, matrix_of, moments=None) -> Tensor:
    """Samples ``(N, C, …)`` whitened a group of channels at a time, by plain autograd.

    `matrix_of` takes a covariance and a group's number; `moments`, if given, has a group's mean and covariance.
    """
    channels = x.transpose(0, 1).flatten(1)
    outputs = []
    for number, group in enumerate(channels.split(group_size or len(channels))):
        mean, covariance = (group.mean(1), group.cov(correction=0).view(len(group), len(group)))
        if moments is not None:
            mean, covariance = moments(number)
        outputs.append(matrix_of(covariance, number) @ (group - mean[:, None]))
    result = weight[:, None] * torch.cat(outputs) + bias[:, None]
    return result.view(x.shape[1], x.shape[0], *x.shape[2:]).transpose(0, 1)


def inverse_root(covariance: Tensor, eps: float) -> Tensor:
    values, vectors = torch.linalg.eigh(covariance + eps * torch.eye(len(covariance), dtype=covariance.dtype))
    return vectors @ torch.diag(values**-0.5) @ vectors.T


def iterated_root(covariance: Tensor, eps: float, iterations: int) -> Tensor:
    covariance = covariance + eps * torch.eye(len(covariance), dtype=covariance.dtype)
    trace = covariance.trace()
    root = torch.eye(len(covariance), dtype=covariance.dtype)
    for _ in range(iterations):
        root = 1.5 * root - 0.5 * root @ root @ root @ (covariance / trace)
    return root / trace.sqrt()


def square_root(covariance: Tensor) -> Tensor:
    """``C^½`` of a covariance, by a singular value decomposition."""
    u, s, _ = torch.linalg.svd(covariance)
    return u @ torch.diag(s.sqrt()) @ u.T


def newton_square_root(covariance: Tensor, iterations: int) -> Tensor:
    """What so many Newton steps make of ``C^½ = C C^(-½)``."""
    return covariance @ iterated_root(covariance, 0.0, iterations)


def pade_square_root(covariance: Tensor, degree: int) -> Tensor:
    """The Padé approximant of ``C^½`` by its error: ``(r − √x) / (r + √x) = ((1 − √x) / (1 + √x))^(2m + 1)``."""
    scale = torch.linalg.matrix_norm(covariance)
    u, s, _ = torch.linalg.svd(covariance / scale)
    ratio = ((1 - s.sqrt()) / (1 + s.sqrt())) ** (2 * degree + 1)
    return scale.sqrt() * u @ torch.diag(s.sqrt() * (1 + ratio) / (1 - ratio)) @ u.T


def lyapunov(root: Tensor, right: Tensor) -> Tensor:
    """The S of ``R S + S R = right`` for a symmetric R, as a system of M² linear equations."""
    identity = torch.eye(len(root), dtype=root.dtype)
    system = torch.kron(root, identity) + torch.kron(identity, root)
    return torch.linalg.solve(system, right.flatten()).view_as(right)


def covariance_pooled(x: Tensor, root_of) -> Tensor:
    """Upper triangles of the roots of the covariances of samples ``(N, C, …)``, by plain autograd."""
    size = x.shape[1]
    roots = [root_of(sample.flatten(1).cov(correction=0).view(size, size)) for sample in x]
    return torch.stack([torch.cat([row[i:] for i, row in enumerate(root)]) for root in roots])


def learning_whitening(whitening: Tensor, covariance: Tensor, step_size: float, criterion: str, eps: float) -> Tensor:
    """The matrix of stochastic whitening batch normalization after one step on a batch's covariance."""
    scale = torch.diag((covariance.diagonal() + eps) ** -0.5)
    correlation = scale @ (covariance + eps * torch.eye(len(covariance), dtype=covariance.dtype)) @ scale
    residual = whitening @ correlation @ whitening.T - torch.eye(len(covariance), dtype=covariance.dtype)
    step = residual @ whitening
    if criterion == "frobenius":
        step = step @ correlation / residual.norm()
    moved = whitening - step_size * step
    return (moved + moved.T) / 2
