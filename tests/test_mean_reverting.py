"""Mean-reverting diffusion and ResShift: their schedules, and every solver on them, against exact and published formulas."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from fewstep import samplers
from fewstep.errors import FewstepError, PlanError
from fewstep.samplers import (
    DDIM,
    DEIS,
    EMS,
    IPNDM,
    AcceleratedDDIM,
    AcceleratedDDPM,
    DPMSolver,
    Executor,
    Grid,
    MeanReverting,
    NoiseSchedule,
    ResShift,
    Restart,
    RestartInterval,
    Run,
    SolverPlan,
    UniPC,
    sample,
    scaled_noise,
)  # fmt: skip
from fewstep.samplers.reverting import MeanRevertingSDE, ResidualShift, thetas
from fewstep.samplers.schedule import f64
from fewstep.samplers.testing import GaussianMixture
from tests.solver_fixtures import normal

SDE = MeanRevertingSDE.from_thetas(thetas("cosine", 100), 0.4)
SCHEDULES = {
    "sde": SDE,
    "sde-x0": replace(SDE, prediction="sample"),
    "shift": ResidualShift.exponential(),
    "shift-eps": ResidualShift.exponential(prediction="epsilon"),
}
SOLVERS = (
    DDIM(),
    DPMSolver(order=2),
    DPMSolver(order=3, basis="noise"),
    UniPC(order=2),
    DEIS(order=2, variable="rho"),
    DDIM(eta=1.0),
    DPMSolver(order=2, eta=1.0),
    Restart(DPMSolver(order=2), (RestartInterval(2, 1, 0.3, 0.8),)),
)


def model_around(mu, data, schedule):
    """The network of a model whose x0 - mu is distributed as ``data``."""
    centred = data.model(schedule)

    def network(x, t):
        c = float(schedule.in_scale(schedule.alpha_sigma(schedule.lam(f64(t)))[1]))
        return centred((x / c - mu) * c, t) + (mu if schedule.prediction == "sample" else 0)

    return network


# -- schedules ------------------------------------------------------------------------------------------------------------
def test_the_sde_has_the_published_marginals():
    """IR-SDE's tables, written out: alpha = exp(-cumulated theta dt), sigma_bar^2 = lambda^2 (1 - alpha^2), eps = 0.01."""
    for name in ("cosine", "linear", "constant"):
        rates = thetas(name, 100).numpy()
        assert len(rates) == 101
        cumulated = np.cumsum(rates)
        dt = -math.log(0.01) / cumulated[-1]
        alpha = np.exp(-cumulated * dt)
        sigma = 50 / 255 * np.sqrt(1 - np.exp(-2 * cumulated * dt))
        at = MeanRevertingSDE.from_thetas(f64(rates)).at(torch.arange(101.0).double())
        assert np.allclose(at.alpha.numpy(), alpha, rtol=1e-12, atol=0)
        assert np.allclose(at.sigma.numpy(), sigma, rtol=1e-9, atol=0)  # 1 - e^-x of a small x, as published
    cosine = thetas("cosine", 100)
    x = (np.arange(104) / 103 + 0.008) / 1.008 * np.pi / 2
    bar = np.cos(x[:-1] * 103 / 102 - 0.008 / 1.008 * np.pi / 2 / 102) ** 2  # the same points on 102 intervals
    assert np.allclose(1 - (bar / bar[0])[1:-1], cosine.numpy(), rtol=1e-9)
    assert bool((cosine.diff() > 0).all())


def test_the_residual_shift_has_the_published_marginals():
    """sqrt(eta_i) = sqrt(eta_1) b^(p_i) with kappa 2, from 0.02 to 0.99 in 15 steps: q(x_t) = x0 + eta (y - x0), kappa^2 eta."""
    steps, kappa, power = 15, 2.0, 0.3
    first = min(0.04 / kappa, 0.04)
    b = (0.99 / first) ** (1 / (steps - 1))
    eta = np.array([(first * b ** ((steps - 1) * (i / (steps - 1)) ** power)) ** 2 for i in range(steps)])
    at = ResidualShift.exponential().at(torch.arange(15.0).double())
    assert np.allclose(at.alpha.numpy(), 1 - eta, rtol=1e-12)
    assert np.allclose(at.sigma.numpy(), kappa * np.sqrt(eta), rtol=1e-12)
    assert np.allclose(ResidualShift.exponential().in_scale(at.sigma).numpy(), 1 / np.sqrt(kappa**2 * eta + 1))


@pytest.mark.parametrize("schedule", [SDE, SCHEDULES["shift"]], ids=["sde", "shift"])
def test_alpha_and_sigma_belong_to_lambda(schedule):
    lam = torch.linspace(-3, 6, 40, dtype=torch.float64)
    alpha, sigma = schedule.alpha_sigma(lam)
    assert torch.allclose(torch.log(alpha / sigma), lam, rtol=0, atol=1e-13)
    (up, down), h = ([torch.stack(schedule.alpha_sigma(lam + s)) for s in (1e-5, -1e-5)], 1e-5)
    slopes = torch.stack(schedule.slopes(alpha, sigma))
    # central differences: h^2/6 of the third derivative, and rounding over h
    assert torch.allclose((up - down) / (2 * h), slopes, rtol=0, atol=1e-10)
    top = schedule.noise_level if schedule is SDE else schedule.kappa
    ends = [v.tolist() for v in schedule.alpha_sigma(f64([math.inf, -math.inf]))]
    assert ends == [[1.0, 0.0], [0.0, pytest.approx(top)]]
    t = torch.linspace(0, schedule.t_range[0], 30, dtype=torch.float64)
    assert torch.allclose(schedule.t(schedule.lam(t)), t, atol=1e-9)


# -- centre, solve, un-centre ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_it_is_the_solver_on_the_centred_process(solver, name):
    """Run on x with mu, and run on x - mu without: equal states and equal predicted x0, but for rounding.

    What rounds is mu times the row's weights, 1/alpha where eps is read as x0: at most 1e2 here.
    """
    schedule = SCHEDULES[name]
    centred = schedule.centred()
    mu, data, noise = 3 * normal(4, 5, seed=9), GaussianMixture.random(3, 5, 1, spread=0.5), normal(4, 5)
    grid = Grid.uniform_t(schedule, 6, spacing="trailing")
    plan = MeanReverting(solver).compile(schedule, grid)
    inner = solver.compile(centred, replace(grid, schedule=centred))
    assert plan.problems() == []
    assert (plan.nfe, plan.order, plan.history) == (inner.nfe, inner.order, inner.history)
    seen = {plan: [], inner: []}
    for p, network, constant in (
        (plan, model_around(mu, data, schedule), mu), (inner, data.model(centred), None),
    ):  # fmt: skip
        sample(
            network, noise, p, constant=constant, generator=torch.Generator().manual_seed(3),
            callback=lambda i, x, x0, p=p: seen[p].append((x, x0)),
        )  # fmt: skip
    for (x, x0), (y, y0) in zip(seen[plan], seen[inner], strict=True):
        assert torch.allclose(x, y + mu, rtol=0, atol=1e-10)
        assert torch.allclose(x0, y0 + mu, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("solver", [DPMSolver(order=2), DPMSolver(order=2, basis="noise")], ids=str)
def test_hooks_see_and_change_the_predicted_x0(solver, name):
    schedule = SCHEDULES[name]
    mu, noise = normal(3, 5, seed=9), normal(3, 5)
    plan = MeanReverting(solver).compile(schedule, Grid.uniform_t(schedule, 4, spacing="trailing"))
    seen, told, network = [], normal(3, 5, seed=2), model_around(mu, GaussianMixture.random(2, 5, 1), schedule)

    def hook(x0):
        seen.append(x0)
        return told

    executor, run = Executor(plan, hook, mu), Run()
    x = executor.model_input(run, mu + plan.init_scale * noise) / plan.in_scale[0]
    for i in executor.calls:
        alpha, sigma = plan.alpha[i], plan.sigma[i]
        raw = network(executor.model_input(run, x), plan.model_time[i])
        x0 = raw if schedule.prediction == "sample" else (x - (1 - alpha) * mu - sigma * raw) / alpha
        x = executor.advance(run, raw, x)
        assert torch.allclose(seen[-1], x0, rtol=0, atol=1e-10)
        assert torch.allclose(executor.x0(run), told, rtol=0, atol=1e-10)
    assert torch.allclose(x, told, rtol=0, atol=1e-10)  # what every step believed


# -- order ----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["sde", "sde-x0", "shift"])
@pytest.mark.parametrize(
    "solver",
    [
        DDIM(),
        *(DPMSolver(order=p, basis=b, lower_order_final=False) for p in (2, 3) for b in ("data", "noise")),
        UniPC(order=1, lower_order_final=False),
    ],
    ids=str,
)
def test_global_order_on_gaussian_data_around_mu(solver, name):
    """The exact flow is linear; even steps in lambda, after short ones."""
    schedule = SCHEDULES[name]
    mu = normal(8, 2, seed=9)
    data = GaussianMixture(f64([[0.7, -0.3]]), f64([0.5]), f64([1.0]))
    low, high, errors = -1.5, 2.5, []
    for n in (96, 192):
        # first-order starting steps cap the order at 2; steps that double from 1e-6 on keep it
        h = (high - low) / n
        steps = f64([h * 2.0**-k for k in range(20, 0, -1)] + [h] * (n - 1))
        lam = low + (high - low) * torch.cat([f64([0.0]), steps.cumsum(0)]) / steps.sum()
        grid = Grid.lambdas(schedule, lam)
        plan = MeanReverting(solver).compile(schedule, grid)
        noise = normal(8, 2)
        first, last = ((grid.alpha[i], grid.sigma[i]) for i in (0, -1))
        exact = mu + data.flow(noise * plan.init_scale, first, last)
        result = sample(model_around(mu, data, schedule), noise, plan, constant=mu)
        errors.append(float((result - exact).norm()))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(plan.order, abs=0.25)


# -- published formulas ---------------------------------------------------------------------------------------------------
def test_the_constants_are_those_of_the_mr_sampler():
    """2502.07856, first order, where the network says x0 (data) or eps (noise): the coefficients of mu."""
    grid = Grid.uniform_t(SDE, 5, spacing="trailing", terminal="sigma_min")
    a, s = (v[:-1] for v in (grid.alpha, grid.sigma))
    at, st = (v[1:] for v in (grid.alpha, grid.sigma))
    h = grid.lam.diff()
    noise = MeanReverting(DPMSolver(order=1, basis="noise")).compile(SDE, grid)
    assert torch.allclose(noise.constant, 1 - at / a, rtol=1e-12)
    x0 = SCHEDULES["sde-x0"]
    on = Grid.uniform_t(x0, 5, spacing="trailing", terminal="sigma_min")
    data = MeanReverting(DPMSolver(order=2)).compile(x0, on)
    assert torch.allclose(data.constant, 1 - st / s + st / s * a - at, rtol=1e-11, atol=1e-14)
    sde = MeanReverting(DPMSolver(order=1, eta=1.0)).compile(x0, on)
    e = torch.exp(-2 * h)
    assert torch.allclose(sde.constant, 1 - at / a * e - at * (1 - e), rtol=1e-11, atol=1e-14)
    assert torch.allclose(sde.noise, st * torch.sqrt(1 - e), rtol=1e-12)


def test_ancestral_steps_are_resshifts_own_sampler():
    """2307.12348, eq. 7: mean (eta_s/eta_t) x + ((eta_t - eta_s)/eta_t) x0, variance kappa^2 eta_s (eta_t - eta_s)/eta_t."""
    schedule = SCHEDULES["shift"]
    grid = Grid.timesteps(schedule, torch.arange(14, -1, -1.0).double())
    plan = MeanReverting(ResShift()).compile(schedule, grid)
    eta = torch.cat([(schedule.at(torch.arange(14, -1, -1.0).double()).sigma / 2) ** 2, f64([0.0])])
    now, then = eta[:-1], eta[1:]
    assert torch.allclose(plan.state[:, 0], then / now, rtol=1e-10, atol=1e-15)
    assert torch.allclose(plan.output[:, 0], (now - then) / now, rtol=1e-10)
    assert torch.allclose(plan.noise**2, 4 * then * (now - then) / now, rtol=1e-10, atol=1e-15)
    assert float(plan.constant.abs().max()) < 1e-12  # y enters through the first state alone


@pytest.mark.parametrize("name", ["sde-x0", "shift"])
@pytest.mark.parametrize("solver", [DDIM(eta=1.0), DPMSolver(order=2, eta=1.0)], ids=str)
def test_stochastic_rows_keep_the_marginal_of_a_known_picture(solver, name):
    """alpha x0 + (1 - alpha) mu and sigma^2 at every state; bounds: five standard errors of n draws."""
    schedule, n, x0, mu = SCHEDULES[name], 40_000, 0.7, -0.5
    plan = MeanReverting(solver).compile(schedule, Grid.uniform_t(schedule, 5, spacing="trailing"))
    states = []
    alpha, sigma = plan.alpha[0], plan.sigma[0]
    start = (alpha * (x0 - mu) + sigma * normal(n, 1)) / plan.init_scale
    sample(
        lambda x, t: torch.full_like(x, x0), start, plan, constant=f64([mu]), generator=torch.Generator().manual_seed(1),
        callback=lambda i, x, _: states.append(x),
    )  # fmt: skip
    for i, x in enumerate(states[:-1], start=1):
        expected = plan.alpha[i] * x0 + (1 - plan.alpha[i]) * mu
        assert float((x.mean() - expected).abs()) < 5 * plan.sigma[i] / math.sqrt(n)
        assert float((x.var() / plan.sigma[i] ** 2 - 1).abs()) < 5 * math.sqrt(2 / n)
    assert torch.allclose(states[-1], f64([[x0]]).expand(n, 1), atol=1e-12)


# -- plans ----------------------------------------------------------------------------------------------------------------
def test_plans_are_saved_and_cut_with_their_constants(tmp_path):
    schedule = SCHEDULES["sde"]
    plan = MeanReverting(DPMSolver(order=2)).compile(schedule, Grid.uniform_t(schedule, 6, spacing="trailing"))
    plan.save(tmp_path / "plan.json")
    again = SolverPlan.load(tmp_path / "plan.json", schedule)
    assert again.digest == plan.digest
    assert again.reverting
    for begin in range(6):
        assert plan.tail(begin).problems() == []
    wrong = replace(plan, constant=plan.constant * 1.01)
    with pytest.raises(PlanError, match=r"row 0 adds .* mu, .* is right"):
        wrong.validate()


@pytest.mark.parametrize("name", ["sde", "sde-x0"])
def test_scaled_noise_keeps_the_mean(name):
    """A network whose eps is divided, by rows; the network predicts eps, or x0 = (x - (1 - alpha) mu - sigma eps) / alpha."""
    schedule, factor, mu = SCHEDULES[name], 1.05, normal(2, seed=4)
    network = model_around(mu, GaussianMixture.random(3, 2, seed=1), schedule)

    def divided(x, t):
        alpha = schedule.alpha_sigma(schedule.lam(f64(t)))[0]
        if schedule.prediction == "epsilon":
            return network(x, t) / factor
        clean = (x - (1 - alpha) * mu) / alpha  # x0 where eps is 0
        return clean + (network(x, t) - clean) / factor

    plan = MeanReverting(DPMSolver(order=2)).compile(schedule, Grid.uniform_lambda(schedule, 6))
    noise = normal(4, 2)
    expected = sample(divided, noise, plan, constant=mu)
    assert not torch.allclose(expected, sample(network, noise, plan, constant=mu), rtol=1e-3)
    assert torch.allclose(
        sample(network, noise, scaled_noise(plan, factor), constant=mu), expected, rtol=1e-10, atol=1e-10
    )


def test_solvers_with_inexact_rows_run_on_the_centred_process():
    for solver in (EMS(), IPNDM(weights="diff_sampler")):
        assert not MeanReverting(solver).consistent
        plan = MeanReverting(solver).compile(SDE, Grid.uniform_lambda(SDE, 6))
        # at x = mu the mean is kept, whatever the rows: eps = 0 and x0 = mu there
        run, x = Run(), torch.ones(1, 2).double()
        for _ in range(plan.steps):
            x = Executor(plan, None, torch.ones(1, 2).double()).advance(run, torch.zeros_like(x), x)
        assert torch.allclose(x, torch.ones(1, 2).double(), rtol=0, atol=1e-10)


def test_what_does_not_go_together_is_refused():
    vp = NoiseSchedule.from_config({"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012})
    with pytest.raises(FewstepError, match="does not revert to a mean; compile DPMSolver"):
        MeanReverting().compile(vp, Grid.karras(vp, 4))
    grid = Grid.uniform_t(SDE, 4, spacing="trailing")
    with pytest.raises(PlanError, match=r"MeanReverting\(solver\) adds it"):
        DPMSolver().compile(SDE, grid)
    with pytest.raises(PlanError, match="give it as constant="):
        Executor(MeanReverting().compile(SDE, grid))
    for solver in (AcceleratedDDIM(), AcceleratedDDPM()):
        with pytest.raises(FewstepError, match=r"alpha\^2 \+ sigma\^2 = 1, and in MeanRevertingSDE"):
            MeanReverting(solver).compile(SDE, grid)
    with pytest.raises(FewstepError, match="prediction type of a mean-reverting model 'v_prediction'"):
        replace(SDE, prediction="v_prediction")
    with pytest.raises(FewstepError, match="positive noise_level"):
        MeanRevertingSDE.from_thetas(thetas("linear", 10), noise_level=0.0)
    with pytest.raises(FewstepError, match="at least 2 steps"):
        ResidualShift.exponential(1)
    with pytest.raises(FewstepError, match="theta_schedule 'cosin'; did you mean 'cosine'"):
        thetas("cosin", 10)


# -- scheduler ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("process", ["mean_reverting", "residual_shift"])
def test_the_scheduler_runs_the_plan(process):
    steps = {"mean_reverting": 100, "residual_shift": 15}[process]
    config = {"process": process, "num_train_timesteps": steps, "prediction_type": "sample", "noise_level": 0.4}
    scheduler = samplers.MeanRevertingScheduler(**config)
    mu, noise = normal(2, 3, 4, 4, seed=9), normal(2, 3, 4, 4)

    def network(x, t):
        return torch.sin(x) + float(t) / 100

    results = []
    for centre in (mu, -mu, mu):
        scheduler.set_constant(centre)
        scheduler.set_timesteps(5)
        assert scheduler.timesteps.dtype == torch.int64
        x = scheduler.first_sample(noise)
        for t in scheduler.timesteps:
            x = scheduler.step(network(scheduler.scale_model_input(x, t), t), t, x, return_dict=False)[0]
        results.append(x)
        assert torch.equal(x, sample(network, noise, scheduler.plan, constant=centre))
    assert torch.equal(results[0], results[2])
    assert not torch.allclose(results[0], results[1])
    again = samplers.MeanRevertingScheduler.from_config(scheduler.config)
    again.set_constant(mu)
    again.set_timesteps(5)
    assert again.plan.digest == scheduler.plan.digest
    t = scheduler.timesteps[2:4]
    alpha, sigma = (v[2:4].reshape(2, 1, 1, 1) for v in (scheduler.plan.alpha, scheduler.plan.sigma))
    x0 = normal(2, 3, 4, 4, seed=5)
    assert torch.allclose(scheduler.add_noise(x0, noise, t), alpha * x0 + (1 - alpha) * mu + sigma * noise, atol=1e-12)
    half = scheduler.step(x0.half(), scheduler.timesteps[0], x0.half(), return_dict=False)[0]
    assert half.dtype == torch.float16


def test_training_scripts_see_the_process_itself():
    s = samplers.MeanRevertingScheduler(process="mean_reverting")
    schedule = s.schedule
    alpha = schedule.alpha_sigma(schedule.lam(torch.arange(len(s.alphas_cumprod)).double()))[0]
    assert torch.allclose(s.alphas_cumprod.double(), alpha**2, rtol=1e-7)  # an ulp of float32
    with pytest.raises(FewstepError, match="v is defined for other processes"):
        s.get_velocity(torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor([3]))


def test_the_scheduler_says_what_it_needs():
    scheduler = samplers.MeanRevertingScheduler()
    with pytest.raises(FewstepError, match=r"call set_constant\(mu\) first"):
        scheduler.set_timesteps(5)
    with pytest.raises(FewstepError, match="describes no mean-reverting process"):
        samplers.MeanRevertingScheduler.from_config({"beta_schedule": "scaled_linear", "_class_name": "DDIMScheduler"})
    with pytest.raises(FewstepError, match="process 'shift'"):
        samplers.MeanRevertingScheduler(process="shift")
