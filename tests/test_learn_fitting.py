"""What learning is made of: trajectories, the run with gradients, free numbers, and three ways to improve them."""

import dataclasses
import itertools
import math

import pytest
import torch

from fewstep.errors import FewstepError, PlanError
from fewstep.samplers import DDIM, DPMSolver, FlowSolver, Grid, UniPC, sample
from fewstep.samplers.learn import Descent, Parameters, Problem, least_squares, levenberg, solve
from fewstep.samplers.learn.fitting.descent import descend
from fewstep.samplers.learn.fitting.levenberg import first_difference
from fewstep.samplers.learn.fitting.runner import error, rms, run
from fewstep.samplers.testing import GaussianMixture
from tests.solver_fixtures import SCHEDULES

MIXTURE = GaussianMixture.random(4, 16, seed=0, spread=0.5)
NAMES = ("vp", "vp-v", "zero-snr", "edm", "flow")


def problem_of(name="vp", n=12, steps=48, seed=0):
    schedule = SCHEDULES[name]
    model = MIXTURE.model(schedule)
    noise = torch.randn(n, 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return solve(lambda x, t, which: model(x, t), schedule, noise, steps=steps)


@pytest.fixture(scope="module")
def problems():
    return {name: problem_of(name) for name in NAMES}


def start(name, n=4):
    schedule = SCHEDULES[name]
    grid = Grid.uniform_t(schedule, n, spacing="trailing") if name in ("flow", "zero-snr") else Grid.karras(schedule, n)
    return schedule, (FlowSolver(order=2) if name == "flow" else DPMSolver(order=2)), grid


@pytest.mark.parametrize("name", NAMES)
def test_a_teacher_ends_where_the_exact_flow_ends(name):
    """One Gaussian of width s, whose flow is known.

    The last step, from the smallest training rho to 0, is one first-order step: sqrt(s^2 + rho^2) becomes s + rho^2 / s for
    s + rho^2 / (2 s), so deviations from the mean shrink by rho^2 / (2 s^2) too much. The steps before cost less."""
    data = GaussianMixture(torch.full((1, 8), 0.7).double(), torch.tensor([0.5]).double(), torch.ones(1).double())
    schedule = SCHEDULES[name]
    model = data.model(schedule)
    noise = torch.randn(6, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    made = solve(lambda x, t, which: model(x, t), schedule, noise, steps=64)
    lam = made.lam[:1]
    first, last = (tuple(v[0] for v in schedule.alpha_sigma(at)) for at in (lam, torch.tensor([math.inf]).double()))
    exact = data.flow(made.states[0], first, last)
    last_step = float(torch.exp(-2 * made.lam[-2])) / (2 * 0.5**2)
    deviation = float(rms(exact, torch.full_like(exact, 0.7)).max())
    assert float(rms(made.targets, exact).max()) < 1.1 * last_step * deviation + 1e-3 * deviation


@pytest.mark.parametrize("name", NAMES)
def test_states_between_the_kept_ones_are_those_of_more_steps(problems, name):
    """Cubics between 48 states: halving the distance of states moves what lies between by under a hundredth."""
    coarse, fine = problems[name], problem_of(name, steps=192)
    inner = coarse.lam[coarse.lam.isfinite()]
    for share in (0.2, 0.5, 0.83):
        lam = float(inner[0] + share * (inner[-1] - inner[0])) + 1e-3
        assert float(rms(coarse.state_at(lam), fine.state_at(lam)).max()) < 1e-2 * float(
            fine.state_at(lam).square().mean().sqrt()
        )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("order", [1, 2, 3])
def test_the_run_that_keeps_everything_is_the_executors(problems, name, order):
    schedule, _, grid = start(name, 5)
    problem = problems[name]
    plan = UniPC(order=order).compile(schedule, grid)
    expected = sample(lambda x, t: problem.network(x, t, problem.which), problem.noise, plan)
    trace = run(plan, problem)
    assert torch.allclose(trace.end, expected, rtol=1e-11, atol=1e-11)
    again = run(plan, problem, begin=trace.until(3))
    assert torch.equal(again.end, trace.end)
    assert torch.allclose(error(plan, problem), rms(expected, problem.targets), rtol=1e-9)


def test_only_deterministic_plans_of_one_call_a_row_can_be_learned(problems):
    schedule, _, grid = start("vp")
    with pytest.raises(PlanError, match="draws noise"):
        run(DDIM(eta=1.0).compile(schedule, grid), problems["vp"])


@pytest.mark.parametrize("name", NAMES)
def test_free_numbers_at_zero_are_the_solvers_own_plan(name):
    schedule, solver, grid = start(name, 5)
    own = solver.compile(schedule, grid)
    plan = Parameters(solver, schedule, grid, ("grid", "times", "mix", "scale")).frozen()
    assert torch.allclose(plan.output[:, : own.output.shape[1]], own.output, rtol=1e-9, atol=1e-10)
    assert torch.allclose(plan.state, own.state, rtol=1e-9)
    assert torch.allclose(plan.model_time, own.model_time, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_any_numbers_give_a_consistent_plan_on_a_decreasing_grid(name):
    """All parts but ``scale`` keep rows exact for constant outputs: ``validate`` is the judge. Grids check themselves."""
    schedule, solver, grid = start(name, 6)
    parameters = Parameters(solver, schedule, grid, ("grid", "times", "mix"))
    for seed in range(5):
        g = torch.Generator().manual_seed(seed)
        parameters.set(torch.randn(len(parameters.vector()), generator=g, dtype=torch.float64))
        plan = parameters.frozen().validate()
        told = plan.model_time
        assert bool((told.diff() < 0).all())
        hi, lo = schedule.model_time(torch.tensor(schedule.t_range, dtype=torch.float64)).tolist()
        assert bool((told <= hi).all())
        assert bool((told >= lo - 1e-9).all())


@pytest.mark.parametrize("name", ["vp-v", "edm", "flow"])
def test_gradients_of_every_part_are_those_of_differences(problems, name):
    """Central differences of a float64 run: O(h^2) = 1e-10 and rounding of 1e-16 / h."""
    schedule, solver, grid = start(name, 4)
    problem = dataclasses.replace(problems[name], checkpoint=True).take(slice(0, 3))
    parameters = Parameters(solver, schedule, grid, ("grid", "times", "mix", "scale"))
    zero = parameters.vector()
    # off the points where schedules' tables have knots and clamps their ends
    parameters.set(zero + 0.01 * torch.arange(1, len(zero) + 1, dtype=torch.float64) / len(zero))
    here = parameters.vector()

    def loss():
        return rms(run(parameters.plan(), problem).end, problem.targets).mean()

    gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss(), parameters.tensors())])
    for j in range(0, len(here), 3):
        ends = []
        for sign in (1, -1):
            moved = here.clone()
            moved[j] += sign * 1e-5
            parameters.set(moved)
            ends.append(float(loss().detach()))
        assert float(gradient[j]) == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=2e-3, abs=1e-6)
    parameters.set(here)


def test_only_some_parts_can_be_free(problems):
    schedule, solver, grid = start("vp")
    parameters = Parameters(solver, schedule, grid, ("grid", "mix"))
    parameters.set(0.1 * torch.ones(len(parameters.vector()), dtype=torch.float64))
    plan = parameters.frozen()
    with parameters.only(["mix"]):
        assert len(parameters.tensors()) == 1
        assert torch.equal(parameters.frozen().output, plan.output)  # what is held is still there
    assert len(parameters.tensors()) == 2
    with pytest.raises(FewstepError, match="unknown part of a plan 'gird'; did you mean 'grid'"):
        Parameters(solver, schedule, grid, ("gird",))


def test_the_first_row_that_differs():
    schedule, solver, grid = start("vp", 5)
    parameters = Parameters(solver, schedule, grid, ("times", "mix"))
    plan = parameters.frozen()
    assert first_difference(plan, plan) is None
    n = grid.steps
    for index, expected in ((3, (3, True)), (n, (1, False)), (len(parameters.vector()) - 1, (n - 1, False))):
        moved = parameters.vector()
        moved[index] += 0.1
        parameters.set(moved)
        assert first_difference(plan, parameters.frozen()) == expected
        parameters.set(torch.zeros_like(moved))


@pytest.mark.parametrize("name", ["vp-v", "flow"])
def test_levenberg_only_goes_down_and_ends_where_it_says(problems, name):
    schedule, solver, grid = start(name, 4)
    problem = problems[name]
    parameters = Parameters(solver, schedule, grid, ("grid", "times", "mix"))
    before = float(error(parameters.frozen(), problem).mean())
    steps = levenberg(parameters, problem, iterations=4)
    losses = [before, *(s.loss for s in steps)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.5 * before
    assert float(error(parameters.frozen(), problem).mean()) == pytest.approx(losses[-1], rel=1e-6)
    assert all(a.calls < b.calls for a, b in itertools.pairwise(steps))


def test_levenberg_finds_the_optimum_of_a_linear_problem(problems):
    """The last row's mixture alone is a linear least-squares problem: the closed form has the same minimum.

    Least squares weighs all samples alike, Levenberg's steps by 1 / RMS, so the fit is judged by the mean it minimises."""
    schedule, solver, grid = start("vp", 4)
    problem = problems["vp"]
    parameters = Parameters(solver, schedule, grid, ("mix",))
    closed = least_squares(solver.compile(schedule, grid), problem, ridge=1e-12)
    levenberg(parameters, problem, iterations=6)
    assert float(error(parameters.frozen(), problem).mean()) <= float(error(closed, problem).mean()) * 1.001


def test_levenberg_stops_in_time_and_leaves_the_numbers_whole(problems):
    schedule, solver, grid = start("vp", 4)
    parameters = Parameters(solver, schedule, grid, ("grid", "mix"))
    assert levenberg(parameters, problems["vp"], iterations=3, seconds=0.0) == []
    assert bool((parameters.vector() == 0).all())


def test_descent_keeps_the_best_on_what_is_held_out(problems):
    schedule, solver, grid = start("flow", 4)
    train, held_out = problems["flow"].split(4)
    parameters = Parameters(solver, schedule, grid, ("grid", "times"))
    before = float(error(parameters.frozen(), held_out).mean())
    seen = []
    losses = descend(
        parameters, train, held_out, Descent(iterations=30, batch=8, relax=1e-3), report=lambda *a: seen.append(a)
    )
    assert len(losses) == len(seen) == 30
    assert float(error(parameters.frozen(), held_out).mean()) < before
    wild = Parameters(solver, schedule, grid, ("grid", "times"))
    descend(wild, train, held_out, Descent(iterations=5, rate=50.0, batch=8))
    assert float(error(wild.frozen(), held_out).mean()) <= before


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("free", [False, True])
def test_rows_by_least_squares(problems, name, free):
    """Each fitted row is at least as near to its goal as the row it replaces; two calls, where greed is optimal, show it."""
    schedule, _, grid = start(name, 2)
    plan = DPMSolver(order=1).compile(schedule, grid)
    fitted = least_squares(plan, problems[name], free=free, ridge=1e-9)
    miss = [run(p, problems[name]).end - problems[name].targets for p in (plan, fitted)]
    if not free:
        fitted.validate()
        assert float(miss[1].square().mean()) <= float(miss[0].square().mean())
    assert torch.equal(fitted.model_time, plan.model_time)


def test_a_strong_ridge_leaves_the_plan_alone(problems):
    schedule, solver, grid = start("vp", 5)
    plan = solver.compile(schedule, grid)
    fitted = least_squares(plan, problems["vp"], ridge=1e9)
    assert torch.allclose(fitted.output[:, : plan.output.shape[1]], plan.output, atol=1e-7)


def test_bad_problems_are_refused(problems):
    problem = problems["vp"]
    states = problem.states.clone()
    states[7, 2] = math.nan
    with pytest.raises(
        FewstepError, match="1 of 12 teacher trajectories are NaN or infinite, the first that of sample 2"
    ):
        dataclasses.replace(problem, states=states)
    with pytest.raises(FewstepError, match="do not describe trajectories"):
        dataclasses.replace(problem, which=problem.which[:3])
    with pytest.raises(FewstepError, match="12 trajectories cannot be split into 12 held out"):
        problem.split(12)
    broken = dataclasses.replace(problem, network=lambda x, t, which: x * math.nan)
    schedule, solver, grid = start("vp", 3)
    for method in (
        lambda: levenberg(Parameters(solver, schedule, grid), broken),
        lambda: descend(Parameters(solver, schedule, grid), broken, broken, Descent(iterations=2)),
    ):
        with pytest.raises(FewstepError, match="NaN or infinite"):
            method()
    assert isinstance(problem, Problem)
