"""Solvers that are equal, and solvers against the formulas and the loop they were published as."""

import math

import numpy as np
import pytest
import torch

from fewstep.samplers import DDIM, DEIS, DPMSolver, Executor, Grid, Run, UniPC, lagrange_row
from fewstep.samplers.schedule import alpha_sigma
from tests.solver_fixtures import FULL, LAM, VP, assert_same_result, assert_same_rows, nonlinear, normal, points

UNCORRECTED = {"disable_corrector": tuple(range(100)), **FULL}


@pytest.mark.parametrize("name", ["vp", "vp-v", "edm", "flow"])
@pytest.mark.parametrize(
    "solver",
    [
        DPMSolver(order=1), DPMSolver(order=1, basis="noise"), UniPC(order=1, **UNCORRECTED),
        UniPC(order=1, basis="noise", **UNCORRECTED), DEIS(order=1), DEIS(order=1, variable="rho"),
    ],
    ids=str,
)  # fmt: skip
def test_first_order_methods_are_ddim(solver, name):
    assert_same_result(solver, DDIM(), name)


@pytest.mark.parametrize("basis", ["data", "noise"])
def test_two_m_midpoint_is_unip_two_bh2(basis):
    assert_same_rows(
        DPMSolver(order=2, basis=basis, **FULL), UniPC(order=2, solver_type="bh2", basis=basis, **UNCORRECTED)
    )


@pytest.mark.parametrize("basis", ["data", "noise"])
def test_three_m_exact_is_unip_three_with_any_b(basis):
    three = DPMSolver(order=3, basis=basis, solver_type="heun", **FULL)
    # the second step of both is of order 2, where UniP-2 fixes its coefficient and 2M heun is exact: compare from row 2
    grid = Grid.lambdas(VP, LAM)
    plans = [
        s.compile(VP, grid)
        for s in (
            three,
            UniPC(order=3, solver_type="bh1", basis=basis, **UNCORRECTED),
            UniPC(order=3, solver_type="bh2", basis=basis, **UNCORRECTED),
        )
    ]
    for plan in plans[1:]:
        assert torch.allclose(plan.output[2:], plans[0].output[2:], rtol=1e-12, atol=1e-13)
        assert torch.equal(plan.state, plans[0].state)


def test_two_m_heun_is_the_lagrange_row():
    """Against the published formula: alpha (1 - e^-h) m0 + alpha (h - 1 + e^-h) D1 / h."""
    nodes = points(LAM)
    for i in range(1, len(nodes) - 1):
        older, s, t = nodes[i - 1 : i + 2]
        h, h0 = (t.lam - s.lam), (s.lam - older.lam)
        second = t.alpha * (h + math.expm1(-h)) / h0
        weights = [-t.alpha * math.expm1(-h) + second, -second]
        for row in (
            DPMSolver(order=2, solver_type="heun").row(s, t, [s, older]),
            lagrange_row("data", "lambda", [s, older], s, t),
        ):
            assert row.outputs == pytest.approx(weights, rel=1e-12)


def test_two_m_midpoint_is_the_published_formula():
    nodes = points(LAM)
    for i in range(1, len(nodes) - 1):
        older, s, t = nodes[i - 1 : i + 2]
        h, h0 = (t.lam - s.lam), (s.lam - older.lam)
        for basis, first in (("data", -t.alpha * math.expm1(-h)), ("noise", -t.sigma * math.expm1(h))):
            weights = [first * (1 + 0.5 * h / h0), -first * 0.5 * h / h0]
            row = DPMSolver(order=2, basis=basis).row(s, t, [s, older])
            assert row.outputs == pytest.approx(weights, rel=1e-12)


@pytest.mark.parametrize("order", [2, 3])
def test_deis_in_lambda_is_dpm_solver_in_the_noise_basis(order):
    assert_same_rows(DEIS(order=order, **FULL), DPMSolver(order=order, solver_type="heun", basis="noise", **FULL))


@pytest.mark.parametrize("basis", ["data", "noise"])
def test_three_m_as_published_has_half_the_quadratic_term(basis):
    """Against the published formula D2 = (D1_0 - D1_1) / (r0 + r1), once as it is and once doubled."""
    s2, s1, s, t = points([0.0, 0.35, 0.6, 1.1])
    h = t.lam - s.lam
    r0, r1 = (s.lam - s1.lam) / h, (s1.lam - s2.lam) / h
    if basis == "data":
        c0 = -t.alpha * math.expm1(-h)
        c1 = t.alpha * (math.expm1(-h) / h + 1)
        c2 = -t.alpha * ((math.expm1(-h) + h) / h**2 - 0.5)
    else:
        c0 = -t.sigma * math.expm1(h)
        c1 = -t.sigma * (math.expm1(h) / h - 1)
        c2 = -t.sigma * ((math.expm1(h) - h) / h**2 - 0.5)
    for third, factor in (("as_published", 1.0), ("exact", 2.0)):
        weights = np.zeros(3)
        for j in range(3):
            m = np.eye(3)[j]
            d10, d11 = (m[0] - m[1]) / r0, (m[1] - m[2]) / r1
            d1 = d10 + r0 / (r0 + r1) * (d10 - d11)
            d2 = (d10 - d11) / (r0 + r1)
            weights[j] = c0 * m[0] + c1 * d1 + factor * c2 * d2
        row = DPMSolver(order=3, third_order=third, basis=basis).row(s, t, [s, s1, s2])
        assert row.outputs == pytest.approx(weights.tolist(), rel=1e-10)


# -- UniPC ---------------------------------------------------------------------------------------------------------------
def unipc_loop(model, x, lam, family, order, b, basis, lowering, disabled):
    """Predict, evaluate, correct, step by step, with the linear systems of the paper: an independent implementation."""
    n = len(lam) - 1
    alpha, sigma = (v.tolist() for v in alpha_sigma(family, lam))
    lam = lam.tolist()
    data = basis == "data"

    def weights(i, p, corrector):
        """First-order weight, rho's and r's of the interval i -> i + 1."""
        h = lam[i + 1] - lam[i]
        hh = -h if data else h
        r = [(lam[i - k] - lam[i]) / h for k in range(1, p)] + [1.0]
        big_b = hh if b == "bh1" else math.expm1(hh)
        q, rhs = math.expm1(hh) / hh - 1, []
        for k in range(1, p + 1):
            rhs.append(q * math.factorial(k) / big_b)
            q = q / hh - 1 / math.factorial(k + 1)
        size = p if corrector else p - 1
        matrix = np.array([[x**k for x in r[:size]] for k in range(size)])
        if size == 1 and (p == 1 or not corrector):
            rho = np.array([0.5])
        else:
            rho = np.linalg.solve(matrix, np.array(rhs[:size])) if size else np.zeros(0)
        if p == 1 and not corrector:
            rho = np.zeros(0)
        return math.expm1(hh), big_b, rho, r

    def advance(i, p, x, history, newest):
        phi, big_b, rho, r = weights(i, p, newest is not None)
        m0 = history[0]
        scale = alpha[i + 1] if data else sigma[i + 1]
        ratio = sigma[i + 1] / sigma[i] if data else alpha[i + 1] / alpha[i]
        out = ratio * x - scale * phi * m0
        for k in range(min(len(rho), p - 1)):
            out = out - scale * big_b * rho[k] * (history[k + 1] - m0) / r[k]
        if newest is not None:
            out = out - scale * big_b * rho[p - 1] * (newest - m0)
        return out

    history, corrected, previous_order = [], x, 0
    for i in range(n):
        m = model(x, i)
        if i and i - 1 not in disabled:
            x = advance(i - 1, previous_order, corrected, history, m)
        corrected = x
        history = [m, *history]
        previous_order = min(order, i + 1, n - i if lowering else order)
        x = advance(i, previous_order, corrected, history, None)
    return x


@pytest.mark.parametrize("disabled", [(), (0,), (1, 3)])
@pytest.mark.parametrize("lowering", [True, False])
@pytest.mark.parametrize("basis", ["data", "noise"])
@pytest.mark.parametrize("b", ["bh1", "bh2"])
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_unipc_rows_equal_the_step_by_step_loop(order, b, basis, lowering, disabled):
    """On a nonlinear model; the loop restarts from a stored corrected state, the rows never see it."""
    grid = Grid.lambdas(VP, LAM)
    solver = UniPC(order=order, solver_type=b, basis=basis, lower_order_final=lowering, disable_corrector=disabled)
    plan = solver.compile(VP, grid)
    executor, run = Executor(plan), Run()
    x = start = normal(5)
    for i in range(plan.steps):
        m = nonlinear(x, i)
        alpha, sigma = grid.alpha[i], grid.sigma[i]
        x = executor.advance(run, m if basis == "noise" else (x - alpha * m) / sigma, x)
    expected = unipc_loop(nonlinear, start, LAM, "vp", order, b, basis, lowering, disabled)
    # a Lipschitz constant of about 5 over 9 steps magnifies rounding (and its like in eps -> x0) by at most 1e4
    assert torch.allclose(x, expected, rtol=1e-11, atol=1e-11 * expected.abs().max().item())


@pytest.mark.parametrize("basis", ["data", "noise"])
def test_an_edit_of_the_state_propagates_as_in_ddim(basis):
    """Inpainting: X_i + delta with the same outputs leads to X_{i+1} + a_i delta."""
    grid = Grid.lambdas(VP, LAM)
    plan = UniPC(order=3, basis=basis, **FULL).compile(VP, grid)
    outputs = [normal(4, seed=i) for i in range(plan.steps)]
    delta = normal(4, seed=77)

    def walk(edit):
        executor, run, x = Executor(plan), Run(), normal(4, seed=99)
        states = []
        for i, m in enumerate(outputs):
            x = x + delta if edit and i == 4 else x
            alpha, sigma = grid.alpha[i], grid.sigma[i]
            x = executor.advance(run, m if basis == "noise" else (x - alpha * m) / sigma, x)
            states.append(x)
        return states

    plain, edited = walk(False), walk(True)
    ratio = (grid.sigma if basis == "data" else grid.alpha)[1:] / (grid.sigma if basis == "data" else grid.alpha)[:-1]
    expected = delta * ratio[4]
    assert torch.allclose(edited[4] - plain[4], expected, rtol=1e-11, atol=1e-13)
    for i in range(5, plan.steps):
        expected = expected * ratio[i]
        assert torch.allclose(edited[i] - plain[i], expected, rtol=1e-11, atol=1e-13)
