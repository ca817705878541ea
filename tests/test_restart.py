"""Restart sampling: which rows, how many calls, what noise, and that errors contract as they should."""

import math

import pytest
import torch

from fewstep import samplers
from fewstep.errors import FewstepError, GridError
from fewstep.samplers import (
    DDIM,
    EMS,
    IPNDM,
    USF,
    AcceleratedDDIM,
    DPMSolver,
    Executor,
    Grid,
    Restart,
    RestartInterval,
    Run,
    UniPC,
    sample,
)
from fewstep.samplers.schedule import f64
from fewstep.samplers.testing import GaussianMixture
from tests.eval_fixtures import tiny_pipeline
from tests.solver_fixtures import SCHEDULES, SD, VP, normal

NAMES = ("vp", "vp-x0", "edm", "flow")
ARRAYS = ("state", "output", "noise", "constant", "alpha", "sigma", "model_time", "in_scale", "evaluate")
INTERVALS = (RestartInterval(3, 2, 0.1, 0.5), RestartInterval(2, 1, 0.3, 0.8))
BASES = (
    DDIM(),
    DDIM(eta=1.0),
    DPMSolver(order=2),
    DPMSolver(order=3, basis="noise"),
    DPMSolver(order=2, eta=1.0),
    UniPC(order=2),
)


# -- rows -----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("base", BASES, ids=str)
def test_without_repeats_the_plan_is_that_of_the_base(base, name):
    grid = Grid.karras(SCHEDULES[name], 7)
    expected = base.compile(SCHEDULES[name], grid)
    for intervals in ((), (RestartInterval(3, 0, 0.1, 0.5),)):
        plan = Restart(base, intervals).compile(SCHEDULES[name], grid)
        assert all(torch.equal(getattr(plan, a), getattr(expected, a)) for a in ARRAYS)
        assert (plan.basis, plan.order, plan.nfe) == (expected.basis, expected.order, 7)


@pytest.mark.parametrize("spacing", ["karras", "time"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("base", BASES, ids=str)
def test_rows_lead_from_level_to_level(base, name, spacing):
    """``compile`` validates: every row, those of the noise included, leads from one marginal to the next."""
    schedule = SCHEDULES[name]
    grid = Grid.karras(schedule, 7)
    solver = Restart(base, INTERVALS, spacing)
    plan = solver.compile(schedule, grid)
    assert plan.problems() == []
    assert plan.nfe == 7 + solver.extra_calls == 7 + 3 * 2 + 2
    up = (plan.alpha.log() - plan.sigma.log()).diff() < 0  # sigma = 0 at the end is lambda = inf
    assert torch.equal(up, ~plan.evaluate)
    assert int(up.sum()) == 3
    levels = schedule.sigma_from_lam(plan.alpha.log() - plan.sigma.log())
    for row, high in zip(up.nonzero()[:, 0].tolist(), (0.8, 0.5, 0.5), strict=True):
        assert float(levels[row + 1]) == pytest.approx(high, rel=1e-12)
        assert float((grid.noise_levels - levels[row]).abs().min()) < 1e-12
        assert plan.output[row].abs().sum() == 0
        # the outputs from before the noise belong to another trajectory
        assert int((plan.output[row + 1] != 0).sum()) == 1
    assert float(plan.sigma[-1]) == 0


def test_history_goes_on_through_the_low_end_and_comes_down_at_the_last_end_only():
    grid = Grid.karras(VP, 6)
    low = float(grid.noise_levels[3])
    plan = Restart(DPMSolver(order=2), (RestartInterval(2, 1, low, 3.0),)).compile(VP, grid)
    reads = [int((row != 0).sum()) for row in plan.output]
    #       main grid   noise   pass   main grid
    assert reads == [1, 2, 2, 0, 1, 2, 2, 2, 1]
    direct = DPMSolver(order=2).compile(VP, Grid.lambdas(VP, plan_lambdas(plan)[4:]))
    assert torch.allclose(plan.output[4:], direct.output, rtol=1e-12, atol=1e-15)
    assert torch.allclose(plan.state[4:], direct.state, rtol=1e-12, atol=1e-15)


def plan_lambdas(plan):
    return plan.alpha.log() - plan.sigma.log()


def test_passes_are_spaced_as_asked():
    grid = Grid.karras(VP, 5)
    low = float(grid.noise_levels[3])
    interval = RestartInterval(4, 1, low, 2.0)
    sigmas = Restart(DDIM(), (interval,)).legs(grid)[1].noise_levels[:5]
    root = sigmas ** (1 / 7)
    assert torch.allclose(root.diff(), root.diff()[0].expand(4), rtol=1e-9)
    times = Restart(DDIM(), (interval,), "time").legs(grid)[1].t[:5]
    assert torch.allclose(times.diff(), times.diff()[0].expand(4), rtol=1e-9)
    for leg in (Restart(DDIM(), (interval,), s).legs(grid)[1] for s in ("karras", "time")):
        assert float(leg.noise_levels[0]) == pytest.approx(2.0)
        assert leg.lam[4] == grid.lam[3]


def test_intervals_run_where_their_low_ends_lie_and_at_the_same_one_in_their_order():
    """Published: ImageNet-64's [3, 1, 19.35, 40.79], [3, 1, 1.09, 1.92], [3, 1, .06, .30] on 14 points, with Heun's calls."""
    schedule = SCHEDULES["edm"]
    grid = Grid.karras(schedule, 14)
    published = [(3, 1, 19.35, 40.79), (3, 1, 1.09, 1.92), (3, 1, 0.06, 0.30)]
    intervals = [RestartInterval(2 * (n - 1), k, low, high) for n, k, low, high in published]
    for order in (intervals, intervals[::-1]):
        plan = Restart(DDIM(), tuple(order)).compile(schedule, grid)
        assert plan.nfe == 14 + sum(2 * k * (n - 1) for n, k, _, _ in published)
        sigma = plan.sigma[1:][~plan.evaluate].tolist()
        assert sigma == pytest.approx([40.79, 1.92, 0.30])
    both = (RestartInterval(1, 1, 0.3, 2.0), RestartInterval(1, 2, 0.3, 5.0))
    plan = Restart(DDIM(), both).compile(schedule, grid)
    assert plan.sigma[1:][~plan.evaluate].tolist() == pytest.approx([2.0, 5.0, 5.0])
    # the very last level, sigma = 0, is a low end like any other: all that is left of the picture is its x0
    plan = Restart(DDIM(), (RestartInterval(2, 1, 0.0, 1.0),)).compile(schedule, grid)
    assert plan.steps == 14 + 1 + 2
    assert float(plan.noise[14]) == pytest.approx(1.0)


# -- noise ----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["vp-x0", "edm", "flow"])
@pytest.mark.parametrize("base", [DDIM(), DDIM(eta=1.0), DPMSolver(order=2, eta=1.0)], ids=str)
def test_every_state_has_the_marginal_of_a_known_picture(base, name):
    """With x0 known, X = alpha x0 + noise of variance sigma^2 at every call, those after re-noising included.

    Bounds: five standard errors of a mean and of a variance of n normal numbers.
    """
    schedule, n, x0 = SCHEDULES[name], 40_000, 0.7
    plan = Restart(base, INTERVALS).compile(schedule, Grid.karras(schedule, 5))
    calls, states = iter(plan.evaluate.nonzero()[:, 0].tolist()), {}

    def network(x, t):
        i = next(calls)
        x = x / plan.in_scale[i]
        states[i] = x
        s = schedule.sigma_data
        sigma = plan.sigma[i]
        if name == "vp-x0":
            return torch.full_like(x, x0)
        if name == "flow":
            return (x - x0) / sigma
        return (x0 - s**2 / (s**2 + sigma**2) * x) * torch.sqrt(s**2 + sigma**2) / (s * sigma)

    start = normal(n, 1)
    # X_0 is pure noise, without the alpha x0 that the marginal has
    alpha, sigma = plan.alpha[0], plan.sigma[0]
    start = (alpha * x0 + sigma * start) / plan.init_scale
    sample(network, start, plan, generator=torch.Generator().manual_seed(1))
    assert len(states) == plan.nfe
    for i, x in states.items():
        assert float((x.mean() - plan.alpha[i] * x0).abs()) < 5 * plan.sigma[i] / math.sqrt(n)
        assert float((x.var() / plan.sigma[i] ** 2 - 1).abs()) < 5 * math.sqrt(2 / n)


def test_noise_of_a_row_and_of_the_restart_after_it_are_two_draws():
    """A row that draws noise itself may be followed by re-noising; ``noise=`` is for the first of them."""
    schedule = SCHEDULES["vp-x0"]
    grid = Grid.karras(schedule, 3)
    plan = Restart(DDIM(eta=1.0), (RestartInterval(1, 1, float(grid.noise_levels[1]), 5.0),)).compile(schedule, grid)
    executor, z = Executor(plan), normal(4, 2, seed=3)
    y = executor.advance(Run(), torch.zeros(4, 2).double(), torch.zeros(4, 2).double(), noise=z,
                         generator=torch.Generator().manual_seed(5))  # fmt: skip
    fresh = torch.randn(4, 2, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    expected = plan.state[1, 0] * plan.noise[0] * z + plan.noise[1] * fresh
    assert torch.allclose(y, expected, rtol=1e-12, atol=1e-14)


def test_a_sample_depends_on_its_own_generator_alone():
    plan = Restart(DPMSolver(order=2), INTERVALS).compile(VP, Grid.karras(VP, 5))
    model, x = GaussianMixture.random(3, 4, 0).model(VP), normal(3, 4)

    def generators(*seeds):
        return [torch.Generator().manual_seed(s) for s in seeds]

    whole = sample(model, x, plan, generator=generators(7, 8, 9))
    assert torch.equal(sample(model, x, plan, generator=generators(7, 8, 9)), whole)
    alone = sample(model, x[1:2], plan, generator=generators(8))
    assert torch.allclose(alone, whole[1:2], rtol=1e-12, atol=1e-12)  # matrix kernels of another batch size
    assert not torch.allclose(sample(model, x[1:2], plan, generator=generators(10)), alone, atol=1e-3)


# -- contraction ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("repeats", [1, 3])
@pytest.mark.parametrize(("name", "high"), [("vp", 1.5), ("edm", 1.5), ("flow", 0.6)])
def test_a_pass_contracts_the_error_of_the_distribution(name, high, repeats):
    """Data N(mu, s^2) and its exact score: two steps miss mean and variance by what is computed here exactly, since all is
    linear. K exact passes must leave 1 - c^2/v_high of the variance's error each, and its root of the mean's.

    Bounds: five standard errors of mean and variance over n samples, plus what the passes themselves miss of an exact
    flow, which is computed too and kept small by many calls of second order.
    """
    schedule, n, mu, s = SCHEDULES[name], 100_000, 0.4, 0.5
    network = GaussianMixture(f64([[mu]]), f64([s]), f64([1.0])).model(schedule)
    grid = Grid.karras(schedule, 2, terminal="sigma_min")
    # the low end is the grid's last level, so that nothing but the passes follows the two steps
    base = DPMSolver(order=2, lower_order_final=False)
    solver = Restart(base, (RestartInterval(60, repeats, float(grid.noise_levels[-1]), high),))
    coarse, fine, plan = (
        made.compile(schedule, on) for made, on in ((base, grid), (base, solver.legs(grid)[1]), (solver, grid))
    )

    def affine(p):
        """(A, B) of x -> A x + B, which a deterministic plan is here."""
        ends = sample(network, f64([[0.0], [1.0]]) / p.init_scale, p)
        return float(ends[1, 0] - ends[0, 0]), float(ends[0, 0])

    (a_high, a_low), (s_high, s_low) = ((float(v[0]), float(v[-1])) for v in (fine.alpha, fine.sigma))
    v_high, v_low = a_high**2 * s**2 + s_high**2, a_low**2 * s**2 + s_low**2
    gain, offset = affine(coarse)
    error_v, error_m = (gain * coarse.init_scale) ** 2 - v_low, offset - a_low * mu
    share = 1 - (s_high**2 - (a_high / a_low * s_low) ** 2) / v_high
    left_v, left_m = share**repeats * error_v, share ** (repeats / 2) * error_m

    pass_gain, pass_offset = affine(fine)
    # of a variance, relative; half of it of a deviation from the mean
    missed = abs(pass_gain**2 * v_high / v_low - 1)
    missed_m = abs(pass_gain * a_high * mu + pass_offset - a_low * mu)

    x = sample(network, normal(n, 1), plan, generator=torch.Generator().manual_seed(2))
    v = v_low + abs(left_v)
    bound_v = 5 * v * math.sqrt(2 / n) + 2 * repeats * missed * v
    bound_m = 5 * math.sqrt(v / n) + 2 * repeats * (missed_m + missed * abs(left_m))
    assert abs(float(x.var()) - v_low - left_v) < bound_v
    assert abs(float(x.mean()) - a_low * mu - left_m) < bound_m
    assert abs(left_v) + bound_v < abs(error_v)


# -- bad input ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "interval",
    [
        (0, 1, 0.1, 0.5),
        (2, -1, 0.1, 0.5),
        (2, 1, 0.5, 0.1),
        (2, 1, -0.1, 0.5),
        (2.5, 1, 0.1, 0.5),
        (2, 1, 0.1),
        3,
        ("a",) * 4,
    ],
)
def test_impossible_intervals_are_refused(interval):
    with pytest.raises(FewstepError, match=r"calls, repeats, low, high"):
        Restart(DDIM(), (interval,))


def test_restarts_that_do_not_fit_the_grid_or_the_model_are_refused():
    schedule = SCHEDULES["edm"]
    grid = Grid.karras(schedule, 4)
    with pytest.raises(GridError, match="the model's 80; got high=90"):
        Restart(DDIM(), (RestartInterval(2, 1, 1.0, 90.0),)).compile(schedule, grid)
    # the nearest level to 10 on this grid lies above 10.1
    coarse = Grid.sigmas(schedule, [80.0, 12.0, 1.0])
    with pytest.raises(GridError, match=r"goes up from sigma 12 \(the grid's level nearest to 10\)"):
        Restart(DDIM(), (RestartInterval(2, 1, 10.0, 10.1),)).compile(schedule, coarse)
    with pytest.raises(FewstepError, match="spacing of restart passes 'linear'"):
        Restart(DDIM(), (), "linear")
    with pytest.raises(GridError, match="made for"):
        Restart(DDIM()).compile(VP, grid)


def test_a_restart_never_begins_at_zero_noise_unless_asked_to():
    """On the grid 80, 1.5, 0 the nearest level to 0.1 is 0."""
    schedule = SCHEDULES["edm"]
    coarse = Grid.sigmas(schedule, [80.0, 1.5])
    for low, at in ((0.1, 1.5), (0.0, 0.0)):
        legs = Restart(DDIM(), (RestartInterval(2, 1, low, 5.0),)).legs(coarse)
        assert [float(leg.noise_levels[i]) for leg, i in zip(legs, (-1, 0), strict=True)] == pytest.approx([at, 5.0])
    with pytest.raises(GridError, match="more than one step"):
        Restart(DDIM(), (RestartInterval(2, 1, 0.1, 5.0),)).compile(schedule, Grid.sigmas(schedule, [80.0]))


@pytest.mark.parametrize(
    "base", [EMS(), IPNDM(weights="diff_sampler"), AcceleratedDDIM(), USF(first_step_free=True)], ids=str
)
def test_bases_with_inexact_rows_are_interrupted_like_others(base):
    grid = Grid.uniform_lambda(VP, 8)
    plain, plan = (Restart(base, intervals).compile(VP, grid) for intervals in ((), INTERVALS))
    assert not Restart(base).consistent
    assert Restart().consistent
    assert plan.nfe > plain.nfe
    assert sample(lambda x, t: torch.zeros_like(x), normal(2, 3), plan).isfinite().all()


# -- scheduler ------------------------------------------------------------------------------------------------------------
OPTIONS = {"restart_intervals": [[3, 2, 0.1, 0.5], [2, 1, 0.3, 0.8]], "grid": "karras"}


def run(scheduler, model, x, begin=0, seed=0):
    scheduler.set_begin_index(begin)
    g = torch.Generator().manual_seed(seed)
    for t in scheduler.timesteps[begin:]:
        x = scheduler.step(model(x, float(t)), t, x, generator=g, return_dict=False)[0]
    return x


def test_the_scheduler_counts_network_calls():
    model, x = GaussianMixture.random(3, 4, 0).model(VP), normal(2, 4)
    scheduler = samplers.RestartScheduler.from_config(SD, solver_order=2, **OPTIONS)
    scheduler.set_timesteps(13)
    assert len(scheduler.timesteps) == scheduler.num_inference_steps == scheduler.plan.nfe == 13
    assert bool((scheduler.timesteps.diff() > 0).any())
    expected = Restart(DPMSolver(order=2), INTERVALS).compile(VP, Grid.karras(VP, 5))
    assert torch.equal(scheduler.plan.output, expected.output)
    result = sample(model, x, expected, generator=torch.Generator().manual_seed(0))
    for _ in range(2):  # timesteps are float32, 6e-8 of their size off
        assert torch.allclose(run(scheduler, model, x * expected.init_scale), result, rtol=1e-4, atol=1e-4)
    with pytest.raises(FewstepError, match="restarts alone take 8 network calls, and 8 steps were asked for"):
        scheduler.set_timesteps(8)
    with pytest.raises(FewstepError, match=r"\[3, 2, 0.1\]"):
        samplers.RestartScheduler.from_config(SD, restart_intervals=[[3, 2, 0.1]]).set_timesteps(9)
    scheduler.set_timesteps(timesteps=[900, 500, 100])
    assert scheduler.num_inference_steps == 3 + 8
    again = samplers.RestartScheduler.from_config(scheduler.config)
    again.set_timesteps(13)
    assert again.plan.digest == expected.digest


def test_image_to_image_begins_anywhere_in_the_run():
    """The run from the k-th call on: its rows are the whole run's once their history lies within it."""
    model, x = GaussianMixture.random(3, 4, 0).model(VP), normal(2, 4)
    scheduler = samplers.RestartScheduler.from_config(SD, solver_order=2, **OPTIONS)
    scheduler.set_timesteps(13)
    for begin in range(13):
        run(scheduler, model, x, begin)
        plan = scheduler._active.plan
        assert plan.nfe == 13 - begin
        assert plan.problems() == []


def test_flow_pipelines_and_real_pipelines_run_it():
    flow = samplers.RestartScheduler.from_config(
        {"prediction_type": "flow_prediction", "use_flow_sigmas": True}, restart_intervals=[[2, 1, 0.3, 0.6]]
    )
    flow.set_timesteps(sigmas=[1 - i / 6 for i in range(6)])  # how a pipeline of flow models says: 6 steps
    assert flow.num_inference_steps == 6
    pipe = tiny_pipeline()
    pipe.scheduler = samplers.RestartScheduler.from_config(pipe.scheduler.config, restart_intervals=[[2, 1, 0.3, 1.5]])
    pictures = [
        pipe("a", num_inference_steps=5, output_type="np", generator=torch.Generator().manual_seed(0)).images
        for _ in range(2)
    ]
    assert (pictures[0] == pictures[1]).all()
    assert pipe.scheduler.num_inference_steps == 5
