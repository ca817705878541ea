"""Solvers in the velocity of a flow: Adams-Bashforth, Runge-Kutta, FlowTurbo and NeuralSolver, against their loops."""

import math
from itertools import pairwise

import diffusers
import numpy as np
import pytest
import torch

from fewstep import samplers
from fewstep.errors import FewstepError, GridError
from fewstep.samplers import DDIM, Executor, FlowSolver, FlowTurbo, Grid, NeuralSolver, Run, RungeKutta, sample
from fewstep.samplers.schedule import f64
from fewstep.samplers.solvers.neural_tables import FLOW, VP
from tests.scheduler_fixtures import FLOW as FLOW_CONFIG
from tests.scheduler_fixtures import SD, run
from tests.solver_fixtures import (
    GAUSSIAN,
    HIGH,
    LOW,
    MIXTURE,
    SCHEDULES,
    normal,
    raw_of,
    slope,
    starting_grid,
)  # fmt: skip
from tests.tensor_fixtures import relative

SCHEDULE = SCHEDULES["flow"]
UNEVEN = [1.0, 0.85, 0.6, 0.55, 0.3, 0.2, 0.0]


def velocity(x, sigma):
    """A smooth nonlinear velocity field that depends on the time."""
    return torch.sin(2 * x) * (1 + sigma) - 0.3 * x


def network(x, tau):
    return velocity(x, tau / 1000)


X = normal(5, 3)


def assert_equal(plan, expected):
    """Equal to rounding of a few rows; X_0 is the noise itself at sigma = 1."""
    assert torch.allclose(sample(network, X / plan.init_scale, plan), expected, rtol=1e-12, atol=1e-12)


# -- Adams-Bashforth -----------------------------------------------------------------------------------------------------
def test_equal_steps_have_the_classical_weights():
    grid = Grid.sigmas(SCHEDULE, np.linspace(1, 0, 9))
    for order, weights in (
        (2, [3 / 2, -1 / 2]),
        (3, [23 / 12, -16 / 12, 5 / 12]),
        (4, [55 / 24, -59 / 24, 37 / 24, -9 / 24]),
    ):
        for steps in ("variable", "equal"):
            plan = FlowSolver(order=order, weights=steps).compile(SCHEDULE, grid)
            # lambda and back costs some digits near sigma = 1 and 0
            assert (plan.output[order:, :order] * -8 - f64(weights)).abs().max() < 1e-9
            assert plan.basis == ("velocity",) * 8


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_rows_are_exact_for_polynomial_velocities_also_to_zero_noise(order):
    grid = Grid.sigmas(SCHEDULE, UNEVEN)
    plan = FlowSolver(order=order).compile(SCHEDULE, grid)
    sigma = grid.sigma
    for d in range(order):
        for i in range(order - 1, plan.steps):
            got = sum(w * sigma[i - k] ** d for k, w in enumerate(plan.output[i].tolist()) if w)
            assert got.item() == pytest.approx(
                ((sigma[i + 1] ** (d + 1) - sigma[i] ** (d + 1)) / (d + 1)).item(), abs=1e-13
            )


def test_first_order_is_euler_and_ddim():
    for grid in (Grid.sigmas(SCHEDULE, UNEVEN), Grid.uniform_t(SCHEDULE, 7)):
        model = MIXTURE.model(SCHEDULE)
        x = normal(4, 2)
        euler = (FlowSolver(order=1), RungeKutta("euler", basis="velocity"), DDIM())
        results = [sample(model, x, s.compile(SCHEDULE, grid)) for s in euler]
        assert torch.allclose(results[0], results[1], rtol=0, atol=1e-12)
        assert torch.allclose(results[0], results[2], rtol=0, atol=1e-12)


# -- FlowTurbo -----------------------------------------------------------------------------------------------------------
def flowturbo(x, sigma, heun, pseudo, correct_end):
    """The blocks as the paper has them: Heun, then pseudo-corrector steps that take the last prediction's velocity."""
    kept = None
    for i in range(heun + pseudo):
        d = velocity(x, sigma[i]) if i < heun or kept is None else kept
        step = sigma[i + 1] - sigma[i]
        predicted = x + step * d
        last = i == heun + pseudo - 1
        if last and not correct_end:
            return predicted
        kept = velocity(predicted, sigma[i + 1])
        x = x + step / 2 * (d + kept)
    return x


@pytest.mark.parametrize("correct_end", [False, True])
@pytest.mark.parametrize(("heun", "pseudo"), [(1, 5), (2, 4), (3, 2), (1, 1)])
@pytest.mark.parametrize("even", [True, False])
def test_flowturbo_is_its_blocks(heun, pseudo, even, correct_end):
    n = heun + pseudo
    levels = np.linspace(1, 0.1, n + 1) if even else np.sort(1 - 0.95 * np.random.default_rng(0).random(n + 1))[::-1]
    # the grid counts calls: Heun steps span two of its intervals, the points between them say nothing
    doubled = heun if correct_end else heun - 1
    sigmas = [levels[0]]
    for i in range(n):
        two = i < heun - 1 or (correct_end and i == n - 1)
        sigmas += [(levels[i] + levels[i + 1]) / 2, levels[i + 1]] if two else [levels[i + 1]]
    grid = Grid.lambdas(SCHEDULE, SCHEDULE.lam_from_sigma(f64(sigmas)))
    plan = FlowTurbo(heun=heun, correct_end=correct_end).compile(SCHEDULE, grid)
    assert plan.problems() == []
    assert plan.nfe == len(sigmas) - 1 == n + doubled
    assert torch.allclose(
        sample(network, X / plan.init_scale, plan),
        flowturbo(X, f64(levels.tolist()), heun, pseudo, correct_end),
        atol=1e-12,
    )


def test_pseudo_corrector_steps_are_adams_bashforth_on_even_grids():
    grid = Grid.sigmas(SCHEDULE, np.linspace(1, 0, 9))
    turbo, adams = (s.compile(SCHEDULE, grid) for s in (FlowTurbo(), FlowSolver(order=2)))
    assert torch.allclose(turbo.output, adams.output, rtol=0, atol=1e-12)
    uneven = Grid.sigmas(SCHEDULE, UNEVEN)
    assert not torch.allclose(
        FlowTurbo().compile(SCHEDULE, uneven).output, FlowSolver().compile(SCHEDULE, uneven).output
    )


# -- Runge-Kutta ---------------------------------------------------------------------------------------------------------
def test_runge_kutta_in_sigma_is_the_classical_method():
    grid = Grid.lambdas(SCHEDULE, SCHEDULE.lam_from_sigma(f64(np.linspace(1, 0.2, 9).tolist())))
    for name, k in (("heun", 2), ("rk4", 4)):
        x = X
        for i in range(0, 8, k):
            s, h = 1 - 0.1 * i, -0.1 * k
            if k == 2:
                k1 = velocity(x, s)
                x = x + h / 2 * (k1 + velocity(x + h * k1, s + h))
            else:
                k1 = velocity(x, s)
                k2 = velocity(x + h / 2 * k1, s + h / 2)
                k3 = velocity(x + h / 2 * k2, s + h / 2)
                x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + velocity(x + h * k3, s + h))
        assert_equal(RungeKutta(name, basis="velocity").compile(SCHEDULE, grid), x)


def test_heun_equals_diffusers():
    theirs = diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0)
    theirs.set_timesteps(6)
    x = X.float()
    for t in theirs.timesteps:
        x = theirs.step(velocity(x, t / 1000), t, x).prev_sample
    levels = [float(v) for v in theirs.sigmas[:1]] + [float(v) for v in theirs.sigmas[1:-1:2]]
    between = [v for a, b in pairwise(levels) for v in (a, (a + b) / 2)]
    ours = samplers.RungeKuttaScheduler.from_config(theirs.config)
    y = X.float()
    ours.set_timesteps(sigmas=[*between, levels[-1]])
    assert torch.allclose(ours.timesteps, theirs.timesteps, rtol=1e-5)
    for t in ours.timesteps:
        y = ours.step(velocity(y, t / 1000), t, y).prev_sample
    assert relative(y, x) < 1e-4


# -- order ---------------------------------------------------------------------------------------------------------------
def sigma_grid(n, *pattern):
    """Steps in sigma between the ends of the problem whose lengths follow ``pattern``."""
    steps = f64(list(pattern)).repeat(n // len(pattern) + 1)[:n]
    high, low = (1 / (1 + math.exp(lam)) for lam in (LOW, HIGH))
    sigma = high + (low - high) * torch.cat([f64([0.0]), steps.cumsum(0)]) / steps.sum()
    lam = SCHEDULE.lam_from_sigma(sigma)
    return torch.cat([f64([LOW]), lam[1:-1], f64([HIGH])])


@pytest.mark.parametrize("even", [True, False])
@pytest.mark.parametrize("order", [2, 3, 4])
def test_adams_has_its_order(order, even):
    data = MIXTURE if even else GAUSSIAN
    assert slope(FlowSolver(order=order), SCHEDULE, data, lambda n: starting_grid(n, even), (64, 128)) == pytest.approx(
        order, abs=0.25
    )


def test_equal_step_weights_are_of_first_order_where_steps_take_turns():
    equal = FlowSolver(order=2, weights="equal")
    assert slope(equal, SCHEDULE, GAUSSIAN, lambda n: sigma_grid(n, 1.0), (48, 96)) == pytest.approx(2, abs=0.25)
    assert slope(equal, SCHEDULE, GAUSSIAN, lambda n: sigma_grid(n, 2.0, 1.0), (96, 192)) == pytest.approx(1, abs=0.25)
    assert slope(FlowSolver(order=2), SCHEDULE, GAUSSIAN, lambda n: sigma_grid(n, 2.0, 1.0), (48, 96)) == pytest.approx(
        2, abs=0.25
    )


@pytest.mark.parametrize("solver", [FlowTurbo(), FlowTurbo(heun=3), FlowTurbo(heun=2, correct_end=True)], ids=str)
def test_flowturbo_is_of_second_order(solver):
    assert slope(solver, SCHEDULE, MIXTURE, lambda n: sigma_grid(n, 1.0), (64, 128)) == pytest.approx(2, abs=0.25)


@pytest.mark.parametrize("pattern", [(1.0,), (2.0, 1.0, 1.0)])
@pytest.mark.parametrize("method", ["midpoint", "heun", "kutta3", "ssp3", "rk4"])
def test_runge_kutta_has_its_order(method, pattern):
    solver = RungeKutta(method, basis="velocity")
    counts = (48, 96) if solver.convergence_order < 4 else (24, 48)
    order = slope(solver, SCHEDULE, MIXTURE, lambda n: sigma_grid(n, *pattern), counts)
    assert order == pytest.approx(solver.convergence_order, abs=0.3)


# -- constants -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "solver",
    [
        *(FlowSolver(order=p, weights=k) for p in (2, 4) for k in ("variable", "equal")), FlowTurbo(), FlowTurbo(heun=2),
        *(RungeKutta(k, basis="velocity") for k in ("heun", "midpoint", "kutta3", "rk4")),
    ],
    ids=str,
)  # fmt: skip
def test_a_constant_velocity_is_solved_exactly(solver):
    x0, eps = normal(2, 3), normal(2, 3, seed=1)
    for n in (3, 4, 9):
        for grid in (
            Grid.uniform_t(SCHEDULE, n),
            Grid.karras(SCHEDULE, n, terminal="sigma_min"),
            Grid.karras(SCHEDULE, n),
        ):
            plan = solver.compile(SCHEDULE, grid)
            assert plan.problems() == []
            assert plan.nfe == n
            executor, state = Executor(plan), Run()
            x = plan.alpha[0] * x0 + plan.sigma[0] * eps
            for i in range(n):
                x = executor.advance(state, raw_of(SCHEDULE, x0, eps, plan.alpha[i], plan.sigma[i]), x)
            # rounding of n rows whose weights sum to at most 20, on numbers of size 3
            assert (x - plan.alpha[-1] * x0 - plan.sigma[-1] * eps).abs().max() < 1e-13 * n * 60


# -- NeuralSolver --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("steps", FLOW)
def test_neural_solver_is_the_papers_loop_on_flows(steps):
    table = FLOW[steps]
    grid = NeuralSolver.grid(SCHEDULE, steps)
    plan = NeuralSolver().compile(SCHEDULE, grid)
    assert grid.sigma[0] == 1
    assert grid.sigma[-1] == 0
    assert torch.allclose(-grid.sigma.diff() * sum(table.steps), f64(table.steps), atol=1e-12)
    x, seen = X, []
    for i, step in enumerate((-grid.sigma.diff()).tolist()):
        seen.append(-velocity(x, grid.sigma[i]))  # the paper's time runs from noise to data
        mixed = (1 - sum(table.mix[i])) * seen[i]
        for j, c in enumerate(table.mix[i]):
            mixed = mixed + c * seen[j]
        x = x + step * mixed
    # weights of up to 9 in the tables, over up to 15 rows
    assert torch.allclose(sample(network, X, plan), x, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("name", "tables"), [("vp", VP), ("flow", FLOW)])
def test_searched_coefficients_beat_euler_on_their_own_times(name, tables):
    """On data that nobody searched on: a typing error in a table would show."""
    schedule, x = SCHEDULES[name], normal(16, 12)
    for steps in tables:
        grid = NeuralSolver.grid(schedule, steps)
        assert grid.steps == steps
        errors = []
        for solver in (NeuralSolver(), DDIM()):
            plan = solver.compile(schedule, grid)
            assert plan.problems() == []
            exact = GAUSSIAN.flow(x * plan.init_scale, (plan.alpha[0], plan.sigma[0]), (f64(1.0), f64(0.0)))
            errors.append((sample(GAUSSIAN.model(schedule), x, plan) - exact).norm())
        assert errors[0] < errors[1] / 1.5


def test_tables_are_triangular():
    for tables in (FLOW, VP):
        for steps, table in tables.items():
            assert len(table.steps) == len(table.mix) == steps
            assert [len(row) for row in table.mix] == list(range(steps))
            assert sum(table.steps) == pytest.approx(1, abs=5e-5 * steps)  # four digits each


# -- refusals and the scheduler ------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: FlowSolver().compile(SCHEDULES["vp"], Grid.karras(SCHEDULES["vp"], 4)), "flow models"),
        (lambda: FlowTurbo().compile(SCHEDULES["edm"], Grid.karras(SCHEDULES["edm"], 4)), "flow models"),
        (lambda: FlowSolver(weights="even"), "weights of FlowSolver"),
        (lambda: FlowSolver(order=5), "orders 1 to 4"),
        (lambda: FlowTurbo(heun=0), "heun=0"),
        (lambda: NeuralSolver().compile(SCHEDULES["edm"], Grid.karras(SCHEDULES["edm"], 5)), "flow and vp"),
        (lambda: samplers.FlowScheduler(**FLOW_CONFIG, method="adam").set_timesteps(4), "did you mean 'adams'"),
        (
            lambda: samplers.FlowScheduler.from_config(diffusers.DDIMScheduler(**SD).config).set_timesteps(4),
            "flow models",
        ),
    ],
)
def test_bad_options_are_named(make, match):
    with pytest.raises(FewstepError, match=match):
        make()


def test_too_few_calls_are_named():
    with pytest.raises(GridError, match="at least 5 network calls"):
        FlowTurbo(heun=3).compile(SCHEDULE, Grid.uniform_t(SCHEDULE, 4))
    with pytest.raises(GridError, match="5, 6, 7, 8, 9, 10, 15 steps, not 4"):
        NeuralSolver().compile(SCHEDULE, Grid.uniform_t(SCHEDULE, 4))


@pytest.mark.parametrize(
    ("options", "solver"),
    [
        ({"solver_order": 3}, FlowSolver(order=3, weights="equal")),
        ({"method": "adams"}, FlowSolver()),
        ({"method": "adams_equal"}, FlowSolver(weights="equal")),
        ({"method": "flowturbo", "heun_steps": 2}, FlowTurbo(heun=2)),
    ],
)
def test_the_scheduler_runs_its_solver(options, solver):
    s = samplers.FlowScheduler.from_config({**FLOW_CONFIG, "_class_name": "FlowMatchEulerDiscreteScheduler"}, **options)
    assert s.solver() == solver
    whole = run(s, network, X, 8)
    assert relative(whole, sample(network, X, s.plan)) < 1e-6
    for begin in range(1, 8):
        assert run(s, network, X, 8, begin=begin).isfinite().all()
    assert type(s).from_config(s.config).solver() == solver
