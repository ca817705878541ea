"""Orders of the solvers by slope: of one step on a smooth output, and of whole runs on data whose flow is known."""

import math

import pytest
import torch

from fewstep.samplers import DEIS, DPMSolver, UniPC
from fewstep.samplers.schedule import f64
from fewstep.samplers.testing import GaussianMixture
from tests.solver_fixtures import (
    DETERMINISTIC,
    FULL,
    GAUSSIAN,
    HIGH,
    LOW,
    MIXTURE,
    SCHEDULES,
    STOCHASTIC,
    VP,
    ends,
    normal,
    points,
    reference,
    slope,
    starting_grid,
)

# -- one step ----------------------------------------------------------------------------------------------------------
RATE = 0.7
"""The output is m = e^(0.7 lambda): smooth, not a polynomial, and integrable in closed form."""


def exact_step(basis, s, t, eta=0.0):
    h = t.lam - s.lam
    m = math.exp(RATE * s.lam)
    if basis == "data":
        r = 1 + eta
        return t.alpha * r * m * (math.exp(RATE * h) - math.exp(-r * h)) / (r + RATE)
    return -t.sigma * m * (math.exp(RATE * h) - math.exp(h)) / (RATE - 1)


def one_step_slope(weights_of, basis, eta=0.0):
    """Slope of log error over log h at uneven nodes t, 0, -0.8 h, -2.1 h, ...: local order."""
    errors = []
    for h in (0.2, 0.1, 0.05):
        nodes = points([0.3 + h * c for c in (-5.2, -3.5, -2.1, -0.8, 0.0, 1.0)])
        t, s, past = nodes[-1], nodes[-2], nodes[-2::-1]
        used, weights = weights_of(s, t, past)
        got = sum(w * math.exp(RATE * node.lam) for w, node in zip(weights, used, strict=True))
        errors.append(abs(got - exact_step(basis, s, t, eta)))
    return math.log2(errors[1] / errors[2])


@pytest.mark.parametrize("solver", [*DETERMINISTIC, *STOCHASTIC[2:]], ids=str)
def test_one_step_error_is_one_order_above(solver):
    """The predictor's local order p + 1; 3M as published, with half its quadratic term, has that of 2M.

    The slope between h = 0.1 and 0.05 deviates from the limit by O(h): 0.3 covers that and excludes the next integer.
    """
    p = min(solver.order, 2) if getattr(solver, "third_order", "") == "as_published" else solver.order

    def weights(s, t, past):
        used = past[: solver.order]
        return used, solver.row(s, t, used).outputs

    assert one_step_slope(weights, solver.basis, getattr(solver, "eta", 0.0)) == pytest.approx(p + 1, abs=0.3)


@pytest.mark.parametrize("basis", ["data", "noise"])
@pytest.mark.parametrize("b", ["bh1", "bh2"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_corrector_is_one_order_above_its_predictor(order, b, basis):
    solver = UniPC(order=order, solver_type=b, basis=basis)

    def weights(s, t, past):
        used = past[:order]
        return [t, *used], solver.corrector(s, t, used).outputs

    assert one_step_slope(weights, basis) == pytest.approx(order + 2, abs=0.2)


# -- whole runs --------------------------------------------------------------------------------------------------------
def test_the_reference_solution_is_exact():
    for family in ("vp", "ve", "flow"):
        start, end = ends(family)
        x = start[0] * (GAUSSIAN.mu + GAUSSIAN.s * normal(3, 12)) + start[1] * normal(3, 12, seed=1)
        assert torch.allclose(reference(GAUSSIAN, family, x), GAUSSIAN.flow(x, start, end), rtol=0, atol=1e-12)
    one = GaussianMixture(f64([[0.5, -1.0]]), f64([0.7]), f64([1.0]))
    x = normal(4, 2)
    start, end = ends("vp")
    assert torch.allclose(reference(one, "vp", x), one.flow(x, start, end), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("data", "name", "even"),
    [
        (GAUSSIAN, "vp", True),
        (MIXTURE, "vp", False),
        (MIXTURE, "vp-v", True),
        (GAUSSIAN, "flow", False),
        (MIXTURE, "flow", True),
        (GAUSSIAN, "edm", False),
    ],
    ids=["gaussian-vp-even", "mixture-vp-uneven", "mixture-v-even", "gaussian-flow-uneven", "mixture-flow-even",
         "gaussian-edm-uneven"],
)  # fmt: skip
@pytest.mark.parametrize("solver", DETERMINISTIC, ids=str)
def test_global_order(solver, data, name, even):
    p = solver.convergence_order
    counts = (64, 128) if p < 5 else (48, 96)
    if getattr(solver, "third_order", "") == "as_published":
        counts = (256, 512)  # its second-order term is so small that the third-order one hides it before
    first = 2e-7 if p > 1 else 0.5 / counts[0]
    measured = slope(solver, SCHEDULES[name], data, lambda n: starting_grid(n, even, first), counts)
    assert measured == pytest.approx(p, abs=0.25)


@pytest.mark.parametrize("solver", [DPMSolver(order=3, **FULL), UniPC(order=3, **FULL), DEIS(order=4, **FULL)], ids=str)
def test_first_order_warm_up_caps_the_order_at_two(solver):
    """On a grid whose first step is as long as the others, the one first-order step contributes O(h^2).

    UniPC corrects that step to an error of O(h^3), which is its cap.
    """
    cap = 3 if isinstance(solver, UniPC) else 2
    measured = slope(solver, VP, GAUSSIAN, lambda n: torch.linspace(LOW, HIGH, n + 1, dtype=torch.float64), (256, 512))
    assert measured == pytest.approx(cap, abs=0.25)


def test_lowering_the_order_at_the_end_caps_it_at_two():
    solver = DPMSolver(order=3, lower_order_below=None)
    assert slope(solver, VP, GAUSSIAN, lambda n: starting_grid(n, True), (256, 512)) == pytest.approx(2, abs=0.25)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_without_its_corrector_unipc_has_the_order_of_its_predictor(order):
    solver = UniPC(order=order, disable_corrector=tuple(range(200)), **FULL)
    assert slope(solver, VP, GAUSSIAN, lambda n: starting_grid(n, False)) == pytest.approx(order, abs=0.25)
    assert solver.convergence_order == order
