"""Accelerated DDIM and DDPM: their published updates, and the rates that the paper proves."""

import math

import pytest
import torch

from fewstep.errors import FewstepError, GridError
from fewstep.samplers import DDIM, AcceleratedDDIM, AcceleratedDDPM, Executor, Grid, Run, sample
from fewstep.samplers.schedule import f64
from tests.solver_fixtures import GAUSSIAN, LAM, SCHEDULES, VP, normal, problem


def score(x, i):
    return -torch.sin(3 * x) - 0.2 * i * x


def test_the_deterministic_update_is_the_published_one():
    grid = Grid.lambdas(VP, LAM)
    a = ((grid.alpha[:-1] / grid.alpha[1:]) ** 2).tolist()  # alpha_t of the paper: one step's share of signal
    start = x = normal(5)
    for i in range(grid.steps):
        s = score(x, i)
        new = x + (1 - a[i]) / 2 * s
        if i:
            y = math.sqrt(a[i - 1]) * (x - (1 - a[i - 1]) / 2 * s)
            new = new + (1 - a[i]) ** 2 / (4 * (1 - a[i - 1])) * (s - math.sqrt(a[i - 1]) * score(y, i - 1))
        x = new / math.sqrt(a[i])
    plan = AcceleratedDDIM().compile(VP, grid)
    assert plan.nfe == 2 * grid.steps - 1
    levels = grid.sigma.tolist()
    executor, run, got = Executor(plan), Run(), start
    for sigma in plan.sigma[:-1].tolist():
        got = executor.advance(run, -sigma * score(got, levels.index(sigma)), got)
    assert torch.allclose(got, x, rtol=1e-10, atol=1e-10)
    # the network is told the time of the level that a stage lies at
    assert plan.model_time[2] == grid.model_time[0]
    assert plan.model_time[3] == grid.model_time[2]


def test_the_stochastic_update_is_the_published_one():
    """Two draws a step in the paper, one row of noise here: the law is the same, so moments of a linear score are."""
    grid = Grid.lambdas(VP, LAM)
    a = ((grid.alpha[:-1] / grid.alpha[1:]) ** 2).tolist()
    plan = AcceleratedDDPM().compile(VP, grid)
    gain = [0.3 + 0.05 * i for i in range(grid.steps)]  # S_i(y) = -gain_i y
    variance, ours = 1.0, plan.init_scale**2
    for i in range(grid.steps):
        y = variance + (1 - a[i]) / 2
        variance = ((1 - (1 - a[i]) * gain[i]) ** 2 * y + (1 - a[i]) / 2) / a[i]
        factor = float(plan.state[i, 0] + plan.output[i, 0] * grid.sigma[i] * gain[i])
        ours = factor**2 * ours + float(plan.noise[i]) ** 2
    assert ours == pytest.approx(variance, rel=1e-12)


def even_in_log_alpha(n):
    """Equal steps of log alpha, the paper's 1 - alpha_t = O(1/T), between lambda = -1 and 1."""
    low, high = (0.5 * math.log(1 / (1 + math.exp(-2 * v))) for v in (-1.0, 1.0))
    log_alpha = torch.linspace(low, high, n + 1, dtype=torch.float64)
    return Grid.lambdas(VP, log_alpha - 0.5 * torch.log(-torch.expm1(2 * log_alpha)))


def test_rates():
    """Deterministic: error O(1/T^2) against DDIM's O(1/T), on a Gaussian whose flow is known."""
    x, truth = problem(GAUSSIAN, "vp")

    def slope(solver):
        errors = []
        for n in (200, 400):
            plan = solver.compile(VP, even_in_log_alpha(n))
            got = sample(GAUSSIAN.model(VP), x / plan.init_scale, plan)
            errors.append((got - truth).square().mean().sqrt().item())
        return math.log2(errors[0] / errors[1])

    assert slope(AcceleratedDDIM()) == pytest.approx(2, abs=0.25)
    assert slope(DDIM()) == pytest.approx(1, abs=0.25)


def test_stochastic_rates():
    """Variance of N(0, v) data at the end, propagated exactly through linear rows: O(1/T^2) against DDPM's O(1/T)."""
    v = 0.3

    def error(solver, n):
        grid = even_in_log_alpha(n)
        plan = solver.compile(VP, grid)
        alpha, sigma = grid.alpha, grid.sigma
        spread = float(alpha[0] ** 2 * v + sigma[0] ** 2)
        if isinstance(solver, AcceleratedDDPM):
            spread += (1 - float(alpha[0] / alpha[1]) ** 2) / 2  # what init_scale adds to the state
        for i in range(n):
            marginal = alpha[i] ** 2 * v + sigma[i] ** 2
            eps = sigma[i] / marginal
            m = eps if plan.basis[i] == "noise" else alpha[i] * v / marginal
            spread = float(plan.state[i, 0] + plan.output[i, 0] * m) ** 2 * spread + float(plan.noise[i]) ** 2
        return abs(spread - float(alpha[-1] ** 2 * v + sigma[-1] ** 2))

    def slope(solver):
        return math.log2(error(solver, 200) / error(solver, 400))

    assert slope(AcceleratedDDPM()) == pytest.approx(2, abs=0.25)
    assert slope(DDIM(eta=1.0)) == pytest.approx(1, abs=0.25)


@pytest.mark.parametrize("solver", [AcceleratedDDIM(), AcceleratedDDPM()], ids=str)
def test_what_they_are_not_written_for_is_refused(solver):
    with pytest.raises(FewstepError, match="vp schedules"):
        solver.compile(SCHEDULES["flow"], Grid.uniform_t(SCHEDULES["flow"], 4))
    with pytest.raises(GridError, match="alpha = 0"):
        solver.compile(SCHEDULES["zero-snr"], Grid.uniform_t(SCHEDULES["zero-snr"], 4))
    plan = solver.compile(VP, Grid.uniform_t(VP, 4))
    assert plan.sigma[-1] == 0
    assert sample(lambda x, t: 0.5 * x, f64([[1.0, -1.0]]), plan).isfinite().all()
