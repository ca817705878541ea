"""Rows from polynomials through past outputs: against quadrature, powers and the weights of Adams and Bashforth."""

import math

import numpy as np
import pytest

from fewstep.errors import FewstepError
from fewstep.samplers import Grid, lagrange_row
from tests.solver_fixtures import SCHEDULES, points


@pytest.mark.parametrize("basis", ["data", "noise"])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_lagrange_rows_are_exact_for_polynomials(basis, count):
    """m = lambda^(count - 1) against Gauss-Legendre quadrature of the kernel: 40 nodes are exact to rounding here."""
    *rest, s, t = points([-0.9, -0.5, 0.1, 0.4, 1.1])
    nodes = [s, *rest[::-1]][:count]
    row = lagrange_row(basis, "lambda", nodes, s, t)
    h = t.lam - s.lam
    x, w = np.polynomial.legendre.leggauss(40)
    u = h * (x + 1) / 2
    kernel = t.alpha * np.exp(u - h) if basis == "data" else -t.sigma * np.exp(h - u)
    for degree in range(count):
        expected = float(np.sum(w * h / 2 * kernel * (s.lam + u) ** degree))
        got = sum(b * n.lam**degree for b, n in zip(row.outputs, nodes, strict=True))
        assert got == pytest.approx(expected, abs=1e-13)


@pytest.mark.parametrize(("basis", "variable"), [("velocity", "sigma"), ("noise", "rho")])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_rows_without_exponential_weight_are_adams_bashforth(basis, variable, count):
    schedule = SCHEDULES["flow"]
    *rest, s, t = Grid.sigmas(schedule, [0.95, 0.8, 0.7, 0.5, 0.3]).points()[:-1]
    nodes = [s, *rest[::-1]][:count]
    row = lagrange_row(basis, variable, nodes, s, t)
    value = (lambda p: p.sigma) if variable == "sigma" else (lambda p: p.rho)
    scale = 1.0 if basis == "velocity" else t.alpha
    for d in range(count):
        expected = scale * (value(t) ** (d + 1) - value(s) ** (d + 1)) / (d + 1)
        got = sum(b * value(n) ** d for b, n in zip(row.outputs, nodes, strict=True))
        assert got == pytest.approx(expected, rel=1e-11)


def test_equal_steps_give_the_classical_adams_bashforth_weights():
    nodes = Grid.sigmas(SCHEDULES["flow"], [0.9, 0.8, 0.7, 0.6, 0.5]).points()[:-1]
    row = lagrange_row("velocity", "sigma", nodes[3::-1], nodes[3], nodes[4])
    step = nodes[4].sigma - nodes[3].sigma
    assert [24 * w / step for w in row.outputs] == pytest.approx([55, -59, 37, -9], rel=1e-10)


def test_rows_refuse_what_has_no_closed_form():
    s, t = points([0.0, 1.0])
    with pytest.raises(FewstepError, match="no closed form"):
        lagrange_row("data", "rho", [s], s, t)
    with pytest.raises(FewstepError, match="data basis"):
        lagrange_row("noise", "lambda", [s], s, t, eta=1.0)
    a, b, end = points([0.0, 1.0, math.inf])
    with pytest.raises(FewstepError, match="infinite"):
        lagrange_row("data", "lambda", [b, a], b, end)
