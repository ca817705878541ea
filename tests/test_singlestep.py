"""Singlestep methods: sequences, published formulas, order, the law of the stochastic ones, step control, the scheduler."""

import math
from dataclasses import replace

import diffusers
import pytest
import torch

from fewstep import samplers
from fewstep.errors import FewstepError
from fewstep.samplers import (
    DPMSolver,
    DPMSolverSDE,
    DPMSolverSinglestep,
    Executor,
    Grid,
    Run,
    RungeKutta,
    SolverPlan,
    sample,
    sample_adaptive,
)  # fmt: skip
from fewstep.samplers.schedule import f64
from fewstep.samplers.solvers.runge_kutta import TABLEAUS
from tests.scheduler_fixtures import SD, run, run_with_the_same_noise, smooth_network
from tests.solver_fixtures import (
    GAUSSIAN,
    HIGH,
    LOW,
    MIXTURE,
    SCHEDULES,
    VP,
    grids,
    normal,
    points,
    random_lambdas,
    raw_of,
    slope,
)  # fmt: skip
from tests.tensor_fixtures import relative

PURE = {"lower_order_final": False}
"""Every step of the full number of calls."""
SOLVERS = (
    *(DPMSolverSinglestep(order=p, solver_type=k, basis=b) for p in (1, 2) for k in ("midpoint", "heun")
      for b in ("data", "noise")),
    *(DPMSolverSinglestep(order=3, solver_type=k, basis=b, placing=at) for k in ("midpoint", "heun") for b in ("data", "noise")
      for at in ("lambda", "grid")),
    DPMSolverSinglestep(order=3, second_stage="midpoint"),
    *map(RungeKutta, TABLEAUS),
)  # fmt: skip


# -- exactness -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_a_constant_output_is_solved_exactly_and_calls_are_counted(solver, name):
    schedule = SCHEDULES[name]
    x0, eps = normal(2, 3), normal(2, 3, seed=1)
    for n in (1, 2, 5, 6):
        for grid in grids(schedule, n):
            plan = solver.compile(schedule, grid)
            assert plan.problems() == []
            assert plan.nfe == n
            executor, state = Executor(plan), Run()
            x = plan.alpha[0] * x0 + plan.sigma[0] * eps
            largest = max(x.abs().max(), x0.abs().max())
            for i in range(n):
                x = executor.advance(state, raw_of(schedule, x0, eps, plan.alpha[i], plan.sigma[i]), x)
                largest = max(largest, x.abs().max())
            # rounding of every row relative to the largest state, times what a row's weights magnify
            weights = plan.output.abs().sum(1).max().clamp(min=1)
            assert (x - plan.alpha[-1] * x0 - plan.sigma[-1] * eps).abs().max() <= 1e-13 * n * weights * largest


# -- what a step is ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("n", range(1, 14))
def test_sequences_are_the_papers(n):
    """2206.00927, section 3.4: K = N // 3 + 1; order 3 for K - 2 or K - 1 steps, then what makes N calls."""
    k = n // 3 + 1
    fast = {0: [3] * (k - 2) + [2, 1], 1: [3] * (k - 1) + [1], 2: [3] * (k - 1) + [2]}[n % 3]
    assert DPMSolverSinglestep(order=3).sequence(n) == fast
    assert DPMSolverSinglestep(order=2).sequence(n) == [2] * (n // 2) + [1] * (n % 2)
    if n % 3 == 0:
        assert DPMSolverSinglestep(order=3, **PURE).sequence(n) == [3] * (n // 3)


def test_steps_that_cannot_be_made_are_split():
    solver = DPMSolverSinglestep(order=3)
    lam = [0.0, 0.3, 0.7, 1.0, 1.4]
    assert solver.calls(points([*lam, 2.0])) == [3, 2]
    assert solver.calls(points([*lam, math.inf])) == [3, 1, 1]  # sigma = 0 is reached at first order
    assert solver.calls(points([-math.inf, *lam])) == [1, 2, 2]
    assert solver.calls(points([-math.inf, 0.0, math.inf])) == [1, 1]
    heun, midpoint = RungeKutta("heun", basis="velocity"), RungeKutta("midpoint", basis="velocity")
    ends = Grid.lambdas(SCHEDULES["flow"], [-math.inf, *lam[:3], math.inf]).points()
    assert heun.calls(ends) == [2, 1, 1]  # Heun would evaluate sigma = 0
    assert midpoint.calls(ends) == [2, 2]


def test_stages_restart_from_the_first_state_of_their_step():
    plan = DPMSolverSinglestep(order=3).compile(VP, Grid.lambdas(VP, random_lambdas(8, 0)))
    assert plan.base == (0, 0, 0, 3, 3, 3, 6, 6)
    chained = DPMSolverSinglestep(order=3, eta=1.0).compile(VP, Grid.lambdas(VP, random_lambdas(8, 0)))
    assert chained.base == tuple(range(8))
    assert (chained.noise > 0).all()


def test_stages_lie_where_they_are_placed():
    lam = random_lambdas(6, 3)
    plan = DPMSolverSinglestep(order=3, **PURE).compile(VP, Grid.lambdas(VP, lam))
    got = (plan.alpha / plan.sigma).log()
    shares = f64([0, 1 / 3, 2 / 3])
    expected = [*(a + shares * (b - a) for a, b in ((lam[0], lam[3]), (lam[3], lam[6]))), lam[6:]]
    assert torch.allclose(got, torch.cat(expected), atol=1e-12)
    assert torch.allclose(plan.model_time, VP.model_time(VP.t(got[:-1])), rtol=1e-9)
    own = DPMSolverSinglestep(order=3, placing="grid").compile(VP, Grid.lambdas(VP, lam))
    assert torch.equal(own.model_time, Grid.lambdas(VP, lam).model_time)
    told = Grid.lambdas(VP, lam).with_model_time([900.0, 1.0, 2.0, 400.0, 3.0, 4.0])
    plan = DPMSolverSinglestep(order=3, **PURE).compile(VP, told)
    assert plan.model_time[[0, 3]].tolist() == [900.0, 400.0]  # a step's start is told what the grid says


def rows_applied(plan, outputs):
    """The states of ``plan`` from X_0 = 0 on given converted outputs: what a formula in m is compared with."""
    x = [0.0]
    for i in range(plan.steps):
        x.append(
            sum(w * x[i - k] for k, w in enumerate(plan.state[i].tolist()) if w)
            + sum(w * outputs[i - k] for k, w in enumerate(plan.output[i].tolist()) if w)
        )
    return x


@pytest.mark.parametrize("basis", ["data", "noise"])
@pytest.mark.parametrize("kind", ["midpoint", "heun"])
@pytest.mark.parametrize("r", [(0.5, None), (0.3, 0.65), (1 / 3, 2 / 3)])
def test_two_and_three_stage_formulas_are_the_published_ones(basis, kind, r):
    """The final update of algorithms 1 and 2 (2206.00927) and of 2211.01095, written with phi and psi."""
    r1, r2 = r
    s, t = points([-0.2, 0.9])
    h = t.lam - s.lam
    sign = -1.0 if basis == "data" else 1.0
    out = t.alpha if basis == "data" else t.sigma
    e = math.expm1(sign * h)  # phi_1 or psi_1
    first = -out * e
    linear = out * (e / h + 1) if basis == "data" else -out * (e / h - 1)
    square = -out * ((e / h + 1) / h - 0.5) if basis == "data" else -out * ((e / h - 1) / h - 0.5)
    m = [0.7, -1.1, 0.4]
    d1, d2 = ((m[1] - m[0]) / r1, (m[2] - m[0]) / r2) if r2 else ((m[1] - m[0]) / r1, None)
    if r2 is None:
        expected = first * m[0] + (0.5 * first if kind == "midpoint" else linear) * d1
    elif kind == "midpoint":
        expected = first * m[0] + linear * d2
    else:
        slope, curvature = (r2 * d1 - r1 * d2) / (r2 - r1), 2 * (d2 - d1) / (r2 - r1)
        expected = first * m[0] + linear * slope + square * curvature
    order = 2 if r2 is None else 3
    options = {"r1": r1} if r2 is None else {"r1": r1, "r2": r2}
    solver = DPMSolverSinglestep(order=order, solver_type=kind, basis=basis, **options, **PURE)
    lam = torch.linspace(s.lam, t.lam, order + 1, dtype=torch.float64)
    plan = solver.compile(VP, Grid.lambdas(VP, lam))
    got = rows_applied(plan, m)[-1]
    assert got == pytest.approx(expected, rel=1e-11)


# -- order ---------------------------------------------------------------------------------------------------------------
def uneven(n):
    u = torch.linspace(0, 1, n + 1, dtype=torch.float64)
    return LOW + (HIGH - LOW) * (u + 0.1 * u * (1 - u) * (1 + torch.sin(2 * math.pi * u)))


def even(n):
    return torch.linspace(LOW, HIGH, n + 1, dtype=torch.float64)


def ragged(n):
    """Long and short steps take turns, in a pattern of five that no number of stages divides."""
    steps = torch.tensor([2.0, 1.0, 1.0, 2.0, 1.0] * (n // 5 + 1), dtype=torch.float64)[:n]
    u = torch.cat([f64([0.0]), steps.cumsum(0)])
    return LOW + (HIGH - LOW) * u / u[-1]


@pytest.mark.parametrize(
    ("data", "name", "grid_of"),
    [(MIXTURE, "vp", even), (MIXTURE, "flow", uneven), (MIXTURE, "edm", ragged)],
    ids=["mixture-vp-even", "mixture-flow-uneven", "mixture-edm-ragged"],
)
@pytest.mark.parametrize(
    "solver",
    [
        *(DPMSolverSinglestep(order=p, solver_type=k, basis=b, **PURE) for p in (1, 2, 3) for k in ("midpoint", "heun")
          for b in ("data", "noise") if p > 1 or k == "heun"),
        DPMSolverSinglestep(order=3, second_stage="midpoint", **PURE),
        *(RungeKutta(k) for k in TABLEAUS),
    ],
    ids=str,
)  # fmt: skip
def test_global_order(solver, data, name, grid_of):
    counts = (48, 96) if solver.convergence_order < 4 else (32, 64)
    # the asymptotic slope is approached like h; half an order excludes the neighbours
    assert slope(solver, SCHEDULES[name], data, grid_of, counts) == pytest.approx(solver.convergence_order, abs=0.3)


def test_third_order_needs_its_second_stage_at_two_thirds():
    """Elsewhere m_1, known to second order only, has a weight, and the order is 2: also with a grid's own points."""
    own = DPMSolverSinglestep(order=3, solver_type="heun", placing="grid", **PURE)
    assert slope(own, VP, GAUSSIAN, ragged, (96, 192)) < 2.5
    assert slope(DPMSolverSinglestep(order=3, solver_type="heun", **PURE), VP, GAUSSIAN, ragged, (96, 192)) > 2.7
    moved = DPMSolverSinglestep(order=3, solver_type="heun", r1=0.3, r2=0.8, **PURE)
    assert moved.convergence_order == 2
    assert slope(moved, VP, GAUSSIAN, even, (96, 192)) == pytest.approx(2, abs=0.3)


# -- noise ---------------------------------------------------------------------------------------------------------------
def law(plan, mu, s):
    """Mean and variance of the last state on N(mu, s^2) data: every state as a form in X_0, the draws, and 1.

    The exact denoiser is affine in the state, so the plan's law is Gaussian and known without sampling.
    """
    n = plan.steps
    x, m = [torch.eye(n + 2, dtype=torch.float64)[0]], []
    for i in range(n):
        a, b = plan.alpha[i], plan.sigma[i]
        gain = a * s**2 / (a**2 * s**2 + b**2)
        m.append(gain * x[i])
        m[i][-1] += mu - gain * a * mu
        new = sum(w * x[i - k] for k, w in enumerate(plan.state[i]) if w)
        new = new + sum(w * m[i - k] for k, w in enumerate(plan.output[i]) if w)
        new[1 + i] += plan.noise[i]
        x.append(new)
    start = (plan.alpha[0] * mu, plan.alpha[0] ** 2 * s**2 + plan.sigma[0] ** 2)
    form = x[-1]
    return form[0] * start[0] + form[-1], form[0] ** 2 * start[1] + (form[1:-1] ** 2).sum()


@pytest.mark.parametrize(
    ("solver", "order"),
    [
        (DPMSolver(order=1, eta=1.0), 1),
        (DPMSolver(order=2, eta=1.0, solver_type="heun", lower_order_final=False), 2),
        (DPMSolverSDE(), 2),
        (DPMSolverSDE(solver_type="heun"), 2),
        (DPMSolverSDE(eta=0.5), 2),
        (DPMSolverSDE(r1=0.3), 2),
    ],
    ids=str,
)  # fmt: skip
def test_the_law_of_stochastic_steps_converges(solver, order):
    """The reverse SDE keeps the marginal N(alpha mu, alpha^2 s^2 + sigma^2); what a plan makes of it, by its variance."""
    mu, s = 0.4, 0.7
    errors = []
    for n in (128, 256):
        plan = solver.compile(VP, Grid.lambdas(VP, even(n)))
        mean, variance = law(plan, mu, s)
        errors.append(abs(variance - plan.alpha[-1] ** 2 * s**2 - plan.sigma[-1] ** 2).item())
        assert abs(mean - plan.alpha[-1] * mu) < 1e-2
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.3)


# -- step control --------------------------------------------------------------------------------------------------------
class Counting:
    def __init__(self, model):
        self.model, self.calls = model, 0

    def __call__(self, x, t):
        self.calls += 1
        return self.model(x, t)


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("basis", ["data", "noise"])
@pytest.mark.parametrize("name", ["vp", "edm", "flow"])
def test_adaptive_steps_are_a_plan_that_can_be_run_again(name, basis, order, tmp_path):
    schedule, x = SCHEDULES[name], normal(4, 12)
    errors = []
    for tolerance in (1e-2, 1e-4):
        model = Counting(GAUSSIAN.model(schedule))
        found = sample_adaptive(
            model,
            x,
            schedule,
            order=order,
            basis=basis,
            atol=tolerance,
            rtol=tolerance,
            start=LOW,
            end=HIGH,
            to_zero=False,
        )
        assert model.calls == found.calls >= found.plan.nfe
        assert found.plan.nfe % order == 0
        found.plan.save(tmp_path / "plan.json")
        again = sample(GAUSSIAN.model(schedule), x, SolverPlan.load(tmp_path / "plan.json", schedule))
        # the same rows, their stages' lambdas rounded once more
        assert torch.allclose(again, found.sample, rtol=0, atol=1e-12)
        plan = found.plan
        ends = [(plan.alpha[i], plan.sigma[i]) for i in (0, -1)]
        errors.append((found.sample - GAUSSIAN.flow(x * plan.init_scale, *ends)).abs().max())
    # a step's error E is of order p, that of the higher method p + 1: a hundredth of E is far below a fifth of the error
    assert errors[1] < errors[0] / 5


def test_adaptive_reaches_zero_noise_and_rejects_without_calling_twice():
    schedule, x = VP, normal(4, 12)
    model = Counting(GAUSSIAN.model(schedule))
    found = sample_adaptive(model, x, schedule, first_step=5.0, atol=1e-3, rtol=1e-3)
    assert found.plan.sigma[-1] == 0
    assert found.plan.nfe % 3 == 1
    assert model.calls == found.calls
    rejected = (found.calls - found.plan.nfe) / 2  # two new calls a rejected step of three
    assert rejected == int(rejected) > 0
    assert found.plan.provenance["calls"] == found.calls
    half = sample_adaptive(GAUSSIAN.model(schedule), x.half(), schedule)
    assert half.sample.dtype == torch.float16


def test_adaptive_reaches_an_end_that_rounding_misses():
    """After the first step an exact method takes the rest at once, to lam + (end - lam), an ulp before these ends."""
    lam = -2.0 + 0.05
    ends = [end for end in (1 + 0.0371 * k for k in range(20)) if lam + (end - lam) < end]
    assert len(ends) > 2
    for end in ends:
        found = sample_adaptive(
            lambda x, t: torch.zeros_like(x), normal(2, 3), replace(VP, prediction="sample"), start=-2.0, end=end,
            to_zero=False,
        )  # fmt: skip
        assert found.plan.nfe == 6
        assert torch.equal(
            torch.stack([found.plan.alpha[-1], found.plan.sigma[-1]]), torch.stack(VP.alpha_sigma(f64(end)))
        )


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"order": 4}, "order=4"),
        ({"start": 1.0, "end": 0.0}, "start=1, end=0"),
        ({"max_calls": 5}, "after 5 network calls"),
        ({"basis": "velocity"}, "velocity"),
    ],
)
def test_adaptive_refusals(options, match):
    with pytest.raises(FewstepError, match=match):
        sample_adaptive(GAUSSIAN.model(VP), normal(2, 12), VP, **options)


def test_a_network_that_diverges_is_named():
    with pytest.raises(FewstepError, match="not a number"):
        sample_adaptive(lambda x, t: x * math.nan, normal(2, 3), VP)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: DPMSolverSinglestep(order=4), "orders 1 to 3"),
        (lambda: DPMSolverSinglestep(solver_type="mid"), "midpoint"),
        (lambda: DPMSolverSinglestep(placing="even"), "placing"),
        (lambda: DPMSolverSinglestep(order=3, r1=0.7), "r1 < r2"),
        (lambda: DPMSolverSinglestep(eta=1.0, basis="noise"), "eta"),
        (lambda: DPMSolver(third_order="diffusers_sde"), "eta=1"),
        (lambda: RungeKutta("huen"), "did you mean 'heun'"),
        (lambda: RungeKutta("heun", basis="velocity").compile(VP, Grid.karras(VP, 4)), "flow models"),
    ],
)
def test_bad_options_are_named(make, match):
    with pytest.raises(FewstepError, match=match):
        make()


# -- the scheduler -------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def net():
    return smooth_network()


NOISE = normal(2, 4, 8, 8).float()


@pytest.mark.parametrize("algorithm", ["dpmsolver++", "dpmsolver"])
@pytest.mark.parametrize("kind", ["midpoint", "heun"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_singlestep_equals_diffusers(net, algorithm, kind, order):
    final = "zero" if algorithm == "dpmsolver++" else "sigma_min"
    config = {
        **SD, "algorithm_type": algorithm, "solver_type": kind, "solver_order": order, "final_sigmas_type": final,
        "lower_order_final": True,
    }  # fmt: skip
    for steps in (5, 6, 7, 16):
        if final == "sigma_min" and order == 2 and steps % 2 == 0:
            continue  # diffusers ends such a sequence with two steps of one call, also where it need not
        theirs = diffusers.DPMSolverSinglestepScheduler(**config)
        ours = samplers.DPMSolverSinglestepScheduler(**config, second_stage=kind)
        # diffusers' coefficients are float32: their rounding through 16 rows stays below 1e-4
        assert relative(run(ours, net, NOISE, steps), run(theirs, net, NOISE, steps)) < 1e-4
        assert torch.equal(ours.timesteps, theirs.timesteps)


def test_diffusers_third_order_sde_can_be_repeated_and_is_less_accurate(net):
    config = {**SD, "algorithm_type": "sde-dpmsolver++", "solver_order": 3}
    theirs = diffusers.DPMSolverMultistepScheduler(**config)
    ours = samplers.DPMSolverScheduler(**config, third_order="diffusers_sde")
    assert relative(*run_with_the_same_noise(ours, theirs, net, NOISE, 12)) < 1e-4
    errors = {}
    for third in ("exact", "as_published", "diffusers_sde"):
        solver = DPMSolver(order=3, eta=1.0, third_order=third)
        errors[third] = []
        for h in (0.1, 0.05):
            s2, s1, s, t = points([0.3 - 1.7 * h, 0.3 - 0.8 * h, 0.3, 0.3 + h])
            got = sum(
                w * math.exp(0.7 * p.lam)
                for w, p in zip(solver.row(s, t, [s, s1, s2]).outputs, (s, s1, s2), strict=True)
            )
            exact = t.alpha * 2 * math.exp(0.7 * s.lam) * (math.exp(0.7 * h) - math.exp(-2 * h)) / 2.7
            errors[third].append(abs(got - exact))
    orders = {third: math.log2(a / b) for third, (a, b) in errors.items()}
    assert orders == pytest.approx({"exact": 4, "as_published": 3, "diffusers_sde": 2}, abs=0.35)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("DPMSolverSinglestep", {"solver_order": 3}),
        ("DPMSolverSinglestep", {"solver_order": 3, "placing": "lambda"}),
        ("DPMSolverSinglestep", {"solver_order": 2, "algorithm_type": "sde-dpmsolver++"}),
        ("RungeKutta", {"method": "heun"}),
        ("RungeKutta", {"method": "rk4"}),
    ],
)
def test_schedulers_list_every_stage_and_begin_anywhere(net, name, options):
    s = getattr(samplers, f"{name}Scheduler").from_config(SD, **options)
    s.set_timesteps(9)
    assert len(s.timesteps) == len(s.sigmas) - 1 == s.num_inference_steps == s.plan.nfe == 9
    assert s.timesteps.tolist() == pytest.approx(s.plan.model_time.tolist(), rel=1e-6)
    draw = {"generator": torch.Generator().manual_seed(0)}
    whole = run(s, net, NOISE, **draw)
    assert whole.isfinite().all()
    assert relative(run(s, net, NOISE, 9, generator=torch.Generator().manual_seed(0)), whole) < 1e-6
    for begin in range(1, 9):
        s.set_timesteps(9)
        late = run(s, net, NOISE, begin=begin, **draw)
        assert late.isfinite().all()
        assert s.step_index == 9
    again = type(s).from_config(s.config)
    again.set_timesteps(9)
    assert again.plan.digest == s.plan.digest


def test_a_run_that_begins_at_a_steps_start_makes_the_plans_own_steps(net):
    s = samplers.DPMSolverSinglestepScheduler.from_config(SD, solver_order=3, placing="lambda")
    s.set_timesteps(10)
    assert s.plan.base == (0, 0, 0, 3, 3, 3, 6, 6, 6, 9)
    x = NOISE
    executor, state = Executor(s.plan.tail(3)), Run()
    for t in s.timesteps[3:]:
        x = executor.advance(state, net(x, t), x)
    assert torch.equal(run(s, net, NOISE, begin=3), x)
    assert torch.equal(s.plan.tail(3).output, s.plan.output[3:])  # no row was lowered
    assert torch.equal(s.plan.tail(3).state, s.plan.state[3:])
