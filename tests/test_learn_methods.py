"""The published methods on a mixture whose model is exact: each keeps its word, and what it is a case of it equals."""

import itertools
import math

import numpy as np
import pytest
import torch

from fewstep.errors import ArtifactError, FewstepError
from fewstep.samplers import EMS, DCSolver, DPMSolver, Grid, SolverPlan, UniPC, learn
from fewstep.samplers.learn.fitting.mixture import Mixture, grid_of
from fewstep.samplers.learn.fitting.runner import error, rms
from fewstep.samplers.learn.methods.dynamic import shortest
from fewstep.samplers.learn.methods.evolution import evolve
from fewstep.samplers.schedule import f64
from fewstep.samplers.testing import GaussianMixture
from tests.solver_fixtures import SCHEDULES

MIXTURE = GaussianMixture.random(4, 16, seed=0, spread=0.5)
FAMILIES = ("vp-v", "edm", "flow")


def problem_of(name, data=MIXTURE, n=16, steps=40):
    schedule = SCHEDULES[name]
    model = data.model(schedule)
    noise = torch.randn(n, data.means.shape[1], generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return learn.solve(lambda x, t, which: model(x, t), schedule, noise, steps=steps)


@pytest.fixture(scope="module")
def problems():
    return {name: problem_of(name) for name in FAMILIES}


def mean_error(plan, problem):
    return float(error(plan, problem).mean())


# -- what learning starts from ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", FAMILIES)
def test_untuned_plans_come_the_best_first(problems, name):
    found = learn.untuned(problems[name], 4)
    assert [u.error for u in found] == sorted(u.error for u in found)
    assert found[0].error == pytest.approx(mean_error(found[0].plan, problems[name]), rel=1e-9)
    with pytest.raises(FewstepError, match="in 0 calls"):
        learn.untuned(problems[name], 0)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_shortlist_is_of_different_grids_and_reaches_further_than_the_usual(problems, name):
    problem = problems[name]
    listed = learn.shortlist(problem, 5)
    assert 1 <= len({u.grid for u in listed}) == len(listed) <= 3
    assert [u.error for u in listed] == sorted(u.error for u in listed)
    few = problem.take(slice(0, 6))  # what the last round is judged on
    assert listed[0].error == pytest.approx(mean_error(listed[0].plan, few), rel=1e-9)
    one = problem.take(slice(0, 1))  # all rounds are of it then, and nothing that is better can have been left out
    usual = [u.error for u in learn.untuned(one, 5) if u.solver in (DPMSolver(order=2), UniPC(order=2))]
    assert learn.shortlist(one, 5)[0].error <= min(usual) * (1 + 1e-9)
    with pytest.raises(FewstepError, match="in 0 calls"):
        learn.shortlist(problem, 0)


# -- shortest paths ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("discount", [1.0, 1.15])
def test_the_shortest_path_is_that_of_trying_all(discount):
    cost = torch.rand(8, 8, generator=torch.Generator().manual_seed(5), dtype=torch.float64)

    def total(path):
        return sum(discount**k * float(cost[i, j]) for k, (i, j) in enumerate(itertools.pairwise(path)))

    for steps in (1, 2, 3, 7):
        paths = [(0, *inner, 7) for inner in itertools.combinations(range(1, 7), steps - 1)]
        assert tuple(shortest(cost, steps, discount)) == min(paths, key=total)
    with pytest.raises(FewstepError, match="9 steps do not fit on 8 times"):
        shortest(cost, 9)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("method", [learn.boss, learn.gits, learn.ays], ids=lambda m: m.__name__)
def test_grids_by_dynamic_programming(problems, name, method):
    grid = method(problems[name], 5)
    assert grid.steps == 5
    assert math.isinf(float(grid.lam[-1]))
    assert float(grid.lam[0]) == float(problems[name].lam[0])  # the noise is where it is
    assert math.isfinite(mean_error(DPMSolver(order=1).compile(grid.schedule, grid), problems[name]))


def test_boss_has_the_least_sum_of_one_step_errors(problems):
    """Against the uniform grid, by its own cost: DDIM from the teacher's states."""
    problem = problems["vp-v"]
    schedule, lam = problem.schedule, problem.lam

    def cost(indices):
        total = 0.0
        for i, j in itertools.pairwise(indices):
            (ai, si), (aj, sj) = (tuple(map(float, schedule.alpha_sigma(lam[k]))) for k in (i, j))
            x0 = MIXTURE.x0(problem.states[i], f64(ai), f64(si))
            step = sj / si * problem.states[i] + (aj - sj / si * ai) * x0
            total += float(((step - problem.states[j]) / aj).square().mean())
        return total

    grid = learn.boss(problem, 5)
    chosen = [*(int((lam - v).abs().argmin()) for v in grid.lam[:-1]), len(lam) - 1]
    uniform = [round(k * (len(lam) - 1) / 5) for k in range(6)]
    assert cost(chosen) < cost(uniform)


def test_ays_of_a_gaussian_is_the_minimum_of_the_bound_in_closed_form():
    """For data N(0, c^2 I): E||D(x_t) - D(x_s)||^2 is proportional to 1/(t^2 + c^2) - 1/(s^2 + c^2), so the bound is an integral
    that SciPy minimises; on 64 times the path has to come within 2 % of that minimum, and of one draw of noise 10 %."""
    from scipy.integrate import quad
    from scipy.optimize import minimize

    c, schedule = 0.5, SCHEDULES["edm"]
    data = GaussianMixture(torch.zeros(1, 64).double(), torch.tensor([c]).double(), torch.ones(1).double())
    problem = problem_of("edm", data, n=64)

    def rate(v, s):
        return math.exp(2 * v) * c**4 * (1 / (math.exp(-2 * v) + c**2) - 1 / (s * s + c**2))

    def bound(lam):
        return sum(quad(rate, a, b, args=(math.exp(-a),), limit=200)[0] for a, b in itertools.pairwise(lam))

    low, high = -math.log(80.0), -math.log(0.002)
    grid = learn.ays(problem, 5)
    found = [*grid.lam[:-1].tolist(), high]

    def of_gaps(gaps):
        share = np.exp(gaps - gaps.max())
        return bound([low, *(low + (high - low) * np.cumsum(share / share.sum()))])

    best = minimize(of_gaps, np.log(np.diff([low, *found[1:]])), method="Nelder-Mead", options={"maxiter": 800}).fun
    assert bound(found) < 1.1 * best
    assert schedule == grid.schedule


# -- compensation ratios ----------------------------------------------------------------------------------------------
def test_searched_ratios_help_and_the_first_are_left_alone(problems):
    problem = problems["vp-v"]
    grid = Grid.uniform_lambda(problem.schedule, 6, terminal="zero")
    ratios = learn.dc_search(problem, grid, base=UniPC())
    assert ratios[:2] == (1.0, 1.0)
    assert all(0.5 <= r <= 1.5 for r in ratios)
    plain, compensated = (DCSolver(UniPC(), r).compile(problem.schedule, grid) for r in (None, ratios))
    assert mean_error(compensated, problem) < mean_error(plain, problem)


def test_ratios_along_a_curve_help_and_are_a_cubic(problems):
    problem = problems["vp-v"]
    grid = Grid.uniform_lambda(problem.schedule, 8, terminal="zero")
    ratios = learn.dc_curve(problem, grid, samples=8)
    assert ratios[:2] == (1.0, 1.0)
    inner = np.asarray(ratios[2:])
    assert ((inner > 0.5) & (inner < 1.5)).all(), "at the bound it would be no cubic"
    assert np.abs(np.diff(inner, 4)).max() < 1e-12
    plain, compensated = (DCSolver(UniPC(), r).compile(problem.schedule, grid) for r in (None, ratios))
    assert mean_error(compensated, problem) < mean_error(plain, problem)
    again = learn.dc_curve(problem, grid, samples=8, start=ratios, evaluations=1)
    assert again == pytest.approx(ratios, abs=1e-9)
    with pytest.raises(FewstepError, match="2 ratios to start from"):
        learn.dc_curve(problem, grid, start=(1.0, 1.0))
    with pytest.raises(FewstepError, match="at least 0, got -1"):
        learn.dc_curve(problem, grid, degree=-1)


def test_a_cascade_returns_ratios_that_are_such_a_cascade(tmp_path):
    """A surface inside the model's span is found exactly, also where it was not given."""

    def ratio(n, g, i):
        return 1 + 0.1 * (i / n) ** 3 * (1 + g / 12) - 0.2 * (i / n) * (n / 50) ** 2 + 0.05 * (g / 12) ** 2

    def ratios(n, g):
        return [1.0, 1.0, *(ratio(n, g, i) for i in range(2, n))]

    cascade = learn.Cascade.fit({(n, g): ratios(n, g) for n in (6, 8, 10) for g in (1.5, 3.0, 7.5)})
    assert cascade.predict(9, 5.0) == pytest.approx(ratios(9, 5.0), abs=1e-6)
    cascade.save(tmp_path / "cascade.json")
    assert learn.Cascade.load(tmp_path / "cascade.json").predict(7, 2.0) == cascade.predict(7, 2.0)
    for outside in ((11, 3.0), (5, 3.0), (8, 8.0), (8, 1.0)):
        with pytest.raises(FewstepError, match="cubics do not extrapolate"):
            cascade.predict(*outside)
    with pytest.raises(FewstepError, match="3 ratios are given for 6 calls"):
        learn.Cascade.fit({(6, 1.0): [1.0] * 3})
    with pytest.raises(FewstepError, match="no step is compensated"):
        learn.Cascade.fit({})
    with pytest.raises(ArtifactError):
        learn.Cascade.load(tmp_path / "nothing.json")


# -- model statistics -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("scalar", [False, True])
def test_statistics_of_a_gaussian_are_known(scalar):
    """eps is linear in x: sigma d eps / dx = sigma^2 / (alpha^2 s^2 + sigma^2), which random signs find without variance."""
    s = 0.5
    data = GaussianMixture(torch.full((1, 6), 0.4).double(), torch.tensor([s]).double(), torch.ones(1).double())
    problem = problem_of("vp-v", data, n=8)
    found = learn.ems(problem, samples=8, scalar=scalar)
    alpha, sigma = problem.schedule.alpha_sigma(found.lam)
    expected = sigma**2 / (alpha**2 * s**2 + sigma**2)
    assert torch.allclose(found.l, expected if scalar else expected[:, None].expand(-1, 6), rtol=1e-9)
    grid = Grid.uniform_lambda(problem.schedule, 6, terminal="zero")
    assert math.isfinite(mean_error(EMS(order=2, statistics=found).compile(problem.schedule, grid), problem))
    with pytest.raises(FewstepError, match="at least four finite lambdas and two samples"):
        learn.ems(problem, samples=1)


# -- searches ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["vp-v", "flow"])
def test_searched_decisions_are_at_least_as_good_as_what_they_start_from(problems, name):
    problem = problems[name]
    grid = learn.untuned(problem, 5)[0].grid
    seen = []
    found = learn.s3(problem, grid, options=learn.Evolution(evaluations=25), report=lambda *a: seen.append(a))
    assert len(found.genes) == 5
    assert found.cost == min(found.history)
    assert found.cost == pytest.approx(mean_error(found.plan, problem))
    assert found.cost <= found.history[0]
    assert len(seen) == len(found.history) <= 25
    again = learn.s3(problem, grid, options=learn.Evolution(evaluations=25))
    assert again.genes == found.genes  # the seed decides


def test_the_objective_of_a_search_is_the_callers(problems):
    """An objective that counts nodes: the search finds plans of first-order rows."""
    problem = problems["vp-v"]
    grid = Grid.uniform_lambda(problem.schedule, 5, terminal="zero")
    found = learn.s3(
        problem,
        grid,
        objective=lambda plan: 1.0 + float((plan.output != 0).sum()),
        options=learn.Evolution(evaluations=80),
    )
    assert found.cost < found.history[0]


def test_searched_times(problems):
    problem = problems["vp-v"]
    solver = DPMSolver(order=2)
    starts = [u.error for u in learn.untuned(problem, 5) if u.solver == solver]
    grid = learn.autodiffusion(problem, 5, solver=solver, options=learn.Evolution(evaluations=40))
    assert grid.steps == 5
    # the search starts from these grids, moved onto 64 times
    assert mean_error(solver.compile(problem.schedule, grid), problem) < 1.05 * min(starts)


def test_a_search_without_a_finite_plan_says_so():
    with pytest.raises(FewstepError, match="none of 1 plans has a finite cost"):
        evolve([(1,)], lambda g, _: g, lambda genes: object(), lambda plan: math.nan, learn.Evolution(evaluations=3))


# -- everything that descends -----------------------------------------------------------------------------------------
METHODS = (learn.ld3, learn.time_tuner, learn.s4s, learn.bns, learn.bespoke, learn.neural_solver)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.__name__)
def test_descent_gives_a_plan_with_its_provenance(problems, method, tmp_path):
    problem = problems["flow"]
    plan = method(problem, 4, options=learn.Descent(iterations=8, batch=8))
    told = plan.provenance
    assert told["method"] == method.__name__
    assert told["error_after"] <= told["error_before"]  # the start is a candidate
    assert all(map(math.isfinite, told["loss"]))
    consistent = method not in (learn.bns, learn.bespoke)
    assert not (consistent and plan.problems())
    plan.save(tmp_path / "plan.json")
    assert mean_error(SolverPlan.load(tmp_path / "plan.json", problem.schedule), problem) == mean_error(plan, problem)


def test_each_method_moves_only_what_it_may(problems):
    problem = problems["edm"]
    start = learn.untuned(problem.split(4)[0], 4)[0]
    tuned = learn.time_tuner(problem, 4, options=learn.Descent(iterations=20, batch=12))
    assert torch.allclose(tuned.sigma, start.plan.sigma, rtol=1e-9)
    assert not torch.allclose(tuned.model_time, start.plan.model_time, rtol=1e-6)
    coefficients = learn.s4s(problem, 4, alternate=False, options=learn.Descent(iterations=8, batch=8))
    assert torch.allclose(coefficients.model_time, start.plan.model_time, rtol=1e-6)
    assert not torch.allclose(coefficients.output[:, : start.plan.output.shape[1]], start.plan.output, rtol=1e-6)


# -- averaged AMED ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", FAMILIES)
def test_amed_improves_on_its_start(problems, name):
    plan = learn.amed(problems[name], 6, iterations=3)
    assert plan.nfe == 6
    assert not [p for p in plan.problems() if "row 0" in p]  # first stages are DDIM
    assert plan.base[1::2] == (0, 2, 4)  # every whole step goes from where its stage began
    assert plan.provenance["loss"][-1] < plan.provenance["loss"][0]
    with pytest.raises(FewstepError, match="an even number of them; got 5"):
        learn.amed(problems[name], 5)


# -- the chain --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", FAMILIES)
def test_tune_beats_the_best_untuned_plan_where_it_has_not_looked(name):
    """On 24 further noises: the mixture is smooth, and the floor that the project asks for at 5 calls is 25 %."""
    problem = problem_of(name, n=48)
    fresh, known = problem.take(slice(0, 24)), problem.take(slice(24, 48))
    reports = []
    plan = learn.tune(known, 5, report=reports.append)
    best = min(mean_error(u.plan, fresh) for u in learn.untuned(known, 5)[:3])
    assert mean_error(plan, fresh) < 0.75 * best
    told = plan.provenance
    assert told["error_after"] < told["error_before"]
    train, judge = known.split(len(known) // 3)
    usual = min(learn.untuned(train, 5, samples=8)[:3], key=lambda u: mean_error(u.plan, judge))
    assert told["error_after"] <= mean_error(learn.least_squares(usual.plan, train, free=True), judge)
    for begin in learn.shortlist(train, 5):  # with rows in closed form, that is where it began
        assert told["error_after"] <= mean_error(learn.least_squares(begin.plan, train, free=True), judge) * (1 + 1e-9)
    assert 0 < reports[0].share <= reports[-1].share <= 1
    assert min(h["held_out"] for h in told["history"]) == told["error_after"]


def test_tune_gives_the_untuned_plan_where_there_is_no_time(problems):
    problem = problems["vp-v"]
    plan = learn.tune(problem, 5, seconds=0.0)
    assert plan.provenance["stage"] == "untuned"
    assert plan.provenance["error_after"] == plan.provenance["error_before"]
    with pytest.raises(FewstepError, match="2 trajectories are too few"):
        learn.tune(problem.take(slice(0, 2)), 5)


def test_learning_goes_on_from_a_learned_plan(problems):
    problem = problems["flow"]
    plan = learn.bns(problem, 4, options=learn.Descent(iterations=8, batch=8))
    grid = grid_of(plan, problem.schedule)
    again = Mixture.of(plan, problem.schedule).compile(problem.schedule, grid)
    assert float(rms(again.output, plan.output[:, : again.output.shape[1]]).max()) < 1e-9
    parameters = learn.Parameters(Mixture.of(plan, problem.schedule), problem.schedule, grid)
    assert torch.allclose(parameters.frozen().model_time, plan.model_time, rtol=1e-6, atol=1e-4)
    further = learn.tune(problem, 4, start=plan)
    assert further.provenance["error_after"] <= mean_error(plan, problem.split(len(problem) // 3)[1])
    with pytest.raises(FewstepError, match="the plan to start from has 4 calls, 5 were asked for"):
        learn.tune(problem, 5, start=plan)
    with pytest.raises(ArtifactError, match="the plan to start from was made for"):
        learn.tune(problems["vp-v"], 4, start=plan)
