"""Networks with one hidden layer, trained in two alternating stages (arXiv 2303.17732).

Inputs x (d features) are augmented to ``a = [x; 1]`` (M = d + 1 features). The h hidden units are ``f = f(n)`` with
``n = W a``. The o outputs, ``y = W_oh f + W_oi a``, also see the inputs directly. For N rows with targets t the error
is ``E = (1/N) Σ_p ‖t_p − y_p‖²``. The residuals are e = t − y.

**Output stage.** E is quadratic in (W_oh, W_oi): solve linear least squares on the basis [f, a].

**Hidden stage.** ``W ← W + z D`` along a direction D, computed from the negative gradient

    G = −∂E/∂W = (2/N) Σ_p f'(n_p) ∘ (W_ohᵀ e_p) a_pᵀ

- BP: D = G. HWO: ``D R = G`` with ``R = (1/N) Σ a aᵀ``, which is the gradient on whitened inputs: R⁻¹ from the right
  whitens x about its mean and moves the bias to match (see `whiten_layers.transforms.whitening`).
- OIG: the columns of either direction are scaled, ``D diag(r)``. The derivative of output i with respect to the gain of
  m is ``A_pim = a_pm Σ_k W_oh(i, k) f'(n_pk) D_km``. Along the gains, the Gauss–Newton model of E is
  ``E − gᵀ r + ½ rᵀ H r`` with

      g_m = Σ_k G_km D_km        H_mu = (2/N) Σ_p Σ_i A_pim A_piu

  Its minimum, ``H r = g``, is solved for by least squares, since H may be singular. g lies in the range of H, so the
  solution is still a minimum.
- z is a Gauss–Newton step: ``z = −(∂E/∂z) / (∂²E/∂z²) = Σ e u / Σ u²``, with ``u = W_oh (f'(n) ∘ D a)`` the
  derivatives of the outputs with respect to z. With optimal gains it is 1 up to rounding.

Neither stage raises the error. A step z that would raise it is halved repeatedly. A step or an output solution that
still does not lower the error is dropped.

**Multiplications** are counted for matrix products, least squares and inverses, by the formulas beside the code.
Elementwise operations (f itself, sums, squares) are not counted.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from ._torch.precision import full_precision
from .inverse import cholesky
from .options import check, is_count, is_real
from .statistics.covariance import moments

# Each function, and its derivative in terms of the function's value.
ACTIVATIONS = {
    "sigmoid": (torch.sigmoid, lambda value: value * (1 - value)),
    "tanh": (torch.tanh, lambda value: 1 - value.square()),
}
DIRECTIONS = ("bp", "hwo")
HALVINGS = 20  # of a step that would raise the error, before the step is dropped


class Progress(NamedTuple):
    """Training error after each stage of an iteration, and the multiplications spent so far.

    Iteration 0 is the start: `hidden_error` is that of outputs of 0, and `error` that after the first output stage.
    With several `batches` only `error` is known; `hidden_error` is NaN.
    """

    iteration: int
    hidden_error: float
    error: float
    multiplications: int


def augmented(inputs: Tensor) -> Tensor:
    """Append a feature that is always 1: ``(N, d) -> (N, d + 1)``."""
    return F.pad(inputs, (0, 1), value=1.0)


def least_squares(matrix: Tensor, targets: Tensor) -> Tensor:
    """Solve ``min ‖A X − B‖`` for the minimum-norm X ``(n, o)``, with A ``(m, n)`` of any rank and B ``(m, o)``.

    Uses a singular value decomposition on the CPU: LAPACK's gelsd, which has no GPU version.
    """
    solution = torch.linalg.lstsq(matrix.cpu(), targets.cpu(), driver="gelsd").solution
    return solution.to(matrix.device)


def least_squares_cost(rows: int, features: int, outputs: int) -> int:
    """Count multiplications of `least_squares`: ``m n² + 11/2 n³`` (R-SVD, Golub & Van Loan 2013, §5.5), and m n o."""
    return rows * features**2 + 11 * features**3 // 2 + rows * features * outputs


def negative_gradient(inputs: Tensor, slopes: Tensor, output_weight: Tensor, residuals: Tensor) -> Tensor:
    """Compute ``G`` (h, M) from augmented inputs (N, M), slopes f'(n) (N, h), W_oh (o, h) and residuals (N, o).

    Multiplications: N o h + N h M.
    """
    return (2 / len(inputs)) * (slopes * (residuals @ output_weight)).mT @ inputs


def inverse_second_moment(inputs: Tensor, damping: float) -> Tensor:
    """Compute ``(R + λI)⁻¹`` (M, M) of augmented inputs (N, M), λ = `damping` times the mean of R's diagonal.

    λ is at least the rounding error of R's entries, M ε of that mean. While Cholesky's factorisation fails, λ is
    multiplied by ten.
    Multiplications: N M² for R, M³/6 for its Cholesky factor, M³/3 for the inverse.
    """
    second = moments(inputs.unsqueeze(0), center=False).covariance
    identity = torch.eye(second.shape[-1]).to(second)
    level = second.diagonal(dim1=-2, dim2=-1).mean()
    damping = max(damping, len(second[0]) * torch.finfo(second.dtype).eps)
    while True:
        inverse = cholesky(second + damping * level * identity).matrix[0]
        if torch.isfinite(inverse).all():
            return inverse
        damping = 10 * damping


def gain_model(
    direction: Tensor, gradient: Tensor, inputs: Tensor, slopes: Tensor, output_weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute ``H`` (M, M) and ``g`` (M,) for the gains of a direction (h, M).

    Multiplications: N o h M for the derivatives, N o M² for H.
    """
    derivatives = inputs * ((slopes * output_weight.unsqueeze(1)) @ direction)  # (o, N, M)
    curvature = 2 * moments(derivatives, center=False).covariance.sum(0)
    return curvature, (gradient * direction).sum(0)


class TwoStageNetwork:
    """Network with one hidden layer for regression: ``fit(X, Y)``, then ``predict(X)``.

    - OWO-BP: ``direction="bp"``; OIG-BP: ``direction="bp", gains=True``.
    - OWO-HWO: ``direction="hwo"``; OIG-HWO: ``direction="hwo", gains=True``.

    See the module's docstring for the formulas. Standardise the inputs: the hidden weights start from standard normal
    ones, scaled such that every unit's n has a standard deviation of 1 on the training inputs.

    Args:
        hidden: number of hidden units h, at least 1.
        direction: direction of the hidden stage, "bp" (the gradient) or "hwo" (the gradient on whitened inputs).
        gains: whether to scale the direction's columns by optimal gains.
        iterations: how often a hidden stage and an output stage follow the first output stage. With one batch,
            training stops early when no hidden step lowers the error: nothing would change any more.
        activation: f, "sigmoid" or "tanh".
        damping: damping of R in "hwo", in [0, 1], as a multiple of the mean of its diagonal.
        batches: number of parts that the rows are dealt into at random. An iteration runs both stages on each part in
            turn, and neither raises that part's error. Each part should have several times h + M rows.
        seed: seed of the initial hidden weights and of the dealing.
        dtype: dtype of all tensors, float32 or float64.

    Raises:
        ValueError: an option has an invalid value; the message names it, its value and the choices. From `fit` and
            `predict`: the shapes do not fit, or a number, or the sum of squares, is not finite.

    After `fit`: ``hidden_weight`` (h, M), ``output_weight`` (o, h), ``direct_weight`` (o, M); ``history``, a list of
    `Progress`; ``multiplications``, the total count.
    """

    hidden_weight: Tensor
    output_weight: Tensor
    direct_weight: Tensor

    def __init__(
        self,
        hidden: int,
        *,
        direction: str = "hwo",
        gains: bool = True,
        iterations: int = 50,
        activation: str = "sigmoid",
        damping: float = 1e-8,
        batches: int = 1,
        seed: int = 0,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        for name, value in [("hidden", hidden), ("iterations", iterations), ("batches", batches)]:
            check(name, value, is_count(value), "an integer of at least 1")
        check("direction", direction, direction in DIRECTIONS, f"one of {', '.join(DIRECTIONS)}")
        check("gains", gains, isinstance(gains, bool), "True or False")
        check("activation", activation, activation in ACTIVATIONS, f"one of {', '.join(ACTIVATIONS)}")
        check("damping", damping, is_real(damping) and 0 <= damping <= 1, "a number in [0, 1]")
        check("dtype", dtype, dtype in (torch.float32, torch.float64), "torch.float32 or torch.float64")
        self.hidden, self.direction, self.gains, self.iterations = hidden, direction, gains, iterations
        self.activation, self.damping, self.batches, self.seed, self.dtype = activation, damping, batches, seed, dtype
        self.multiplications = 0
        self.history: list[Progress] = []

    def fit(self, inputs: Tensor, targets: Tensor) -> Self:
        """Train from scratch on inputs ``(N, d)`` and targets ``(N, o)`` or ``(N,)``."""
        for _ in self.iterate(inputs, targets):
            pass
        return self

    @torch.no_grad()
    def predict(self, inputs: Tensor) -> Tensor:
        """Compute outputs ``(N, o)``, or ``(N,)`` where the targets had that shape."""
        if not self.history:
            raise RuntimeError("there is nothing to predict with: call fit first")
        rows = augmented(self._checked("inputs", inputs, 2))
        if rows.shape[1] != self.hidden_weight.shape[1]:
            raise ValueError(f"inputs of {rows.shape[1] - 1} features are not those of the training inputs")
        with full_precision():
            values = self._values(rows @ self.hidden_weight.mT)
            outputs = values @ self.output_weight.mT + rows @ self.direct_weight.mT
        return outputs.squeeze(1) if self._flat else outputs

    def iterate(self, inputs: Tensor, targets: Tensor) -> Iterator[Progress]:
        """Train as `fit` does, and yield every iteration's `Progress`; the network can predict at each."""
        with torch.no_grad(), full_precision():
            rows, targets = self._start(inputs, targets)
            parts = self._dealt(rows, targets)
            one = len(parts) == 1
            before = _error(targets) if one else math.nan
            progress = self._report(0, before, self._first_outputs(*parts[0]), rows, targets)
        yield progress
        with torch.no_grad(), full_precision():
            inverses = [self._inverse(part) for part, _ in parts]
        for iteration in range(1, self.iterations + 1):
            with torch.no_grad(), full_precision():
                for (part, wanted), inverse in zip(parts, inverses, strict=True):
                    stepped, hidden_error, error = self._both_stages(part, wanted, inverse)
                progress = self._report(iteration, hidden_error if one else math.nan, error, rows, targets)
            yield progress
            if one and not stepped:
                return

    def _checked(self, name: str, tensor: Tensor, dims: int) -> Tensor:
        tensor = torch.as_tensor(tensor, dtype=self.dtype)
        if tensor.dim() != dims or tensor.shape[0] == 0:
            raise ValueError(f"{name} of shape {tuple(tensor.shape)} are not possible: give at least one row")
        if not torch.isfinite(tensor.square().sum()):
            raise ValueError(f"{name} hold a NaN or Inf, or numbers of which the squares are")
        return tensor

    def _start(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        targets = torch.as_tensor(targets)
        self._flat = targets.dim() == 1
        rows = augmented(self._checked("inputs", inputs, 2))
        targets = self._checked("targets", targets.unsqueeze(1) if self._flat else targets, 2)
        if len(rows) != len(targets):
            raise ValueError(f"{len(rows)} rows of inputs and {len(targets)} of targets do not fit")
        if len(rows) < self.batches:
            raise ValueError(f"batches={self.batches} is not possible: there are {len(rows)} rows")
        self.multiplications, self.history = 0, []
        self._generator = torch.Generator().manual_seed(self.seed)
        weight = torch.randn(self.hidden, rows.shape[1], generator=self._generator, dtype=torch.float64).to(rows)
        spread = (rows @ weight.mT).std(0, correction=0).unsqueeze(1)
        self.hidden_weight = weight / torch.where(spread > 0, spread, 1)
        self.output_weight = rows.new_zeros(targets.shape[1], self.hidden)
        self.direct_weight = rows.new_zeros(targets.shape[1], rows.shape[1])
        self.multiplications += len(rows) * self.hidden * rows.shape[1]
        return rows, targets

    def _dealt(self, rows: Tensor, targets: Tensor) -> list[tuple[Tensor, Tensor]]:
        if self.batches == 1:
            return [(rows, targets)]
        order = torch.randperm(len(rows), generator=self._generator).to(rows.device)
        return [(rows[part], targets[part]) for part in order.tensor_split(self.batches)]

    def _report(self, iteration: int, hidden: float, error: float, rows: Tensor, targets: Tensor) -> Progress:
        if self.batches > 1:  # only for the record, so not counted
            outputs = self._values(rows @ self.hidden_weight.mT) @ self.output_weight.mT
            error = _error(targets - outputs - rows @ self.direct_weight.mT)
        self.history.append(Progress(iteration, hidden, error, self.multiplications))
        return self.history[-1]

    def _values(self, net: Tensor) -> Tensor:
        return ACTIVATIONS[self.activation][0](net)

    def _inverse(self, rows: Tensor) -> Tensor | None:
        if self.direction != "hwo":
            return None
        number, features = rows.shape
        self.multiplications += number * features**2 + features**3 // 2
        return inverse_second_moment(rows, self.damping)

    def _first_outputs(self, rows: Tensor, targets: Tensor) -> float:
        self.multiplications += len(rows) * self.hidden * rows.shape[1]
        return self._solve_outputs(rows, targets, self._values(rows @ self.hidden_weight.mT), _error(targets))

    def _both_stages(self, rows: Tensor, targets: Tensor, inverse: Tensor | None) -> tuple[bool, float, float]:
        """Run both stages; return whether the hidden one lowered the error, and the error after each.

        Multiplications: N h M + N h o + N M o for the forward pass, and those of the stages.
        """
        number, features = rows.shape
        values = self._values(rows @ self.hidden_weight.mT)
        direct = targets - rows @ self.direct_weight.mT
        residuals = direct - values @ self.output_weight.mT
        self.multiplications += number * (self.hidden * features + (self.hidden + features) * targets.shape[1])
        values, stepped, error = self._step_hidden(rows, values, direct, residuals, inverse)
        return stepped, error, self._solve_outputs(rows, targets, values, error)

    def _step_hidden(
        self, rows: Tensor, values: Tensor, direct: Tensor, residuals: Tensor, inverse: Tensor | None
    ) -> tuple[Tensor, bool, float]:
        """Run the hidden stage; return f(n) after it, whether it took a step, and the error.

        Multiplications: N o h + N h M for G; h M² for HWO; N o h M + N o M² and an M × M least-squares solution for
        the gains; N h M + N h o for u, and again for each step tried.
        """
        (number, features), outputs = rows.shape, residuals.shape[1]
        slopes = ACTIVATIONS[self.activation][1](values)
        gradient = negative_gradient(rows, slopes, self.output_weight, residuals)
        self.multiplications += number * self.hidden * (outputs + features)
        direction = gradient
        if inverse is not None:
            direction = gradient @ inverse
            self.multiplications += self.hidden * features**2
        if self.gains:
            curvature, slope = gain_model(direction, gradient, rows, slopes, self.output_weight)
            if torch.isfinite(curvature).all():  # on overflow the direction stays unscaled
                direction = direction * least_squares(curvature, slope.unsqueeze(1)).mT
            self.multiplications += number * outputs * features * (self.hidden + features)
            self.multiplications += least_squares_cost(features, features, 1)
        moved = rows @ direction.mT
        derivatives = (slopes * moved) @ self.output_weight.mT
        self.multiplications += number * self.hidden * (features + outputs)
        step = ((residuals * derivatives).sum() / derivatives.square().sum()).item()
        before = _error(residuals)
        for _ in range(HALVINGS if math.isfinite(step) else 0):
            # Computed from the weights, as in the next forward pass: the same error to the last bit.
            weight = self.hidden_weight + step * direction
            tried = self._values(rows @ weight.mT)
            error = _error(direct - tried @ self.output_weight.mT)
            self.multiplications += number * self.hidden * (features + outputs)
            if error < before:
                self.hidden_weight = weight
                return tried, True, error
            step /= 2
        return values, False, before

    def _solve_outputs(self, rows: Tensor, targets: Tensor, values: Tensor, before: float) -> float:
        """Run the output stage and return the error after it. Drop a solution that does not lower it, due to rounding.

        Multiplications: least squares with N rows and h + M features, and N (h + M) o for the error.
        """
        solution = least_squares(torch.cat([values, rows], 1), targets).mT.contiguous()
        (outputs, features), number = solution.shape, len(rows)
        output_weight, direct_weight = solution[:, : self.hidden].contiguous(), solution[:, self.hidden :].contiguous()
        error = _error(targets - rows @ direct_weight.mT - values @ output_weight.mT)
        self.multiplications += least_squares_cost(number, features, outputs) + number * features * outputs
        if not error < before:
            return before
        self.output_weight, self.direct_weight = output_weight, direct_weight
        return error


def _error(residuals: Tensor) -> float:
    return residuals.square().sum(1).mean().item()
