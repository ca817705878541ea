"""What tests of solvers share: schedules, solvers, data whose flow is exact, grids whose start costs nothing, comparisons."""

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from scipy.integrate import solve_ivp

from fewstep.samplers import DDIM, DEIS, DPMSolver, Executor, Grid, NoiseSchedule, Run, UniPC, sample
from fewstep.samplers.schedule import EDM, Flow, alpha_sigma, f64
from fewstep.samplers.testing import GaussianMixture

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SCHEDULES = {
    "vp": NoiseSchedule.from_config(SD),
    "vp-v": NoiseSchedule.from_config({**SD, "prediction_type": "v_prediction"}),
    "vp-x0": NoiseSchedule.from_config({**SD, "prediction_type": "sample"}),
    "zero-snr": NoiseSchedule.from_config({**SD, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}),
    "edm": EDM(),
    "flow": Flow(),
}
VP = SCHEDULES["vp"]
FULL = {"lower_order_final": False}
"""Without the low orders at the end, which are first-order steps and would hide the order of the method."""
DETERMINISTIC = (
    DDIM(),
    *(DPMSolver(order=2, solver_type=k, basis=b, **FULL) for k in ("midpoint", "heun") for b in ("data", "noise")),
    *(DPMSolver(order=3, third_order=k, basis=b, **FULL) for k in ("exact", "as_published") for b in ("data", "noise")),
    *(
        UniPC(order=p, solver_type=k, basis=b, **FULL)
        for p in (1, 2)
        for k in ("bh1", "bh2")
        for b in ("data", "noise")
    ),
    *(UniPC(order=p, basis=b, **FULL) for p in (3, 4) for b in ("data", "noise")),
    *(DEIS(order=p, variable=k, **FULL) for p in (2, 3, 4) for k in ("lambda", "rho")),
)
STOCHASTIC = (
    DDIM(eta=0.5),
    DDIM(eta=1.0),
    *(
        DPMSolver(order=p, solver_type=k, eta=e, **FULL)
        for p in (1, 2)
        for k in ("midpoint", "heun")
        for e in (0.5, 1.0)
    ),
    *(DPMSolver(order=3, third_order=k, eta=1.0, **FULL) for k in ("exact", "as_published")),
)


def points(lam, schedule=VP):
    return Grid.lambdas(schedule, lam).points()


def normal(*shape, seed=0, dtype=torch.float64):
    """Drawn in float64 whatever the dtype, so that the numbers are the same but for their rounding."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def random_lambdas(n, seed, low=-2.0, high=2.5):
    """n + 1 increasing lambdas whose steps differ by up to a factor of 4."""
    steps = torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3 + 1
    u = torch.cat([f64([0.0]), steps.cumsum(0)])
    return low + (high - low) * u / u[-1]


def raw_of(schedule, x0, eps, alpha, sigma):
    """What a network that knows x0 and eps answers; an independent copy of the definitions."""
    x = alpha * x0 + sigma * eps
    s = schedule.sigma_data
    edm = (x0 - s**2 / (s**2 + sigma**2) * x) * torch.sqrt(s**2 + sigma**2) / (s * sigma)
    return {
        "epsilon": eps,
        "sample": x0,
        "v_prediction": alpha * eps - sigma * x0,
        "flow_prediction": eps - x0,
        "edm": edm,
        "edm_v": -edm,
    }[schedule.prediction]


def grids(schedule, n):
    yield Grid.karras(schedule, n, terminal="zero")
    yield Grid.karras(schedule, n, terminal="sigma_min")
    if schedule.family != "ve":
        yield Grid.uniform_t(schedule, n, spacing="trailing")  # starts at alpha = 0 for flow and zero-SNR models


@dataclass(frozen=True, eq=False)
class Gaussian:
    """N(mu, diag(s^2)): every coordinate is a problem of its own, with its flow in closed form."""

    mu: torch.Tensor
    s: torch.Tensor

    def x0(self, x, alpha, sigma):
        return self.mu + alpha * self.s**2 / (alpha**2 * self.s**2 + sigma**2) * (x - alpha * self.mu)

    def flow(self, x, start, end):
        scale = [torch.sqrt(a**2 * self.s**2 + b**2) for a, b in (start, end)]
        return end[0] * self.mu + scale[1] / scale[0] * (x - start[0] * self.mu)

    model = GaussianMixture.model


GAUSSIAN = Gaussian(torch.linspace(-1, 1, 12, dtype=torch.float64), torch.logspace(-0.4, 0.2, 12, dtype=torch.float64))
_RANDOM = GaussianMixture.random(3, 2, seed=0, spread=0.8)
MIXTURE = GaussianMixture(_RANDOM.means, _RANDOM.stds + 0.3, _RANDOM.weights)
"""Widths of 0.5 to 0.9: smooth enough for the asymptotic order to show at a hundred steps."""
LOW, HIGH = -1.0, 1.0


def starting_grid(n, even, first=2e-7):
    """n steps of about (HIGH - LOW) / n in lambda, after steps that double from ``first`` up to that length.

    A multistep method makes its first steps at order 1, 2, ...: one first-order step of length h costs an error of O(h^2),
    which caps the global order at 2 (see the test of that cap). Starting with steps of 2e-7, those errors (4e-14 for
    the first) vanish, while the doubling steps near h shrink as h does and keep the order.
    """
    h = 1.0 / n
    doublings = math.ceil(math.log2(h / first))
    u = np.cumsum([0.0, *(h * 2.0**-k for k in range(doublings, 0, -1)), *[h] * (n - 1)])
    u /= u[-1]
    if not even:
        u = u + 0.1 * u * (1 - u) * (1 + np.sin(2 * math.pi * u))  # smooth, its slope between 0.8 and 1.2
    return f64((LOW + (HIGH - LOW) * u).tolist())


def reference(data, family, x):
    """The probability flow dy/dlambda = e^lambda x0, y = x / sigma, by an adaptive 8th-order method to 1e-13."""

    def derivative(lam, y):
        alpha, sigma = alpha_sigma(family, f64(lam))
        return (math.exp(lam) * data.x0(sigma * torch.from_numpy(y).reshape(x.shape), alpha, sigma)).reshape(-1).numpy()

    start, end = (alpha_sigma(family, f64(v))[1] for v in (LOW, HIGH))
    y = solve_ivp(derivative, (LOW, HIGH), (x / start).reshape(-1).numpy(), method="DOP853", rtol=1e-13, atol=1e-13).y
    return torch.from_numpy(y[:, -1]).reshape(x.shape) * end


def ends(family):
    return tuple(alpha_sigma(family, f64(v)) for v in (LOW, HIGH))


@cache
def problem(data, family):
    """States at the noisier end, and where their flow ends."""
    (alpha, sigma), end = ends(family)
    if data is GAUSSIAN:
        x = alpha * (data.mu + data.s * normal(3, 12)) + sigma * normal(3, 12, seed=1)
        return x, data.flow(x, (alpha, sigma), end)
    x = alpha * data.sample(32, 3) + sigma * normal(32, 2)
    return x, reference(data, family, x)


def error_at(solver, schedule, data, lam, x, truth):
    plan = solver.compile(schedule, Grid.lambdas(schedule, lam))
    return (sample(data.model(schedule), x / plan.init_scale, plan) - truth).square().mean().sqrt().item()


def slope(solver, schedule, data, lambdas_of, counts=(64, 128)):
    """The order that two numbers of steps show, on the lambdas that ``lambdas_of`` gives for each."""
    x, truth = problem(data, schedule.family)
    errors = [error_at(solver, schedule, data, lambdas_of(n), x, truth) for n in counts]
    assert errors[1] > 1e-12, "above rounding, or the slope says nothing"
    return math.log2(errors[0] / errors[1])


def nonlinear(x, i):
    """A network that no solver is exact on: what it answers at the i-th call."""
    return torch.sin(3 * x) + 0.2 * i * x


def run_eps(plan, x):
    """The plan on a network whose eps is :func:`nonlinear`."""
    executor, run = Executor(plan), Run()
    for i in range(plan.steps):
        x = executor.advance(run, nonlinear(x, i), x)
    return x


def in_threads(work, count):
    """``work(k)`` for every k below ``count``, all in threads of their own at the same time; the results in order."""
    together = threading.Barrier(count)

    def started(k):
        together.wait()
        return work(k)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(started, range(count)))


LAM = random_lambdas(9, seed=5)


def assert_same_rows(a, b, schedule=VP, lam=LAM):
    """Equal coefficients: the linear systems of up to four uneven nodes lose at most three digits."""
    grid = Grid.lambdas(schedule, lam)
    p, q = a.compile(schedule, grid), b.compile(schedule, grid)
    width = max(p.output.shape[1], q.output.shape[1])
    outputs = [torch.nn.functional.pad(plan.output, (0, width - plan.output.shape[1])) for plan in (p, q)]
    assert torch.allclose(p.state, q.state, rtol=1e-14)
    assert torch.allclose(*outputs, rtol=1e-12, atol=1e-13)
    assert torch.equal(p.model_time, q.model_time)


def assert_same_result(a, b, name):
    """Equal samples of a nonlinear model, for methods that differ in basis."""
    schedule = SCHEDULES[name]
    grid = Grid.lambdas(schedule, LAM)
    x = normal(4, 2)
    results = [sample(MIXTURE.model(schedule), x, solver.compile(schedule, grid)) for solver in (a, b)]
    assert torch.allclose(*results, rtol=1e-12, atol=1e-12)
