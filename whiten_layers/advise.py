"""Advice on whether whitening a model pays, from a few passes of a copy of it."""

import copy
import itertools
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .conversion.messages import share_of
from .conversion.whiten import convert, unwhiten
from .estimate import copied_selections
from .layers import layers_of
from .options import check, check_model, is_count
from .report import NEARLY_WHITE, Report, Row, aligned, report
from .transforms import GradientTransform

CALLED = "give a function of a model and a batch that returns a scalar, as lambda model, batch: …"
CHEAP, DEAR = 1.3, 2.0  # times the plain step: what is hardly felt, and what has to be made up for by steps


class Still(torch.optim.Optimizer):
    """An optimizer that changes nothing: what scales gradients does so when an optimizer steps."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Do nothing."""


@dataclass(frozen=True)
class Advice:
    """Result of `advise`: a verdict on the model, one on each layer, and the numbers behind them.

    Attributes:
        verdict: one or two sentences.
        layers: a sentence for each whitened layer.
        gain: the part of the parameters that train that is in layers where whitening changes something.
        step: how many times as long as a plain one a step takes, as measured, with its share of a refresh.
        bytes: what whitening keeps beside the parameters.
        report: the report on the copy, after the passes.
    """

    verdict: str
    layers: dict[str, str]
    gain: float
    step: float
    bytes: int
    report: Report

    def __str__(self) -> str:
        return "\n".join([self.verdict, *aligned([[name, what] for name, what in self.layers.items()])])


def advise(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Callable[[nn.Module, Any], Tensor],
    transform: GradientTransform | str | None = None,
    *,
    passes: int = 8,
    **options: Any,
) -> Advice:
    """Try whitening on copies of a model, and tell whether it pays.

    No step is taken: gradients are computed and forgotten. The model, and the random numbers that come next, are as
    before. What is seen is the inputs' covariances with the present weights: ask again after some training.

    Args:
        model: the model, whitened or not.
        batches: what the training loop iterates over; the first `passes` are taken.
        loss: of a model and a batch: ``lambda model, batch: F.cross_entropy(model(batch[0]), batch[1])``. It is to
            call the model that it is given, and to leave the batch as it is.
        transform: as for `whiten`.
        passes: batches to try, at least 2.
        **options: as for `whiten`.

    Raises:
        ValueError, TypeError: as for `whiten`; there are fewer than 2 batches; the loss is no scalar tensor; no batch
            comes to a whitened layer, as in evaluation mode; or the transform keeps no covariance.
    """
    check_model(model)
    check_loss(loss)
    check("passes", passes, is_count(passes) and passes > 1, "an integer of at least 2")
    with torch.random.fork_rng([]):  # a loader draws a seed
        given = list(itertools.islice(batches, passes))
    check("batches", f"{len(given)} of them", len(given) > 1, "at least 2")
    memo: dict[int, Any] = {}
    plain, whitened = unwhiten(copy.deepcopy(model)), unwhiten(copy.deepcopy(model, memo))
    selections = copied_selections(options, memo)
    convert(whitened, transform, **selections, process_group=options.pop("process_group", None), options=options)
    own_layers = {name or "the model": layer for name, layer in layers_of(whitened).items()}
    parts = [part for layer in own_layers.values() for part in layer.transform.parts()]
    seconds: dict[bool | None, list[float]] = {None: [], False: [], True: []}  # plain; without a refresh, and with one
    for batch in given:
        seconds[None].append(_seconds_of_a_pass(plain, batch, loss))
        before = _refreshes(parts)
        taken = _seconds_of_a_pass(whitened, batch, loss)
        seconds[_refreshes(parts) > before].append(taken)
    interval = statistics.median([part.batches_between_refreshes for part in parts] or [1])
    # The least of each kind: those that took longer were the first, or were disturbed.
    busy = min(seconds[True], default=0.0)
    quiet = min(seconds[False], default=busy)
    step = (quiet + max(0.0, busy - quiet) / interval) / min(seconds[None])
    result = report(whitened)
    if not result.layers:
        raise ValueError("no layer of the model can be whitened")
    if not result.batches:
        raise ValueError("no batch came to a whitened layer: is the model in training mode, and does loss call it?")
    if not result.rows:
        raise ValueError("this transform keeps no covariance, and so there is nothing to judge by")
    layers: dict[str, list[Row]] = {}
    for row in result.rows:
        layers.setdefault(row.layer, []).append(row)
    sentences = {name: _judged(rows, len(given)) for name, rows in layers.items()}
    changing = [own_layers[name] for name, (changes, _) in sentences.items() if changes]
    gain = share_of(whitened, changing)
    told = {name: sentence for name, (_, sentence) in sentences.items()}
    return Advice(verdict_of(gain, step, result.bytes), told, gain, step, result.bytes, result)


def check_loss(loss: object) -> None:
    """Raise a TypeError, unless a loss can be called."""
    if not callable(loss):
        raise TypeError(f"loss is of type {type(loss).__name__}: {CALLED}")


def _refreshes(parts: Iterable[GradientTransform]) -> int:
    return sum(int(factor.num_refreshes) for part in parts for factor in part.factors())


def _seconds_of_a_pass(network: nn.Module, batch: Any, loss: Callable[[nn.Module, Any], Tensor]) -> float:
    """Run a step that changes nothing, with random numbers that leave no trace, and time it."""
    optimizer = Still(network.parameters(), {})
    devices = {parameter.device for parameter in network.parameters() if parameter.device.type == "cuda"}
    with torch.random.fork_rng(devices), torch.enable_grad():
        start = time.perf_counter()
        try:
            value = loss(network, batch)
        except Exception as error:
            error.add_note(f"loss was called with the model and a batch: {CALLED}")
            raise
        if not isinstance(value, Tensor) or value.numel() != 1:
            shown = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"loss returned {shown}: {CALLED}")
        value.backward()
        optimizer.step()
        for device in devices:
            torch.cuda.synchronize(device)
        taken = time.perf_counter() - start
    network.zero_grad()
    return taken


def _judged(rows: list[Row], passes: int) -> tuple[bool, str]:
    """Tell whether whitening changes something in a layer, and why, from its factors' rows."""
    worst = max(rows, key=lambda row: row.condition if row.spectrum else 0.0)
    if not worst.spectrum:
        why = "its batches were constant, or held NaN or Inf" if worst.batches else "no batch came to it"
        return False, f"{why}: nothing is whitened"
    few = min(rows, key=lambda row: row.effective_rows / row.size)
    is_few = few.effective_rows < few.size
    rare = f"{few.effective_rows / passes:.0f} rows a batch for {few.size} features"
    if worst.condition < NEARLY_WHITE:
        if is_few:
            return False, f"{rare}: shrunk to the identity so far, nothing to gain before more batches"
        return False, f"nearly white already (condition number {worst.condition:.2g}): nothing to gain"
    numbers = f"condition number {worst.condition:.3g}"
    numbers += "" if worst.whitened is None else f", whitened {worst.whitened:.3g}"
    if is_few:
        return True, f"{rare}: shrunk at first, whitened more as batches come ({numbers} so far)"
    return True, f"worth it: {numbers}"


def verdict_of(gain: float, step: float, kept: int) -> str:
    """Judge by the part of the parameters that gain, the plain steps that a step takes, and the bytes kept."""
    cost = f"A step takes about {step:.2g} times as long, and {kept / 2**20:.1f} MiB are kept."
    if gain < 0.25:
        return f"Little to gain: {100 * gain:.0f} % of the parameters that train have inputs worth whitening. {cost}"
    worth = f"{100 * gain:.0f} % of the parameters that train have inputs worth whitening"
    if step <= CHEAP:
        return f"Whiten it: {worth}. {cost}"
    if step <= DEAR:
        return f"Whiten it, if it saves {100 * (1 - 1 / step):.0f} % of the steps: {worth}. {cost}"
    return f"It pays in steps, hardly in seconds: {worth}. {cost} A larger batch makes it relatively cheaper."
