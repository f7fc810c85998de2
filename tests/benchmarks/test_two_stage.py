"""The two-stage benchmark on a few iterations: what it prints is what it measured."""

from itertools import pairwise

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import two_stage
from benchmarks.two_stage import Curve, Problem, Weights

from . import results

SMALL = ["--sets", "linnerud", "diabetes", "--iterations", "4", "--seeds", "0", "1"]


def test_a_run_leaves_a_table_a_file_and_a_plot(tmp_path, capsys):
    assert two_stage.main([*SMALL, "--lm-limit", "1e6", "--out", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert "LM left out, 332 residuals × 131 parameters: 4.9e+06 multiplications a Jacobian" in output
    assert "OIG-HWO ≤ OWO-HWO" in output and "within 10 % of LM at a tenth" in output
    result = results(tmp_path)
    assert len(result["rows"]) == 2 * (6 + 5) and set(result["left_out"]) == {"diabetes"}
    starts = {}
    for curve in result["curves"]:
        errors = curve["training"]
        assert len(errors) == len(curve["held"]) == len(curve["seconds"]) == len(curve["multiplications"])
        assert all(later <= sooner * (1 + 1e-9) for sooner, later in pairwise(errors))
        assert curve["multiplications"] == sorted(curve["multiplications"])
        starts.setdefault((curve["set"], curve["seed"]), set()).add(round(errors[0], 9))
    assert all(len(errors) == 1 for errors in starts.values())  # all trainers start from the same weights
    assert (tmp_path / "two_stage.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", two_stage.SETS)
def test_every_set_is_standardised_and_a_quarter_is_held_out(name):
    problem = Problem.draw(name, 0)
    rows = len(problem.inputs) + len(problem.held_inputs)
    assert len(problem.held_inputs) == rows // 4 and rows >= 20
    for array in (problem.inputs, problem.targets):
        assert array.mean(0).abs().max() < 1e-9
        spread = array.std(0, correction=0)
        assert ((spread - 1).abs() < 1e-9).logical_or(spread < 1e-9).all()
    other = Problem.draw(name, 1)
    assert not torch.equal(problem.targets, other.targets)


def test_the_jacobian_is_autograds_and_forward_passes_are_counted():
    problem = Problem.draw("linnerud", 0)
    generator = torch.Generator().manual_seed(0)
    shapes = ((3, 4), (3, 3), (3, 4))
    weights = Weights(*(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes))

    def residuals(*parts):
        return Weights(*parts).residuals(problem.inputs, problem.targets).flatten()

    expected = torch.autograd.functional.jacobian(residuals, tuple(vars(weights).values()))
    expected = torch.cat([part.flatten(1) for part in expected], 1)
    torch.testing.assert_close(weights.jacobian(problem.inputs), expected, rtol=1e-9, atol=1e-12)
    assert problem.jacobian == tuple(expected.shape)
    number, features, hidden, outputs = problem.sizes
    with FlopCounterMode(display=False) as counter:
        weights.residuals(problem.inputs, problem.targets)
    assert counter.get_total_flops() / 2 == number * (hidden * features + hidden * outputs + features * outputs)


def test_backpropagation_counts_what_it_multiplies():
    problem = Problem.draw("linnerud", 0)
    points = two_stage.backpropagation(problem, 0, 5)
    _, start = next(points)
    number, features, hidden, _ = problem.sizes
    with FlopCounterMode(display=False) as counter:
        *_, (_, end) = points
    # A forward pass's first product is done twice, and counted once.
    assert counter.get_total_flops() / 2 == end - start + 5 * number * hidden * features


def test_levenberg_marquardt_ends_lowest():
    problem, curve = Problem.draw("diabetes", 0), Curve()
    two_stage.measure("LM", problem, 0, 30, curve)
    other = Curve()
    two_stage.measure("OIG-HWO", problem, 0, 30, other)
    assert curve.training[-1] < other.training[-1] < curve.training[0]
    assert curve.multiplications[-1] > 5 * other.multiplications[-1]


def test_verdicts_are_about_the_tenth_of_the_multiplications():
    runs = {
        ("a", "LM", 0): Curve([1.0, 0.5], [1, 1], [0, 1], [10, 1000]),
        ("a", "OIG-BP", 0): Curve([1.0, 0.54, 0.4], [1, 1, 1], [0, 1, 2], [1, 100, 101]),
        ("a", "OWO-BP", 0): Curve([1.0, 0.56, 0.4], [1, 1, 1], [0, 1, 2], [1, 100, 101]),
    }
    found = two_stage.verdicts(two_stage.medians(two_stage.summarise(runs), ["set", "trainer"]), runs)
    assert found == {
        "OIG-BP ≤ OWO-BP": {"a": True},
        "OWO-BP within 10 % of LM at a tenth of its multiplications": {"a": False},
        "OIG-BP within 10 % of LM at a tenth of its multiplications": {"a": True},
    }


def test_an_interrupt_keeps_what_was_measured(tmp_path, capsys, monkeypatch):
    def interrupted(trainer, problem, seed, iterations, curve):
        if trainer == "OIG-BP":
            raise KeyboardInterrupt
        curve.take(problem, Weights(*(torch.zeros(3, n).double() for n in (4, 3, 4))), 0.1, 5)

    monkeypatch.setattr(two_stage, "measure", interrupted)
    assert two_stage.main([*SMALL, "--out", str(tmp_path)]) == 130
    result = results(tmp_path)
    assert result["interrupted"] and [row["trainer"] for row in result["rows"]] == ["BP", "OWO-BP"]
    assert "interrupted" in capsys.readouterr().err
