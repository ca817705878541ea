"""Stochastic solvers: the variance of their rows, and the law of what they draw."""

import math

import pytest
import torch

from fewstep.samplers import DDIM, DPMSolver, Executor, Grid, Run, sample
from fewstep.samplers.schedule import f64
from fewstep.samplers.testing import GaussianMixture
from tests.solver_fixtures import FULL, SCHEDULES, STOCHASTIC, VP, grids, normal, random_lambdas, raw_of

SAMPLES = 60_000
SIGMAS = 5.0
"""Bounds at five standard errors: 12 of them fail by chance once in 140 000 runs, and the seed is fixed."""


@pytest.mark.parametrize("solver", STOCHASTIC, ids=str)
@pytest.mark.parametrize("name", SCHEDULES)
def test_stochastic_rows_keep_the_variance(solver, name):
    """a^2 sigma_s^2 + c^2 = sigma_t^2 for every row that starts from a known x0."""
    schedule = SCHEDULES[name]
    for grid in grids(schedule, 8):
        plan = solver.compile(schedule, grid)
        kept = (plan.state[:, 0] * grid.sigma[:-1]) ** 2 + plan.noise**2
        assert torch.allclose(kept, grid.sigma[1:] ** 2, rtol=1e-12, atol=1e-30)
        assert (plan.noise[:-1] > 0).all()
        assert plan.noise[-1] == 0 or grid.sigma[-1] > 0


@pytest.mark.parametrize("name", ["vp", "edm", "flow"])
@pytest.mark.parametrize(
    "solver", [DPMSolver(order=2, eta=1.0), DPMSolver(order=1, eta=1.0), DDIM(eta=1.0), DDIM(eta=0.5)], ids=str
)
def test_noise_gives_the_marginal_of_a_known_picture(solver, name):
    """Data at one point: x0 is known, so every marginal is N(alpha x0, sigma^2) whatever the steps, first order or not."""
    schedule = SCHEDULES[name]
    grid = Grid.lambdas(schedule, random_lambdas(4, seed=2))
    plan = solver.compile(schedule, grid)
    executor, run, g = Executor(plan), Run(), torch.Generator().manual_seed(0)
    x0 = f64(0.8)
    x = grid.alpha[0] * x0 + grid.sigma[0] * torch.randn(SAMPLES, generator=g, dtype=torch.float64)
    for i in range(plan.steps):
        eps = (x - grid.alpha[i] * x0) / grid.sigma[i]
        x = executor.advance(run, raw_of(schedule, x0, eps, grid.alpha[i], grid.sigma[i]), x, generator=g)
        sigma = grid.sigma[i + 1].item()
        assert abs(x.mean() - grid.alpha[i + 1] * x0) <= SIGMAS * sigma / math.sqrt(SAMPLES)
        assert abs(x.var() - sigma**2) <= SIGMAS * sigma**2 * math.sqrt(2 / SAMPLES)


@pytest.mark.parametrize("name", ["vp", "flow"])
@pytest.mark.parametrize(
    "solver",
    [DPMSolver(order=2, eta=1.0, **FULL), DPMSolver(order=2, solver_type="heun", eta=1.0, **FULL),
     DPMSolver(order=3, eta=1.0, **FULL), DPMSolver(order=2, eta=0.4, **FULL)],
    ids=str,
)  # fmt: skip
def test_the_reverse_sde_samples_gaussian_data(solver, name):
    """N(0.5, 0.6^2) at the end of 60 steps. What is left of the discretisation (O(h^2), h = 0.08) is below 1%."""
    schedule = SCHEDULES[name]
    data = GaussianMixture(f64([[0.5]]), f64([0.6]), f64([1.0]))
    grid = Grid.lambdas(schedule, torch.linspace(-2.0, 3.0, 61, dtype=torch.float64))
    plan = solver.compile(schedule, grid)
    alpha, sigma = grid.alpha[0], grid.sigma[0]
    start = alpha * data.sample(SAMPLES, seed=1) + sigma * normal(SAMPLES, 1, seed=2)
    x = sample(data.model(schedule), start / plan.init_scale, plan, generator=torch.Generator().manual_seed(3))
    alpha, sigma = grid.alpha[-1].item(), grid.sigma[-1].item()
    variance = (alpha * 0.6) ** 2 + sigma**2
    assert abs(x.mean().item() - alpha * 0.5) <= SIGMAS * math.sqrt(variance / SAMPLES) + 0.005
    assert abs(x.var().item() / variance - 1) <= SIGMAS * math.sqrt(2 / SAMPLES) + 0.01


def test_ddim_noise_is_that_of_the_paper():
    """sigma_t(eta) = eta sqrt((1 - abar_t)/(1 - abar_s)) sqrt(1 - abar_s/abar_t), 2010.02502 eq. 16."""
    grid = Grid.uniform_t(VP, 10)
    bar = grid.alpha**2
    s, t = bar[:-1], bar[1:]
    for eta in (0.3, 1.0):
        expected = eta * torch.sqrt((1 - t) / (1 - s)) * torch.sqrt(1 - s / t)
        assert torch.allclose(DDIM(eta=eta).compile(VP, grid).noise, expected, rtol=1e-9, atol=1e-15)
