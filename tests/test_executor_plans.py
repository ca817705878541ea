"""The executor on plans that no solver here makes: with stages, rows without a call, and a constant."""

import copy
import itertools
import math
from dataclasses import replace

import pytest
import torch

from fewstep.errors import PlanError
from fewstep.samplers import DDIM, Executor, Grid, Run, SolverPlan, sample
from fewstep.samplers.lagrange import lagrange_row
from fewstep.samplers.schedule import EDM, f64
from tests.executor_fixtures import MIXTURE
from tests.solver_fixtures import VP, normal


def custom(schedule, grid, **changes):
    """A DDIM plan on ``grid`` with columns replaced."""
    return replace(DDIM().compile(schedule, grid), method="custom", **changes)


def heun_plan(schedule, lam):
    """EDM's Heun on x' = (x - x0)/sigma = eps: two rows a step, the second restarts from the state before the first."""
    sigma = torch.exp(-f64(lam))
    n = len(sigma) - 1
    h = sigma.diff()
    zero, one = torch.zeros(n, dtype=torch.float64), torch.ones(n, dtype=torch.float64)
    stage = torch.stack  # rows 2k: X' = X + h m_2k; rows 2k + 1: X'' = X + h/2 (m_2k + m_2k+1)
    interleave = lambda a, b: stage([a, b], 1).reshape(-1)  # noqa: E731
    ends = sigma[1:]
    return SolverPlan(
        state=stage([interleave(one, zero), interleave(zero, one)], 1),
        output=stage([interleave(h, h / 2), interleave(zero, h / 2)], 1),
        noise=torch.zeros(2 * n, dtype=torch.float64),
        constant=torch.zeros(2 * n, dtype=torch.float64),
        alpha=torch.ones(2 * n + 1, dtype=torch.float64),
        sigma=torch.cat([sigma[:1], interleave(ends, ends)]),
        model_time=schedule.model_time(interleave(sigma[:-1], ends)),
        in_scale=schedule.in_scale(interleave(sigma[:-1], ends)),
        evaluate=torch.ones(2 * n, dtype=torch.bool),
        basis=("noise",) * (2 * n),
        prediction=schedule.prediction,
        schedule=schedule.identity(),
        fingerprint=schedule.fingerprint,
        method="heun",
        order=2,
        init_scale=float(sigma[0]),
        sigma_data=schedule.sigma_data,
    )


def test_a_plan_with_stages_is_heun_written_out():
    schedule = EDM()
    lam = [-2.0, -1.0, 0.0, 1.0, 2.0]
    plan = heun_plan(schedule, lam).validate()
    assert plan.base == (0, 0, 2, 2, 4, 4, 6, 6)
    x = normal(5, 4)
    got = sample(MIXTURE.model(schedule), x, plan)
    sigma = torch.exp(-f64(lam))
    x = x * sigma[0]
    one = torch.ones((), dtype=torch.float64)
    for s, t in itertools.pairwise(sigma):
        first = (x - MIXTURE.x0(x, one, s)) / s
        y = x + (t - s) * first
        x = x + (t - s) / 2 * (first + (y - MIXTURE.x0(y, one, t)) / t)
    assert torch.allclose(got, x, rtol=1e-12, atol=1e-12)


def test_a_run_forgets_states_too():
    plan = heun_plan(EDM(), [-2.0, -1.0, 0.0])
    executor, run, x = Executor(plan), Run(), normal(2, 4)
    sizes = []
    for _ in range(4):
        x = executor.advance(run, torch.sin(x), x)
        sizes.append((len(run.states), len(run.outputs)))
    assert sizes == [(1, 1), (0, 0), (1, 1), (0, 0)]


def renoising_plan():
    """DDIM with one more row after the second: sigma goes up again by fresh noise, without a call."""
    grid = Grid.lambdas(VP, [-2.0, 0.0, 1.0, 3.0])
    plan = DDIM().compile(VP, grid)
    back = grid.points()[1]  # from lambda = 1 back to lambda = 0
    low = grid.points()[2]
    ratio = back.alpha / low.alpha
    noise = math.sqrt(back.sigma**2 - (ratio * low.sigma) ** 2)
    last = lagrange_row("data", "lambda", [back], back, grid.points()[3])

    def insert(values, *more):
        return torch.cat([values[:2], torch.stack([f64(m) for m in more])])

    return replace(
        plan,
        state=insert(plan.state[:, 0], ratio, last.state)[:, None],
        output=insert(plan.output[:, 0], 0.0, last.outputs[0])[:, None],
        noise=insert(plan.noise, noise, 0.0),
        constant=torch.zeros(4, dtype=torch.float64),
        alpha=grid.alpha[[0, 1, 2, 1, 3]],
        sigma=grid.sigma[[0, 1, 2, 1, 3]],
        model_time=torch.stack([*grid.model_time[:2], grid.model_time[2], grid.model_time[1]]),
        in_scale=torch.ones(4, dtype=torch.float64),
        evaluate=torch.tensor([True, True, False, True]),
        basis=("data",) * 4,
        method="restart",
    )


def test_rows_without_a_call_follow_at_once():
    plan = renoising_plan().validate()
    assert plan.nfe == 3
    assert plan.steps == 4
    assert plan.has_noise
    executor, run, x = Executor(plan), Run(), normal(2, 4)
    assert executor.calls == (0, 1, 3)
    x = executor.advance(run, torch.sin(x), x)
    assert run.i == 1
    before = copy.deepcopy(run)
    z = normal(2, 4, seed=3)
    quiet = executor.advance(before, torch.sin(x), x, noise=torch.zeros_like(x))
    noisy = executor.advance(run, torch.sin(x), x, noise=z)
    assert run.i == 3
    assert torch.allclose(noisy - quiet, plan.noise[2] * z, rtol=1e-12, atol=1e-14)
    executor.advance(run, torch.sin(noisy), noisy)
    assert run.i == 4
    assert sample(MIXTURE.model(VP), normal(2, 4), plan, generator=torch.Generator().manual_seed(0)).isfinite().all()


def test_given_noise_is_used_once():
    """Where a noisy row is followed by a re-noising one, the second draws its own."""
    plan = renoising_plan()
    noisy = replace(plan, noise=torch.tensor([0.0, 0.3, 0.5, 0.0], dtype=torch.float64))
    executor, x, raw = Executor(noisy), normal(2, 4), normal(2, 4, seed=1)
    run = Run()
    x = executor.advance(run, raw, x)
    start = copy.deepcopy(run)
    z = normal(2, 4, seed=2)
    got = executor.advance(run, raw, x, noise=z, generator=torch.Generator().manual_seed(5))
    quiet = executor.advance(start, raw, x, noise=torch.zeros_like(x), generator=torch.Generator().manual_seed(5))
    assert torch.allclose(got - quiet, noisy.state[2, 0] * 0.3 * z, rtol=1e-12, atol=1e-14)


def test_the_constant_column_adds_its_tensor():
    plan = custom(VP, Grid.karras(VP, 3), constant=f64([0.5, 0.0, -0.25]))
    mu, x = normal(2, 4, seed=8), normal(2, 4)
    with pytest.raises(PlanError, match="constant"):
        Executor(plan)
    executor, run, plain, other = (
        Executor(plan, constant=mu),
        Run(),
        Executor(DDIM().compile(VP, Grid.karras(VP, 3))),
        Run(),
    )
    for i in range(3):
        raw = normal(2, 4, seed=i)
        y = executor.advance(run, raw, x)
        assert torch.allclose(y, plain.advance(other, raw, x) + plan.constant[i] * mu, rtol=1e-13, atol=1e-13)
        x = y
