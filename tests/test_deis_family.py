"""DEIS in its three variables, LMS and iPNDM: integrals, weights, order, and parity with diffusers on the same grid."""

import math
from itertools import pairwise

import diffusers
import numpy as np
import pytest
import torch
from scipy.integrate import quad

from fewstep import samplers
from fewstep.errors import FewstepError
from fewstep.samplers import DEIS, IPNDM, LMS, DPMSolver, Executor, Grid, Run, sample
from fewstep.samplers.schedule import ContinuousVP, f64
from fewstep.samplers.solvers.deis import time_moments
from tests.scheduler_fixtures import SD, run, smooth_network
from tests.solver_fixtures import (
    FULL,
    GAUSSIAN,
    LAM,
    MIXTURE,
    SCHEDULES,
    VP,
    assert_same_result,
    assert_same_rows,
    error_at,
    grids,
    normal,
    points,
    problem,
    raw_of,
    slope,
    starting_grid,
)  # fmt: skip
from tests.tensor_fixtures import relative

FLOW = SCHEDULES["flow"]


# -- tAB -----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("name", "lam"), [("vp", [0.8, 0.95, 1.2]), ("flow", [-4.0, -1.0, 1.5]), ("edm", [-3.0, 0.5])])
def test_moments_in_time_equal_adaptive_quadrature(name, lam):
    schedule = SCHEDULES[name]
    nodes = Grid.lambdas(schedule, lam).points()
    for (s, t), moments in zip(pairwise(nodes), time_moments(schedule, nodes, 4), strict=True):
        pieces = [s.lam, *(v for v in schedule.knots.tolist() if s.lam < v < t.lam), t.lam]

        def integrand(lam, k, s=s, t=t):
            return -math.exp(-lam) * ((schedule.t(f64(lam)).item() - s.t) / (t.t - s.t)) ** k

        for k, got in enumerate(moments):
            parts = [quad(integrand, *ends, args=(k,), epsabs=1e-15, epsrel=1e-13)[0] for ends in pairwise(pieces)]
            expected = math.fsum(parts)
            assert got == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", ["vp", "flow"])
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_rows_in_time_are_exact_for_polynomials_in_time(name, order):
    """eps = t^d, d < order: the state moves by alpha_t integral t^d d rho, here by the trapezoid rule on a million steps."""
    schedule = SCHEDULES[name]
    grid = Grid.lambdas(schedule, [-0.9, -0.5, 0.1, 0.4, 1.1])
    plan = DEIS(order=order, variable="t", **FULL).compile(schedule, grid)
    lam = torch.linspace(0.4, 1.1, 1_000_001, dtype=torch.float64)
    tau, rho = schedule.t(lam), torch.exp(-lam)
    for d in range(order):
        expected = plan.alpha[-1] * ((tau[1:] ** d + tau[:-1] ** d) / 2 * rho.diff()).sum()
        got = sum(w * grid.t[3 - k] ** d for k, w in enumerate(plan.output[3]))
        # the rule's error: (step / h)^2 / 12 of second differences, below 1e-11 relative
        assert got.item() == pytest.approx(expected.item(), rel=1e-9)


def test_where_time_is_rho_the_variables_are_one():
    assert_same_rows(DEIS(order=3, variable="t", **FULL), DEIS(order=3, variable="rho", **FULL), SCHEDULES["edm"])
    assert_same_rows(LMS(order=3), DEIS(order=3, variable="rho", **FULL))
    assert_same_rows(IPNDM(order=4, weights="variable"), LMS(order=4))
    for solver in (DEIS(order=1, variable="t"), IPNDM(order=1), LMS(order=1)):
        assert_same_result(solver, samplers.DDIM(), "vp")


def test_rows_in_time_carry_gradients():
    """Against central differences: a coefficient of the last row with respect to every lambda of the grid."""
    lam = f64([-0.9, -0.5, 0.1, 0.6])

    def weight(lam):
        return DEIS(order=3, variable="t", **FULL).compile(VP, Grid.lambdas(VP, lam)).output[2, 2]

    leaf = lam.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(weight(leaf), leaf)
    # steps of 1e-6 stay within a piece of the schedule's table, and their differences within 1e-6 relative
    for j, e in enumerate(1e-6 * torch.eye(4, dtype=torch.float64)):
        difference = (weight(lam + e) - weight(lam - e)) / 2e-6
        assert gradient[j].item() == pytest.approx(difference.item(), rel=1e-5, abs=1e-8)


# -- constants and ends ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(
    "solver",
    [
        DEIS(order=3, variable="t", **FULL), LMS(), *(IPNDM(weights=k) for k in ("equal", "variable")),
        IPNDM(order=3, weights="diff_sampler"),
    ],
    ids=str,
)  # fmt: skip
def test_a_constant_output_is_solved_exactly(solver, name):
    schedule = SCHEDULES[name]
    x0, eps = normal(2, 3), normal(2, 3, seed=1)
    for n in (1, 2, 6):
        for grid in grids(schedule, n):
            plan = solver.compile(schedule, grid)
            assert plan.problems() == []
            executor, state = Executor(plan), Run()
            x = grid.alpha[0] * x0 + grid.sigma[0] * eps
            largest = max(x.abs().max(), x0.abs().max())
            for i in range(n):
                x = executor.advance(state, raw_of(schedule, x0, eps, grid.alpha[i], grid.sigma[i]), x)
                largest = max(largest, x.abs().max())
            weights = plan.output.abs().sum(1).max().clamp(min=1)
            assert (x - grid.alpha[-1] * x0 - grid.sigma[-1] * eps).abs().max() <= 1e-13 * n * weights * largest


# -- order ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("even", [True, False])
@pytest.mark.parametrize("name", ["flow", "edm"])
@pytest.mark.parametrize(
    "solver", [*(DEIS(order=p, variable="t", **FULL) for p in (2, 3, 4)), LMS(order=3), LMS()], ids=str
)
def test_global_order(solver, name, even):
    data = MIXTURE if even else GAUSSIAN
    assert slope(solver, SCHEDULES[name], data, lambda n: starting_grid(n, even)) == pytest.approx(
        solver.order, abs=0.25
    )


@pytest.mark.parametrize("order", [2, 3])
def test_order_in_the_time_of_a_table(order):
    """t(lambda) of a table is only piecewise smooth: kinks of the size of its second differences, so order 3 at most."""
    solver = DEIS(order=order, variable="t", **FULL)
    assert slope(solver, VP, GAUSSIAN, lambda n: starting_grid(n, True), (24, 48)) == pytest.approx(order, abs=0.4)


def rho_grid(n, *pattern):
    """Steps in rho whose lengths follow ``pattern``."""
    steps = f64(list(pattern)).repeat(n // len(pattern) + 1)[:n]
    rho = math.e + (1 / math.e - math.e) * torch.cat([f64([0.0]), steps.cumsum(0)]) / steps.sum()
    return -rho.log()


def test_equal_step_weights_are_right_on_equal_steps_only():
    """The published weights against the exact ones, where long and short steps take turns: order 1 against 2."""
    equal, variable = IPNDM(order=2), IPNDM(order=2, weights="variable")
    assert slope(equal, VP, GAUSSIAN, lambda n: rho_grid(n, 1.0)) == pytest.approx(2, abs=0.25)
    assert slope(equal, VP, GAUSSIAN, lambda n: rho_grid(n, 2.0, 1.0)) == pytest.approx(1, abs=0.25)
    assert slope(variable, VP, GAUSSIAN, lambda n: rho_grid(n, 2.0, 1.0)) == pytest.approx(2, abs=0.25)
    assert equal.convergence_order == variable.convergence_order == 2  # where steps change smoothly


def local_error(solver, h):
    """One step on eps = e^rho, in which d(x/alpha)/d rho = e^rho is known, with uneven past steps."""
    rho = [1.0 + h * c for c in (4.3, 2.6, 1.1, 0.0, -0.9)]
    *past, t = points([-math.log(r) for r in rho])
    past = past[::-1][: solver.order]
    got = sum(w * math.exp(p.rho) for w, p in zip(solver.row(past[0], t, past).outputs, past, strict=True))
    return abs(got - t.alpha * (math.exp(rho[-1]) - math.exp(rho[-2])))


@pytest.mark.parametrize(
    ("steps", "order", "expected"),
    [
        ("variable", 2, 3), ("variable", 3, 4), ("variable", 4, 5), ("equal", 2, 2), ("equal", 4, 2),
        ("diff_sampler", 2, 3), ("diff_sampler", 3, 3), ("diff_sampler", 4, 1),
    ],
)  # fmt: skip
def test_one_step_error_shows_the_misplaced_terms(steps, order, expected):
    """diff-sampler's ipndm_v is of lower order than the exact weights from order 3 on, and inconsistent at order 4."""
    solver = IPNDM(order=order, weights=steps)
    h = 0.1 if expected > 1 else 0.01  # the inconsistency is small: it shows once what h^3 adds is smaller
    assert math.log2(local_error(solver, h) / local_error(solver, h / 2)) == pytest.approx(expected, abs=0.3)


def test_diff_samplers_weights():
    """At equal steps: right up to order 3, and 57, -65, 43, -11 over 24 in place of 55, -59, 37, -9."""
    nodes = points([-math.log(r) for r in (2.0, 1.8, 1.6, 1.4, 1.2)])
    *past, t = nodes
    past = past[::-1]
    scale = t.alpha * (t.rho - past[0].rho)
    for order, expected in ((2, [36, -12]), (3, [46, -32, 10]), (4, [57, -65, 43, -11])):
        row = IPNDM(order=order, weights="diff_sampler").row(past[0], t, past[:order])
        assert [24 * w / scale for w in row.outputs] == pytest.approx(expected, rel=1e-9)
    plan = IPNDM(weights="diff_sampler").compile(VP, Grid.lambdas(VP, LAM))
    assert plan.problems()  # its fourth-order rows do not even keep a constant


# -- parity --------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def net():
    return smooth_network()


NOISE = normal(2, 4, 8, 8).float()


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("steps", [5, 12])
def test_lms_equals_diffusers(net, order, steps):
    """diffusers keeps x / alpha, and the network sees it scaled back."""
    theirs, ours = diffusers.LMSDiscreteScheduler(**SD), samplers.LMSScheduler(**SD, solver_order=order)
    theirs.set_timesteps(steps)
    x = NOISE * (theirs.sigmas[0] ** 2 + 1).sqrt()
    for t in theirs.timesteps:
        x = theirs.step(net(theirs.scale_model_input(x, t), t), t, x, order=order).prev_sample
    # their integrals are good to a relative 1e-4, and so is a sum of them
    assert relative(run(ours, net, NOISE, timesteps=theirs.timesteps.tolist()), x) < 1e-3


def test_ipndm_equals_diffusers():
    """diffusers' own process is alpha = cos, sigma = sin of pi t / 2 with v prediction: SVD's kind of schedule, told other times.

    At t = 1 diffusers divides 0 by 1e-8 and stands still; both start after it.
    """
    torch.manual_seed(0)
    layer = torch.nn.Conv2d(4, 4, 3, padding=1).double()
    x = normal(2, 4, 8, 8)

    def network(x, t):
        with torch.no_grad():
            return torch.tanh(layer(x)) * math.cos(float(t))

    for steps in (5, 8, 12):
        theirs = diffusers.IPNDMScheduler()
        theirs.set_timesteps(steps)
        theirs.set_begin_index(1)
        y = x
        for t in theirs.timesteps[1:]:
            y = theirs.step(network(y, t), t, y).prev_sample
        times = theirs.timesteps[1:].double()
        schedule = ContinuousVP()
        grid = Grid.sigmas(schedule, torch.tan(times * math.pi / 2)).with_model_time(times)
        plan = IPNDM().compile(schedule, grid)
        ours = sample(network, x / plan.init_scale, plan)
        assert relative(ours, y) < 1e-4  # their betas are float32


def test_schedulers_describe_their_solvers():
    for scheduler, solver in (
        (samplers.IPNDMScheduler(solver_order=3, weights="variable"), IPNDM(order=3, weights="variable")),
        (samplers.LMSScheduler(solver_order=2), LMS(order=2)),
        (samplers.DEISScheduler(solver_order=3, solver_type="t"), DEIS(order=3, variable="t")),
    ):
        assert scheduler.solver() == solver
        scheduler.set_timesteps(6)
        assert type(scheduler).from_config(scheduler.config).solver() == solver
    # a scheduler of a model that never saw iPNDM
    loaded = samplers.IPNDMScheduler.from_config(diffusers.DDIMScheduler(**SD).config)
    assert loaded.solver() == IPNDM(weights="variable")
    for make, match in (
        (lambda: DEIS(variable="time"), "DEIS variable"),
        (lambda: IPNDM(weights="even"), "weights of iPNDM"),
        (lambda: IPNDM(order=5), "orders 1 to 4"),
        (lambda: DEIS(variable="t").row(*points([0.0, 1.0]), []), "depend on the schedule"),
    ):
        with pytest.raises(FewstepError, match=match):
            make()


def test_the_noise_basis_of_deis_differs_from_that_of_dpm_solver():
    """tAB, rho-AB and lambda are three methods: on one nonlinear problem no two agree, and all are near the solution."""
    x, truth = problem(MIXTURE, "vp")
    lam = starting_grid(24, True)
    errors = [
        error_at(s, VP, MIXTURE, lam, x, truth)
        for s in (
            *(DEIS(order=3, variable=v, **FULL) for v in ("t", "rho", "lambda")),
            DPMSolver(order=3, basis="noise", **FULL),
        )
    ]
    assert max(errors) < 1e-3
    assert np.diff(sorted(errors[:3])).min() > 1e-9
