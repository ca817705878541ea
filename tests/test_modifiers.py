"""Free first steps, scaled noise, steps to zero, and the Time-Shift sampler."""

import math

import pytest
import torch

from fewstep.errors import FewstepError, PlanError
from fewstep.samplers import (
    DDIM,
    DEIS,
    EMS,
    GHVB,
    DPMSolver,
    Executor,
    Grid,
    ModelStatistics,
    Run,
    TimeShift,
    UniPC,
    analytic_first_step,
    averaged_time_shift,
    sample,
    scaled_noise,
    to_zero,
)
from fewstep.samplers.reverting import MeanRevertingSDE, thetas
from fewstep.samplers.schedule import alpha_sigma, f64
from fewstep.samplers.testing import GaussianMixture
from tests.solver_fixtures import MIXTURE, SCHEDULES, VP, normal


# -- analytic first step -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("variance", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", ["vp", "vp-v", "flow", "edm", "zero-snr"])
@pytest.mark.parametrize("solver", [DDIM(), DPMSolver(order=3), UniPC(order=2), DEIS(), GHVB()], ids=str)
def test_a_free_first_step_is_a_run_whose_first_output_was_assumed(solver, name, variance):
    schedule = SCHEDULES[name]
    plan = solver.compile(schedule, Grid.karras(schedule, 6) if name != "zero-snr" else Grid.uniform_t(schedule, 6))
    free = analytic_first_step(plan, variance)
    assert (free.nfe, free.steps) == (5, 5)
    model, x = MIXTURE.model(schedule), normal(4, 2)
    assumed = GaussianMixture(f64([[0.0, 0.0]]), f64([math.sqrt(variance)]), f64([1.0])).model(schedule)
    times = plan.model_time.tolist()

    def network(x, tau):
        return (assumed if tau == times[0] else model)(x, tau)

    expected = sample(network, x, plan)
    # rounding through five rows whose weights are at most those of the plan
    size = plan.output.abs().sum(1).max().clamp(min=1) * expected.abs().max()
    assert (sample(model, x, free) - expected).abs().max() < 1e-12 * size


def test_data_of_that_variance_is_solved_as_with_the_call():
    data = GaussianMixture(f64([[0.0, 0.0]]), f64([0.7]), f64([1.0]))
    plan = UniPC(order=3).compile(VP, Grid.karras(VP, 8))
    x, model = normal(4, 2), data.model(VP)
    free = analytic_first_step(plan, 0.49)
    assert torch.allclose(sample(model, x, free), sample(model, x, plan), rtol=1e-11, atol=1e-12)


def test_what_cannot_start_for_free_is_refused():
    grid = Grid.karras(VP, 3)
    with pytest.raises(PlanError, match="deterministic first row"):
        analytic_first_step(DPMSolver(eta=1.0).compile(VP, grid))
    with pytest.raises(PlanError, match="deterministic first row"):
        analytic_first_step(DDIM().compile(VP, grid.tail(2)))
    numbers = f64([[1.0, 1.1]] * 2)  # of the two dimensions, at both knots
    statistics = ModelStatistics(f64([-20.0, 20.0]), numbers, numbers - 1, numbers - 1)
    with pytest.raises(PlanError, match="every dimension has coefficients of its own"):
        analytic_first_step(EMS(statistics=statistics).compile(VP, grid))
    with pytest.raises(FewstepError, match="variance"):
        analytic_first_step(DDIM().compile(VP, grid), -1.0)


# -- scaled noise --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["vp", "vp-v", "flow", "edm"])
@pytest.mark.parametrize("solver", [DPMSolver(order=3), UniPC(order=2), DEIS(), GHVB()], ids=str)
def test_scaled_noise_is_a_network_whose_eps_is_divided(solver, name):
    schedule, factor = SCHEDULES[name], 1.05
    grid = Grid.karras(schedule, 6) if name == "edm" else Grid.lambdas(schedule, torch.linspace(-2, 3, 7).double())
    plan = solver.compile(schedule, grid)
    model = MIXTURE.model(schedule)

    def divided(x, tau):
        lam = schedule.lam(schedule.t_from_model_time(f64(tau)))
        alpha, sigma = alpha_sigma(schedule.family, lam)
        state = x / schedule.in_scale(sigma)
        eps = (state - alpha * MIXTURE.x0(state, alpha, sigma)) / sigma / factor
        x0 = (state - sigma * eps) / alpha
        s = schedule.sigma_data
        return {
            "epsilon": lambda: eps,
            "v_prediction": lambda: alpha * eps - sigma * x0,
            "flow_prediction": lambda: eps - x0,
            "edm": lambda: (x0 - s**2 / (s**2 + sigma**2) * state) * torch.sqrt(s**2 + sigma**2) / (s * sigma),
        }[schedule.prediction]()

    x = normal(4, 2)
    expected = sample(divided, x, plan)
    assert not torch.allclose(expected, sample(model, x, plan), rtol=1e-3)
    assert torch.allclose(sample(model, x, scaled_noise(plan, factor)), expected, rtol=1e-10, atol=1e-10)
    with pytest.raises(FewstepError, match="positive"):
        scaled_noise(plan, 0.0)


def test_at_pure_noise_nothing_is_scaled():
    schedule = SCHEDULES["flow"]
    plan = DPMSolver().compile(schedule, Grid.uniform_t(schedule, 4))
    scaled = scaled_noise(plan, 1.1)
    assert torch.equal(scaled.output[0], plan.output[0])
    assert not torch.equal(scaled.output[1], plan.output[1])


# -- denoise to zero -----------------------------------------------------------------------------------------------------
def test_a_step_to_zero_is_added_once_and_gives_x0():
    grid = Grid.karras(VP, 4, terminal="sigma_min").with_model_time([999.0, 700.0, 300.0, 100.0])
    whole = to_zero(grid)
    assert whole.steps == 5
    assert whole.model_time[:4].tolist() == [999.0, 700.0, 300.0, 100.0]
    assert whole.model_time[4] == VP.model_time(whole.t[4])
    assert torch.equal(whole.lam[:5], grid.lam)
    assert to_zero(whole) is whole
    plan = DPMSolver(order=2).compile(VP, whole)
    executor, run, x = Executor(plan), Run(), normal(3, 2)
    for _i in range(5):
        x = executor.advance(run, 0.1 * x, x)
    assert torch.allclose(x, executor.x0(run), rtol=1e-13)


# -- time shift ----------------------------------------------------------------------------------------------------------
class Recorder:
    """A network that keeps what it was told."""

    def __init__(self):
        self.times = []

    def __call__(self, x, tau):
        self.times.append(tau)
        return 0.9 * x


def state_of_variance(variance, n=3, size=400):
    """n samples of exactly this variance each."""
    x = normal(n, size)
    x = (x - x.mean(1, keepdim=True)) / x.var(1, unbiased=False, keepdim=True).sqrt()
    return x * torch.as_tensor(variance).double().sqrt().reshape(-1, 1)


@pytest.mark.parametrize("name", ["vp", "flow", "edm"])
@pytest.mark.parametrize("v", [0.0, 0.3])
def test_each_sample_is_told_the_time_of_its_variance(name, v):
    """The places are window/2 / 16 apart, so the time is found to half of that; every sample its own."""
    schedule = SCHEDULES[name]
    tau, window = {"vp": (600.0, 80.0), "flow": (600.0, 80.0), "edm": (0.3, 0.4)}[name]
    wanted = f64([tau - 0.3 * window, tau + 0.1 * window, tau + 0.45 * window])
    alpha, sigma = alpha_sigma(schedule.family, schedule.lam(schedule.t_from_model_time(wanted)))
    at = alpha_sigma(schedule.family, schedule.lam(schedule.t_from_model_time(f64(tau))))[1]
    x = state_of_variance(alpha**2 * v + sigma**2) * schedule.in_scale(at)
    network = Recorder()
    shifted = TimeShift(network, schedule, window, -10.0, v)
    shifted(x, tau)
    step = window / 2 / max(16, math.ceil(window / 2))
    if name == "flow" and v:  # (1 - s)^2 v + s^2 falls before s = v / (1 + v) = 0.23, and grows here
        assert tau / 1000 > v / (1 + v)
    assert (network.times[0] - wanted).abs().max() <= 0.5 * step * (1 + 1e-9)
    below = TimeShift(network, schedule, window, tau, v)
    assert torch.equal(below.times(x, tau), f64([tau] * 3))


def test_a_state_of_the_right_variance_is_left_alone_and_the_range_is_kept():
    tau = 500.0
    sigma = alpha_sigma("vp", VP.lam(f64(tau)))[1]
    assert TimeShift(Recorder(), VP, 40, 0).times(state_of_variance([sigma**2] * 3), tau).tolist() == [tau] * 3
    assert TimeShift(Recorder(), VP, 40, 0).times(state_of_variance([9.0] * 3), 995.0).max() <= 999
    with pytest.raises(FewstepError, match="at least 0"):
        TimeShift(Recorder(), VP, -1, 0)


def test_the_averaged_version_is_a_plan():
    """The mean over the batch of what each sample was told, call by call, in the plan's model times."""
    plan = DPMSolver(order=2).compile(VP, Grid.karras(VP, 6))
    network, noise = Recorder(), 1.05 * normal(8, 300)
    averaged = averaged_time_shift(network, noise, plan, VP, window=60, cutoff=200)
    assert averaged.model_time.tolist() == pytest.approx([float(t.mean()) for t in network.times], rel=1e-14)
    late = plan.model_time <= 200
    assert torch.equal(averaged.model_time[late], plan.model_time[late])
    moved = (averaged.model_time - plan.model_time)[~late]
    assert (moved.abs() <= 30).all()
    assert (moved != 0).any()
    assert torch.equal(averaged.output, plan.output)
    told = Recorder()
    sample(told, noise, averaged)
    assert told.times == averaged.model_time.tolist()
    with pytest.raises(FewstepError, match="made for"):
        averaged_time_shift(network, noise, plan, SCHEDULES["flow"], window=60, cutoff=200)


def test_a_mean_reverting_state_is_told_the_time_of_its_own_process():
    """Where alpha^2 + sigma^2 is not 1; the places are 20/2/16 apart, so the time is found to half of that."""
    schedule = MeanRevertingSDE.from_thetas(thetas("cosine", 100), 0.4)
    sigma = schedule.alpha_sigma(schedule.lam(f64([45.0, 53.0])))[1]
    times = TimeShift(Recorder(), schedule, 20.0, 0.0).times(state_of_variance(sigma**2, n=2), 50.0)
    assert (times - f64([45.0, 53.0])).abs().max() <= 0.5 * 10 / 16 * (1 + 1e-9)
