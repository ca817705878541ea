"""Momentum: the filters written out as loops, the order that GHVB keeps, and regions of stability."""

import math
from dataclasses import replace
from itertools import pairwise

import diffusers
import pytest
import torch

from fewstep import samplers
from fewstep.errors import FewstepError
from fewstep.samplers import DEIS, GHVB, DPMSolver, Grid, HeavyBall, UniPC, sample
from fewstep.samplers.schedule import EDM, f64
from fewstep.samplers.solvers.ghvb import published_weights
from fewstep.samplers.solvers.ipndm import IPNDM
from fewstep.samplers.stability import LinearMultistep
from tests.solver_fixtures import (
    FULL,
    GAUSSIAN,
    LAM,
    MIXTURE,
    SCHEDULES,
    SD,
    VP,
    assert_same_rows,
    nonlinear,
    normal,
    points,
    run_eps,
    slope,
    starting_grid,
)  # fmt: skip

AB = {1: [1], 2: [3 / 2, -1 / 2], 3: [23 / 12, -16 / 12, 5 / 12], 4: [55 / 24, -59 / 24, 37 / 24, -9 / 24]}


# -- the filters are the published loops ---------------------------------------------------------------------------------
@pytest.mark.parametrize("beta", [0.3, 0.8])
@pytest.mark.parametrize("order", [1, 2, 4])
@pytest.mark.parametrize("kind", ["heavy_ball", "nesterov", "ghvb"])
def test_momentum_on_plms_is_the_published_loop(kind, order, beta):
    """xbar = x/alpha, d xbar / d rho = eps, Adams-Bashforth weights: typed from the authors' update, step by step."""
    grid = Grid.lambdas(VP, LAM)
    rho, alpha = (grid.sigma / grid.alpha).tolist(), grid.alpha.tolist()
    start = normal(5)
    xbar, v, history = start / alpha[0], None, []
    for i in range(grid.steps):
        eps = nonlinear(alpha[i] * xbar, i)
        p = min(order, i + 1)
        if kind == "ghvb":
            v = eps if v is None else (1 - beta) * v + beta * eps
            history = [v, *history]
            g = sum(w * h for w, h in zip(published_weights(p, beta), history, strict=False))
        else:
            history = [eps, *history]
            g = sum(w * h for w, h in zip(AB[p], history, strict=False))
            v = g if v is None else (1 - beta) * v + beta * g
            g = (1 - beta) * v + beta * g if kind == "nesterov" else v
        xbar = xbar + (rho[i + 1] - rho[i]) * g
    if kind == "ghvb":
        solver = GHVB(order=order, beta=beta, weights="equal", **FULL)
    else:
        solver = HeavyBall(IPNDM(order=order, **FULL), beta=beta, nesterov=kind == "nesterov")
    # a Lipschitz constant of about 5 over 9 steps magnifies rounding by at most 1e4
    expected = alpha[-1] * xbar
    assert torch.allclose(run_eps(solver.compile(VP, grid), start), expected, rtol=1e-11, atol=1e-11)


def test_momentum_on_two_m_filters_what_multiplies_the_first_order_weight():
    """Momentum DPM-Solver++ 2M midpoint: x_t = (sigma_t/sigma_s) x + alpha_t (1 - e^-h) v, v filtering D0 + D1/2."""
    grid, beta = Grid.lambdas(VP, LAM), 0.6
    lam, alpha, sigma = LAM.tolist(), grid.alpha.tolist(), grid.sigma.tolist()
    start = normal(5)
    x, v, history = start, None, []
    for i in range(grid.steps):
        h = lam[i + 1] - lam[i]
        history = [(x - sigma[i] * nonlinear(x, i)) / alpha[i], *history[:1]]
        d = history[0] if i == 0 else history[0] + 0.5 * h / (lam[i] - lam[i - 1]) * (history[0] - history[1])
        v = d if v is None else (1 - beta) * v + beta * d
        x = sigma[i + 1] / sigma[i] * x - alpha[i + 1] * math.expm1(-h) * v
    solver = HeavyBall(DPMSolver(order=2, **FULL), beta=beta)
    assert torch.allclose(run_eps(solver.compile(VP, grid), start), x, rtol=1e-11, atol=1e-11)


def test_a_corrector_has_a_velocity_of_its_own():
    """UniPC-1 bh2 as a loop that restarts from the corrected state, predictor and corrector filtered separately."""
    grid, beta = Grid.lambdas(VP, LAM), 0.6
    alpha, sigma = grid.alpha.tolist(), grid.sigma.tolist()
    first = [alpha[i + 1] - sigma[i + 1] / sigma[i] * alpha[i] for i in range(grid.steps)]  # alpha_t (1 - e^-h)
    start = normal(5)
    x = corrected = start
    vp, vc, before = None, None, None
    for i in range(grid.steps):
        m = (x - sigma[i] * nonlinear(x, i)) / alpha[i]
        if i:
            d = 0.5 * (m + before)
            vc = d if vc is None else (1 - beta) * vc + beta * d
            corrected = sigma[i] / sigma[i - 1] * corrected + first[i - 1] * vc
        vp = m if vp is None else (1 - beta) * vp + beta * m
        x = sigma[i + 1] / sigma[i] * corrected + first[i] * vp
        before = m
    solver = HeavyBall(UniPC(order=1, **FULL), beta=beta)
    assert torch.allclose(run_eps(solver.compile(VP, grid), start), x, rtol=1e-11, atol=1e-11)


# -- equivalences --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize(
    "base", [DPMSolver(order=3), UniPC(order=3), DEIS(order=4), DPMSolver(order=2, eta=1.0)], ids=str
)
def test_beta_one_is_the_base(base, nesterov):
    assert_same_rows(HeavyBall(base, beta=1.0, nesterov=nesterov), base)
    grid = Grid.lambdas(VP, LAM)
    assert torch.equal(HeavyBall(base, beta=1.0).compile(VP, grid).noise, base.compile(VP, grid).noise)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_ghvb_without_momentum_is_adams_bashforth(order):
    assert_same_rows(GHVB(order=order, beta=1.0, **FULL), DEIS(order=order, variable="rho", **FULL))
    assert_same_rows(GHVB(order=order, beta=1.0, weights="equal", **FULL), IPNDM(order=order, **FULL))
    data = GHVB(order=min(order, 3), beta=1.0, basis="data", variable="lambda", **FULL)
    assert_same_rows(data, DPMSolver(order=min(order, 3), solver_type="heun", **FULL))


@pytest.mark.parametrize("beta", [0.5, 0.8])
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_the_published_weights_are_the_limit_of_the_exact_ones(order, beta):
    """After 50 equal steps the start's share of the filter, times the growth of a cubic, is below 0.5^50 50^3 < 1e-9."""
    rho = torch.linspace(4.0, 0.5, 61, dtype=torch.float64)
    grid = Grid.lambdas(VP, -rho.log())
    exact, published = (
        GHVB(order=order, beta=beta, weights=k, **FULL).compile(VP, grid) for k in ("variable", "equal")
    )
    width = min(exact.output.shape[1], published.output.shape[1])
    scale = published.output[55].abs().max()
    assert torch.allclose(exact.output[55, :width], published.output[55, :width], rtol=0, atol=1e-8 * scale)
    assert sum(published_weights(order, beta)) == pytest.approx(1, abs=1e-14)


@pytest.mark.parametrize(("basis", "variable"), [("noise", "rho"), ("noise", "lambda"), ("data", "lambda")])
@pytest.mark.parametrize("order", [2, 3, 4])
def test_exact_rows_are_exact_for_polynomials(order, basis, variable):
    solver = GHVB(order=order, beta=0.6, basis=basis, variable=variable, **FULL)
    nodes = points(LAM)
    rows = solver.rows(nodes, [min(order, i + 1) for i in range(len(LAM) - 1)])
    at = (lambda p: p.rho) if variable == "rho" else (lambda p: p.lam)
    for i in range(order - 1, len(rows)):
        plain = solver.row(nodes[i], nodes[i + 1], nodes[i::-1][:order])
        for k in range(order):
            values = [at(nodes[i - j]) ** k for j in range(i + 1)]
            got = sum(w * v for w, v in zip(rows[i].outputs, values, strict=False))
            expected = sum(w * v for w, v in zip(plain.outputs, values, strict=False))
            # the weights magnify rounding of rho^3 <= 400 by at most their sum, below 100
            assert got == pytest.approx(expected, abs=1e-10)


# -- order ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["vp", "flow", "edm"])
@pytest.mark.parametrize("data", [GAUSSIAN, MIXTURE], ids=["gaussian", "mixture"])
@pytest.mark.parametrize(
    "solver",
    [*(GHVB(order=p, **FULL) for p in (1, 2, 3, 4)), GHVB(order=3, basis="data", variable="lambda", **FULL),
     HeavyBall(DPMSolver(order=2, **FULL)), HeavyBall(UniPC(order=2, **FULL), nesterov=True)],
    ids=str,
)  # fmt: skip
def test_global_order(solver, data, name):
    """Slope on uneven grids whose first steps are tiny, as in tests/test_solver_order.py: GHVB keeps its order, HB has 1."""
    p = solver.convergence_order
    counts = (64, 128) if p > 1 else (128, 256)
    first = 2e-7 if p > 1 else 0.5 / counts[0]
    measured = slope(solver, SCHEDULES[name], data, lambda n: starting_grid(n, False, first), counts)
    assert measured == pytest.approx(p, abs=0.25)


def test_published_weights_keep_the_order_on_equal_steps_only():
    """eps = e^(-rho), known: the local error of one step at the end of 60, whose slope is p + 1 on equal steps."""
    for order in (2, 3, 4):
        errors = []
        for h in (0.04, 0.02):
            rho = [1.0 + h * (60 - k) for k in range(61)]
            grid = Grid.lambdas(VP, -f64(rho).log())
            row = GHVB(order=order, weights="equal", beta=0.8, **FULL).compile(VP, grid).output[-1]
            got = sum(w * math.exp(-rho[59 - k]) for k, w in enumerate(row.tolist()))
            exact = float(grid.alpha[-1]) * (math.exp(-rho[59]) - math.exp(-rho[60]))
            errors.append(abs(got - exact))
        assert math.log2(errors[0] / errors[1]) == pytest.approx(order + 1, abs=0.3)


# -- ends ----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("solver", [HeavyBall(), HeavyBall(UniPC()), GHVB(), GHVB(weights="equal")], ids=str)
@pytest.mark.parametrize("name", ["vp", "flow", "zero-snr"])
def test_the_step_to_zero_noise_has_no_lag(solver, name):
    schedule = SCHEDULES[name]
    plan = solver.compile(schedule, Grid.uniform_t(schedule, 6))
    assert plan.sigma[-1] == 0
    newest = plan.output[-1, 0] != 0
    assert newest
    assert not (plan.output[-1, 1:] != 0).any() or isinstance(getattr(solver, "base", None), UniPC)


def test_history_is_the_whole_run_and_negligible_weights_are_dropped():
    plan = HeavyBall(beta=0.8).compile(EDM(), Grid.karras(EDM(), 50, terminal="sigma_min"))
    # 0.2^k falls below rounding of the largest weight: after k = 24 at the latest, times what 2M's weights add
    assert 20 <= plan.history <= 30


# -- stability -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("order", "end"), [(1, -2), (2, -1), (3, -6 / 11), (4, -3 / 10)])
def test_adams_bashforth_intervals_are_those_of_the_textbook(order, end):
    method = LinearMultistep.adams_bashforth(order)
    # a root is accepted up to 1e-9 outside the unit circle, which moves the end by about as much
    assert method.real_interval() == pytest.approx(end, abs=1e-8)
    assert method.stable([0.5 * end, 0.99 * end, 1.01 * end, 0.1]).tolist() == [True, True, False, False]
    assert abs(method.boundary(721)[360] - end) < 1e-12  # E = -1, half way round


def test_rows_of_a_plan_have_their_region():
    nodes = Grid.sigmas(SCHEDULES["flow"], [0.9, 0.8, 0.7, 0.6, 0.5]).points()[:-1]
    row = samplers.lagrange_row("velocity", "sigma", nodes[3::-1], nodes[3], nodes[4])
    method = LinearMultistep.from_row([w / (nodes[4].sigma - nodes[3].sigma) for w in row.outputs])
    assert method.real_interval() == pytest.approx(-3 / 10, abs=1e-8)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_momentum_widens_the_region_as_the_paper_claims(order):
    """E = -1 gives the end in closed form: order 1 -2 (2 - beta)/beta, order 2 -(2 - beta); all grow as beta falls."""
    ends = [LinearMultistep.ghvb(order, b).real_interval() for b in (1.0, 0.8, 0.6, 0.4)]
    assert all(later < earlier - 1e-3 for earlier, later in pairwise(ends))
    for beta, end in zip((1.0, 0.8, 0.6, 0.4), ends, strict=True):
        if order == 1:
            assert end == pytest.approx(-2 * (2 - beta) / beta, abs=1e-6)
        if order == 2:
            assert end == pytest.approx(-(2 - beta), abs=1e-6)
    plain = LinearMultistep.adams_bashforth(order)
    for beta in (0.8, 0.5):
        assert plain.with_heavy_ball(beta).real_interval() < plain.real_interval()
        # a Nesterov step is a convex combination of the filtered and the plain one, and so is 1/end: rho/sigma at E = -1
        ball, nesterov = plain.with_heavy_ball(beta), plain.with_nesterov(beta)
        at = [1 / complex(m.boundary(721)[360]) for m in (plain, ball, nesterov)]
        assert abs(at[2] - ((1 - beta) * at[1] + beta * at[0])) < 1e-9
    assert plain.with_heavy_ball(1.0).boundary(9) == pytest.approx(plain.boundary(9))


def test_the_region_decides_whether_a_run_blows_up():
    """x' = mu x through plans: inside the interval the iterates decay, outside they grow. eps = mu x/alpha, d rho = -h."""
    edm = EDM(prediction="epsilon", rho_min=0.5, rho_max=60.0)
    h = 0.5
    grid = Grid.lambdas(edm, -torch.arange(50.5, 0.4, -h, dtype=torch.float64).log())
    for beta in (1.0, 0.5):
        solver = GHVB(order=3, beta=beta, weights="equal", **FULL)
        end = LinearMultistep.ghvb(3, beta).real_interval()
        for factor, decays in ((0.9, True), (1.1, False)):
            mu = -factor * end / h  # rho falls, so growth in rho is decay along the run
            x = sample(lambda x, t, mu=mu: mu * x, f64([1.0]), _unscaled(solver, edm, grid))
            assert (abs(float(x)) < 1.0) == decays


def _unscaled(solver, schedule, grid):
    """The plan with a network that sees the state itself, not EDM's scaled one, starting at 1."""
    plan = solver.compile(schedule, grid)
    return replace(plan, in_scale=torch.ones_like(plan.in_scale), init_scale=1.0)


# -- options and schedulers ----------------------------------------------------------------------------------------------
def test_fractional_orders():
    assert GHVB.of(3.7) == GHVB(order=4, beta=0.7)
    assert GHVB.of(4) == GHVB(order=4, beta=1.0)
    assert GHVB.of(0.5) == GHVB(order=1, beta=0.5)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: HeavyBall(beta=0.0), "beta=0.0"),
        (lambda: HeavyBall(beta=1.2), "beta=1.2"),
        (lambda: GHVB(beta=math.nan), "beta=nan"),
        (lambda: GHVB(order=5), "orders 1 to 4"),
        (lambda: GHVB(weights="equl"), "did you mean 'equal'"),
        (lambda: GHVB(basis="data"), "variable of GHVB"),
        (lambda: GHVB(variable="lambda", weights="equal"), "variable 'rho'"),
        (lambda: LinearMultistep.ghvb(5, 0.8), "orders 1 to 4"),
    ],
)
def test_impossible_options_are_refused(make, match):
    with pytest.raises(FewstepError, match=match):
        make()


@pytest.mark.parametrize("name", ["HeavyBall", "DCSolver"])
def test_solver_options_of_other_families_are_mapped_or_refused(name):
    """A type of another family is the base's default; an algorithm says in which basis, and noise is refused."""
    cls, grid = getattr(samplers, f"{name}Scheduler"), Grid.karras(VP, 5)

    def digest(**options):
        scheduler = cls.from_config(SD, **options)
        scheduler.set_timesteps(sigmas=grid)
        return scheduler.plan.digest

    own = {"DPMSolver": "heun", "UniPC": "bh1", "DEIS": "rho", "IPNDM": None}
    for base, kind in own.items():
        for foreign in {"midpoint", "heun", "logrho", "bh1", "bh2"} - {kind}:
            assert digest(base=base, solver_type=foreign) == digest(base=base)
        assert kind is None or digest(base=base, solver_type=kind) != digest(base=base)
    assert digest(base="DEIS", solver_type="t") not in (digest(base="DEIS"), digest(base="DEIS", solver_type="rho"))
    noise = digest(algorithm_type="dpmsolver")
    assert noise == digest(predict_x0=False) != digest()
    options = {"algorithm_type": "dpmsolver", "solver_type": "heun", "final_sigmas_type": "sigma_min"}
    config = diffusers.DPMSolverMultistepScheduler(**SD, **options).config
    loaded = cls.from_config(config, base="UniPC")
    loaded.set_timesteps(sigmas=grid)
    assert loaded.plan.digest == digest(base="UniPC", predict_x0=False)
    for kind, match in (("sde-dpmsolver++", "adds noise"), ("sde-dpmsolver", "sde-dpmsolver"), ("dpmsover", "did you")):
        with pytest.raises(FewstepError, match=match):
            digest(algorithm_type=kind)


def test_schedulers_run_their_builders():
    grid = Grid.karras(VP, 7)
    for scheduler, solver in (
        (samplers.HeavyBallScheduler(**SD, beta=0.7, nesterov=True), HeavyBall(DPMSolver(), 0.7, True)),
        (samplers.HeavyBallScheduler(**SD, base="UniPC", solver_order=3, solver_type="bh1"),
         HeavyBall(UniPC(order=3, solver_type="bh1", disable_corrector=(0, 1)))),
        (samplers.HeavyBallScheduler(**SD, base="DEIS", solver_type="rho"), HeavyBall(DEIS(order=2, variable="rho"))),
        (samplers.GHVBScheduler(**SD, solver_order=3.7), GHVB(order=4, beta=0.7)),
        (samplers.GHVBScheduler(**SD, solver_order=3, weights="equal"), GHVB(order=3, weights="equal")),
    ):  # fmt: skip
        scheduler.set_timesteps(sigmas=grid)
        assert scheduler.plan.digest == solver.compile(VP, grid).digest
    with pytest.raises(FewstepError, match=r"'heum'.*did you mean 'heun'"):
        samplers.HeavyBallScheduler(**SD, solver_type="heum").set_timesteps(5)
    with pytest.raises(FewstepError, match="did you mean 'UniPC'"):
        samplers.HeavyBallScheduler(**SD, base="unipc").set_timesteps(5)
    with pytest.raises(FewstepError, match="order=0"):
        samplers.GHVBScheduler(**SD, solver_order=0).set_timesteps(5)
