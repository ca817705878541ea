"""DPM-Solver-v3: the published loop, its special cases, its order, plans with coefficients a dimension, statistics in files."""

import math

import numpy as np
import pytest
import torch

from fewstep import samplers
from fewstep.errors import ArtifactError, FewstepError, PlanError
from fewstep.samplers import DDIM, EMS, DPMSolver, Executor, Grid, ModelStatistics, Run, SolverPlan, UniPC, sample
from fewstep.samplers.schedule import f64
from tests.solver_fixtures import (
    FULL,
    GAUSSIAN,
    LAM,
    MIXTURE,
    SCHEDULES,
    SD,
    VP,
    assert_same_rows,
    in_threads,
    nonlinear,
    normal,
    run_eps,
    slope,
    starting_grid,
)

PLUS_PLUS, NOISE = ModelStatistics.constant(1.0, 0.0, 0.0), ModelStatistics.constant(0.0, -1.0, 0.0)


def smooth(shape=(), knots=41, low=-2.0, high=2.5):
    """Statistics as a model might have: l near 1, s and b small, all smooth in lambda, different in every dimension."""
    lam = torch.linspace(low, high, knots, dtype=torch.float64)
    phase = torch.rand(shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    at = lam.reshape(-1, *[1] * len(shape)) + phase
    return ModelStatistics(lam, 0.8 + 0.3 * torch.sin(at), -0.3 * torch.cos(1.3 * at), 0.4 * torch.sin(0.7 * at))


# -- the published algorithm, typed from its description -----------------------------------------------------------------
def published(st, x, lam, order, corrector, p_pseudo):
    """Cumulative trapezoid integrals on the knots of ``st``, an x-history, eps edited by the corrector. lam on knots."""
    knots = st.lam
    d = knots.diff().reshape(-1, *[1] * (st.l.ndim - 1))

    def integral(values):
        parts = 0.5 * d * (values[1:] + values[:-1])
        return torch.cat([torch.zeros_like(values[:1]), parts.cumsum(0)])

    L, S = integral(st.l), integral(st.s)
    inner, B = integral((L + S).exp()), integral((-S).exp() * st.b)
    C = integral((L + S).exp() * B)
    index = [int((knots - v).abs().argmin()) for v in lam.tolist()]
    alpha, sigma = (v.tolist() for v in samplers.schedule.alpha_sigma("vp", knots[index]))
    xs, eps, n = [], [], len(index) - 1

    def g(j, s):
        f = (sigma[j] * eps[j] - st.l[index[j]] * xs[j]) / alpha[j]
        a, b = index[s], index[j]
        return (S[a] - S[b]).exp() * f - S[a].exp() * (B[b] - B[a])

    def step(s, t, nodes, pseudo):
        a, b = index[s], index[t]
        values, at = [g(j, s) for j in nodes], [float(knots[index[j]]) for j in nodes]
        out = alpha[t] / alpha[s] * (L[a] - L[b]).exp() * xs[s]
        out = out - alpha[t] * (-L[b] - S[a]).exp() * (inner[b] - inner[a]) * values[0]
        out = out - alpha[t] * (-L[b]).exp() * (C[b] - C[a] - B[a] * (inner[b] - inner[a]))
        for k in range(1, len(nodes)):
            if pseudo:
                table = values
                for level in range(1, k + 1):
                    table = [(table[j] - table[j + 1]) / (at[j] - at[j + level]) for j in range(len(table) - 1)]
                derivative = table[0] * math.factorial(k)
            else:
                system = torch.tensor([[(v - at[0]) ** m for m in range(1, len(nodes))] for v in at[1:]]).double()
                right = torch.stack([(v - values[0]) for v in values[1:]]).reshape(len(nodes) - 1, -1)
                derivative = torch.linalg.solve(system, right)[k - 1].reshape(values[0].shape) * math.factorial(k)
            w = (knots[a : b + 1] - knots[a]) ** k / math.factorial(k)
            kernel = (L[a : b + 1] + S[a : b + 1] - L[a] - S[a]).exp() * w.reshape(-1, *[1] * (st.l.ndim - 1))
            moment = (0.5 * d[a:b] * (kernel[1:] + kernel[:-1])).sum(0)
            out = out - alpha[t] * (L[a] - L[b]).exp() * moment * derivative
        return out

    p = 0
    for i in range(n):
        xs.append(x)
        eps.append(nonlinear(x, i))
        if i and corrector:
            new = step(i - 1, i, [i - 1, i, *range(i - 2, i - 1 - p, -1)], corrector == "pseudo")
            kept = sigma[i] * eps[i] - st.l[index[i]] * xs[i]
            xs[i] = new
            eps[i] = (kept + st.l[index[i]] * new) / sigma[i]
        p = min(order, i + 1)
        x = step(i, i + 1, list(range(i, i - p, -1)), p_pseudo)
    return x


@pytest.mark.parametrize("corrector", ["pseudo", "exact", "none"])
@pytest.mark.parametrize("p_pseudo", [False, True])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("shape", [(), (2, 3)], ids=["numbers", "a_dimension"])
def test_rows_equal_the_published_loop(shape, order, p_pseudo, corrector):
    """The loop's trapezoid rule on knots 0.0015 apart is off by about 1e-6; the statistics are linear between its knots."""
    st = smooth(shape, knots=3001)
    lam = st.lam[[0, 190, 520, 700, 1150, 1500, 1710, 2280, 2600, 3000]]
    start = normal(4, *(shape or (3,)))
    name = "" if corrector == "none" else corrector

    def off(st, lam):
        solver = EMS(order=order, statistics=st, corrector=corrector, predictor_pseudo=p_pseudo, **FULL)
        got = run_eps(solver.compile(VP, Grid.lambdas(VP, lam)), start)
        expected = published(st, start, lam, order, name, p_pseudo)
        return (got - expected).abs() / expected.abs().max()

    fine = off(st, lam)
    assert fine.max() < 2e-4
    # and the trapezoid rule is what they differ by: at a quarter of the knots it is 16 times as far off. The median,
    # since the network amplifies in some coordinates a thousand times what the steps differ by
    coarse = smooth(shape, knots=751)
    at = coarse.lam[[0, 47, 130, 175, 287, 375, 427, 570, 650, 750]]
    assert fine.median() < 0.3 * off(coarse, at).median()


# -- special cases -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize(("statistics", "basis"), [(PLUS_PLUS, "data"), (NOISE, "noise")], ids=["l=1", "s=-1"])
def test_two_kinds_of_statistics_are_dpm_solver(statistics, basis, order):
    """l = 1: f = -x0, DPM-Solver++. s = -1: g is constant where eps is, DPM-Solver. As samples: the bases differ."""
    for name in ("vp", "edm", "flow"):
        schedule = SCHEDULES[name]
        for lam in (LAM, torch.cat([LAM, f64([math.inf])])):
            grid, x = Grid.lambdas(schedule, lam), normal(4, 2)
            ours = EMS(order=order, statistics=statistics, corrector="none", **FULL).compile(schedule, grid)
            theirs = DPMSolver(order=order, basis=basis, solver_type="heun", **FULL).compile(schedule, grid)
            a, b = (sample(MIXTURE.model(schedule), x, plan) for plan in (ours, theirs))
            assert torch.allclose(a, b, rtol=1e-11, atol=1e-11)
            assert ours.problems() == []  # constant x0 and eps are exact here


@pytest.mark.parametrize("order", [2, 3])
def test_the_exact_corrector_is_unic(order):
    """Without the steps of order 2 and 1 that UniPC makes with a fixed 1/2: from the fourth row on, rows agree."""
    grid = Grid.lambdas(VP, LAM)
    ours = EMS(order=order, statistics=NOISE, corrector="exact", **FULL).compile(VP, grid)
    theirs = UniPC(order=order, basis="noise", **FULL).compile(VP, grid)
    if order == 3:
        assert torch.allclose(ours.output[4:, :4], theirs.output[4:, :4], rtol=1e-11, atol=1e-12)
        assert torch.allclose(ours.state[:, 0], theirs.state[:, 0], rtol=1e-13)
    else:  # UniP-2 differs, UniC-2 does not: b^P + a (b^C - b^P) with the exact two-node predictor
        assert not torch.allclose(ours.output[4:, :3], theirs.output[4:, :3], rtol=1e-11, atol=1e-12)
    assert_same_rows(
        EMS(order=order, statistics=NOISE, corrector="none", **FULL),
        DPMSolver(order=order, basis="noise", solver_type="heun", **FULL),
    )


def test_zero_statistics_expand_rho_eps():
    """l = s = b = 0: x_t/alpha_t = x_s/alpha_s - h rho_s eps_s, which is neither DPM-Solver."""
    grid = Grid.lambdas(VP, LAM)
    plan = EMS(order=1, statistics=ModelStatistics.constant(0.0, 0.0, 0.0), corrector="none").compile(VP, grid)
    rho, h = grid.sigma / grid.alpha, LAM.diff()
    assert torch.allclose(plan.output[:, 0], -grid.alpha[1:] * h * rho[:-1], rtol=1e-13)
    assert torch.allclose(plan.state[:, 0], grid.alpha[1:] / grid.alpha[:-1], rtol=1e-13)


def test_a_network_as_the_statistics_say_is_solved_exactly_in_any_number_of_steps():
    """eps with f' = s f + b along the flow: f is known, x follows by quadrature; every order and corrector must hit it."""
    st = ModelStatistics.constant(0.6, -0.4, 0.3)
    low, high, f0 = -1.5, 2.0, 0.7

    def f(lam):  # f' = -0.4 f + 0.3
        return 0.75 + (f0 - 0.75) * math.exp(-0.4 * (lam - low))

    # y = x/alpha: y' = -f - 0.6 y, in closed form with f = 0.75 + c e^{-0.4 u}
    c = f0 - 0.75

    def y(lam, y0=1.3):
        u = lam - low
        return (
            y0 * math.exp(-0.6 * u)
            - 0.75 * (1 - math.exp(-0.6 * u)) / 0.6
            - c * (math.exp(-0.4 * u) - math.exp(-0.6 * u)) / 0.2
        )

    for n in (1, 2, 5):
        lam = torch.linspace(low, high, n + 1, dtype=torch.float64)
        grid = Grid.lambdas(VP, lam)
        for order in (1, 2, 3):
            for corrector in ("none", "pseudo", "exact"):
                plan = EMS(order=order, statistics=st, corrector=corrector, **FULL).compile(VP, grid)
                executor, run, x = Executor(plan), Run(), f64([[1.3]]) * grid.alpha[0]
                for i in range(n):
                    eps = (f(float(lam[i])) * grid.alpha[i] + 0.6 * x) / grid.sigma[i]
                    x = executor.advance(run, eps, x)
                assert float(x) == pytest.approx(y(high) * float(grid.alpha[-1]), rel=1e-10)


# -- order ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["vp", "flow", "edm"])
@pytest.mark.parametrize(
    "options",
    [{"order": 1, "corrector": "none"}, {"order": 2, "corrector": "none"}, {"order": 3, "corrector": "none"},
     {"order": 2, "corrector": "exact"}, {"order": 3, "corrector": "exact"}, {"order": 1, "corrector": "pseudo"}],
    ids=str,
)  # fmt: skip
def test_global_order(options, name):
    """For statistics that no Gaussian has: the order is the polynomial's, whatever l, s and b."""
    solver = EMS(statistics=smooth(knots=3001), **options, **FULL)
    p = solver.convergence_order
    counts = (48, 96)
    first = 2e-7 if p > 1 else 0.5 / counts[0]
    measured = slope(solver, SCHEDULES[name], GAUSSIAN, lambda n: starting_grid(n, True, first), counts)
    assert measured == pytest.approx(p, abs=0.25)


def test_pseudo_derivatives_leave_order_two():
    """Two-node derivatives are first-order accurate, and a pseudo corrector of a higher order adds nothing to that."""
    for options in ({"order": 3, "corrector": "pseudo"}, {"order": 3, "corrector": "none", "predictor_pseudo": True}):
        solver = EMS(statistics=smooth(knots=3001), **options, **FULL)
        assert solver.convergence_order == 2
        assert slope(solver, VP, GAUSSIAN, lambda n: starting_grid(n, True), (128, 256)) > 1.75


# -- coefficients a dimension --------------------------------------------------------------------------------------------
def shaped_plan(shape=(2, 3)):
    return EMS(order=2, statistics=smooth(shape)).compile(VP, Grid.lambdas(VP, LAM))


def test_every_dimension_is_a_problem_of_its_own():
    """Dimension (a, b) of the plan is the plan of the statistics of dimension (a, b)."""
    st, plan = smooth((2, 3)), shaped_plan()
    assert plan.sample_shape == (2, 3)
    for a in range(2):
        for b in range(3):
            own = ModelStatistics(st.lam, st.l[:, a, b].clone(), st.s[:, a, b].clone(), st.b[:, a, b].clone())
            single = EMS(order=2, statistics=own).compile(VP, Grid.lambdas(VP, LAM))
            assert torch.allclose(plan.output[..., a, b], single.output[..., 0], rtol=1e-12, atol=1e-13)
            assert torch.allclose(plan.state[..., a, b], single.state[..., 0], rtol=1e-12, atol=1e-13)
            assert torch.allclose(plan.constant[..., a, b], single.constant[..., 0], rtol=1e-12, atol=1e-13)


def test_equal_dimensions_are_the_plan_of_numbers():
    st = smooth()
    wide = ModelStatistics(st.lam, *(v.reshape(-1, 1, 1).expand(-1, 2, 3).contiguous() for v in (st.l, st.s, st.b)))
    x = normal(4, 2, 3)
    plans = [EMS(order=3, statistics=s).compile(VP, Grid.lambdas(VP, LAM)) for s in (st, wide)]
    assert [p.sample_shape for p in plans] == [(1,), (2, 3)]
    assert torch.allclose(run_eps(plans[1], x), run_eps(plans[0], x), rtol=1e-12, atol=1e-12)
    unbiased = ModelStatistics(st.lam, st.l, st.s, torch.zeros_like(st.b))
    assert EMS(statistics=unbiased).compile(VP, Grid.lambdas(VP, LAM)).sample_shape == ()


def test_shaped_plans_are_files_print_and_refuse_other_shapes(tmp_path):
    plan = shaped_plan()
    plan.save(tmp_path / "plan.json")
    again = SolverPlan.load(tmp_path / "plan.json", VP)
    assert again.digest == plan.digest
    assert SolverPlan.from_dict(plan.to_dict()).digest == plan.digest
    assert "every dimension of (2, 3)" in str(plan)
    assert plan.history == int((plan.output.abs().amax((0, 2, 3)) > 0).sum())
    assert plan.base[-1] <= 8
    x = normal(4, 2, 3)
    assert torch.equal(run_eps(plan, x), run_eps(again, x))
    for bad in (normal(4, 3, 3), normal(4, 2), normal(4)):
        with pytest.raises(PlanError, match=r"shape \(2, 3\)"):
            run_eps(plan, bad)
    with pytest.raises(PlanError, match="takes no constant"):
        Executor(plan, constant=x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_shaped_plans_keep_the_dtype(dtype):
    plan, x = shaped_plan(), normal(4, 2, 3)
    full = run_eps(plan, x)
    got = run_eps(plan, x.to(dtype))
    assert got.dtype == dtype
    eps = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    assert (
        got.double() - full
    ).abs().max() < 3e3 * eps * full.abs().max()  # 9 casts, magnified by the network's 5 a step


def test_threads_share_a_shaped_plan():
    plan = shaped_plan()
    executor = Executor(plan)

    def work(k):
        run, x = Run(), normal(4, 2, 3, seed=k).to(torch.float32 if k % 2 else torch.float64)
        for i in range(plan.steps):
            x = executor.advance(run, nonlinear(x, i), x)
        return x

    serial = [work(k) for k in range(8)]
    assert all(torch.equal(a, b) for a, b in zip(in_threads(work, 8), serial, strict=True))


def test_a_tail_of_a_shaped_plan_restarts_at_first_order():
    plan = shaped_plan()
    tail = plan.tail(4)
    assert tail.steps == 5
    assert not (tail.output[0, 1:] != 0).any()
    assert not (tail.constant[1] != 0).any()  # that row read what came before, and is DDIM now
    assert torch.equal(tail.constant[4], plan.constant[8])
    assert run_eps(tail, normal(4, 2, 3)).isfinite().all()


# -- ends and statistics -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["vp", "flow", "zero-snr", "edm"])
def test_infinite_ends_are_ddim(name):
    schedule = SCHEDULES[name]
    grid = Grid.karras(schedule, 5, terminal="zero") if name == "edm" else Grid.uniform_t(schedule, 5)
    for n in (1, 2, 5):
        part = grid.tail(5 - n) if n < 5 else grid
        plan = EMS(order=3, statistics=smooth()).compile(schedule, part)
        assert sample(MIXTURE.model(schedule), normal(4, 2), plan).isfinite().all()
        plan = EMS(order=3, statistics=smooth(), corrector="none").compile(schedule, part)
        last = DDIM().compile(schedule, part.tail(n - 1))
        x, m = normal(3, 2), normal(3, 2, seed=1)
        a, b = (Executor(p.tail(p.steps - 1)).advance(Run(), m, x) for p in (plan, last))
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)
    if name in ("flow", "zero-snr"):
        assert plan.basis[0] == "data"
        assert float(plan.state[0, 0]) == pytest.approx(float(grid.sigma[1]), rel=1e-12)


def test_statistics_are_linear_between_knots_and_constant_beyond():
    st = smooth((2,), knots=5)
    middle = 0.25 * st.lam[1] + 0.75 * st.lam[2]
    l, s, b = st.at(torch.stack([middle, st.lam[0] - 3, st.lam[-1] + 3]))  # noqa: E741
    for got, values in ((l, st.l), (s, st.s), (b, st.b)):
        assert torch.allclose(got[0], 0.25 * values[1] + 0.75 * values[2], rtol=1e-14)
        assert torch.equal(got[1], values[0])
        assert torch.equal(got[2], values[-1])


def test_statistics_in_files(tmp_path):
    st = smooth((2, 3))
    st.save(tmp_path / "ems.json")
    again = ModelStatistics.load(tmp_path / "ems.json")
    assert again.digest == st.digest
    np.savez(tmp_path / "l.npz", l=st.l.numpy())
    np.savez(tmp_path / "sb.npz", s=st.s.numpy(), b=st.b.numpy())
    theirs = ModelStatistics.from_folder(tmp_path, (-2.0, 2.5))
    assert theirs.digest == st.digest
    with pytest.raises(ArtifactError, match=r"l\.npz"):
        ModelStatistics.from_folder(tmp_path / "none", (-2.0, 2.5))
    with pytest.raises(ArtifactError, match="does not exist"):
        ModelStatistics.load(tmp_path / "none.json")
    with pytest.raises(ArtifactError, match=r"end in \.json"):
        st.save(tmp_path / "ems.npz")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"lam": [0.0, 0.0]}, "increasing"),
        ({"lam": [0.0]}, "at least two"),
        ({"s": [0.0, 0.0, 0.0]}, "statistic s has shape"),
        ({"b": [0.0, math.nan]}, "statistic b must be finite"),
    ],
)
def test_statistics_that_do_not_fit_together_are_refused(change, match):
    given = {"lam": [0.0, 1.0], "l": [1.0, 1.0], "s": [0.0, 0.0], "b": [0.0, 0.0], **change}
    with pytest.raises(FewstepError, match=match):
        ModelStatistics(**{k: f64(v) for k, v in given.items()})


def test_the_scheduler_runs_its_builder(tmp_path):
    x = normal(2, 2, 3).float()
    st = smooth((2, 3), low=-6.0, high=6.0)
    st.save(tmp_path / "ems.json")
    s = samplers.EMSScheduler(**SD, statistics=str(tmp_path / "ems.json"), solver_order=3, timestep_spacing="trailing")
    s.set_timesteps(6)
    grid = Grid.uniform_t(VP, 6, terminal="sigma_min")
    assert s.plan.digest == EMS(order=3, statistics=st, disable_corrector=(0, 1, 2, 3)).compile(VP, grid).digest
    for t in s.timesteps:
        x = s.step(0.1 * x, t, x).prev_sample
    assert x.isfinite().all()
    plain = samplers.EMSScheduler(**SD, corrector="none", solver_order=2)
    plain.set_timesteps(6)
    assert plain.plan.problems() == []
    with pytest.raises(FewstepError, match="did you mean 'pseudo'"):
        samplers.EMSScheduler(**SD, corrector="psuedo").set_timesteps(5)
    with pytest.raises(ArtifactError, match="does not exist"):
        samplers.EMSScheduler(**SD, statistics=str(tmp_path / "none.json"))
