"""The executor's conversions between what networks predict, and hooks on the predicted picture."""

import itertools

import diffusers
import pytest
import torch

from fewstep.errors import FewstepError, PlanError
from fewstep.samplers import DDIM, DPMSolver, Executor, Grid, Run, sample
from fewstep.samplers.convert import Clip, DynamicThreshold, conversion
from fewstep.samplers.lagrange import lagrange_row
from fewstep.samplers.plan import plan_from_rows
from fewstep.samplers.schedule import EDM, Flow
from tests.executor_fixtures import BY_PREDICTION
from tests.solver_fixtures import normal, raw_of

SCHEDULES = {**BY_PREDICTION, "edm_v": EDM(prediction="edm_v")}


def velocity_plan(schedule, grid):
    """Euler's method on eps - x0."""
    points = grid.points()
    rows = [lagrange_row("velocity", "sigma", [s], s, t) for s, t in itertools.pairwise(points)]
    return plan_from_rows(schedule, grid, ["velocity"] * grid.steps, rows, method="euler", order=1).validate()


# -- conversions -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("basis", ["data", "noise", "velocity"])
@pytest.mark.parametrize("prediction", SCHEDULES)
def test_conversion_is_the_algebra(prediction, basis):
    schedule = SCHEDULES[prediction]
    x0, eps = normal(5), normal(5, seed=1)
    for lam in (-3.0, -0.5, 0.0, 2.0, 4.0):
        grid = Grid.lambdas(schedule, [lam, lam + 1])
        alpha, sigma = grid.alpha[0], grid.sigma[0]
        raw = raw_of(schedule, x0, eps, alpha, sigma)
        a, b = conversion(prediction, basis, alpha, sigma, schedule.sigma_data)
        expected = {"data": x0, "noise": eps, "velocity": eps - x0}[basis]
        got = a * (alpha * x0 + sigma * eps) + b * raw
        # subtracting alpha x0 from x and dividing by sigma (or the other way round) loses 1/sigma or 1/alpha <= e^4
        assert torch.allclose(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("prediction", "basis"), [*((p, b) for p in SCHEDULES for b in ("data", "noise")), ("flow_prediction", "velocity")]
)
def test_x0_is_right_at_every_step(prediction, basis):
    schedule = SCHEDULES[prediction]
    grid = Grid.lambdas(schedule, [-2.0, -1.0, 0.0, 1.5, 3.0])
    compile_velocity = basis == "velocity"
    plan = velocity_plan(schedule, grid) if compile_velocity else DPMSolver(basis=basis).compile(schedule, grid)
    executor, run = Executor(plan), Run()
    x = normal(3, 2)
    for i in range(plan.steps):
        raw = normal(3, 2, seed=10 + i)
        p, q = conversion(prediction, "data", grid.alpha[i], grid.sigma[i], schedule.sigma_data)
        expected = p * x + q * raw
        x = executor.advance(run, raw, x)
        assert torch.allclose(executor.x0(run), expected, rtol=1e-11, atol=1e-11)


def test_impossible_conversions_are_refused_when_the_executor_is_made():
    plan = DPMSolver().compile(Flow(prediction="epsilon"), Grid.uniform_t(Flow(prediction="epsilon"), 3))
    with pytest.raises(PlanError, match="alpha = 0"):
        Executor(plan)


# -- hooks -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("basis", ["data", "noise"])
@pytest.mark.parametrize("prediction", SCHEDULES)
def test_an_identity_hook_changes_nothing(prediction, basis):
    schedule = SCHEDULES[prediction]
    plan = DPMSolver(order=2, basis=basis).compile(schedule, Grid.lambdas(schedule, [-2.0, -1.0, 0.0, 1.5, 3.0]))
    model = lambda x, t: torch.tanh(x)  # noqa: E731
    x = normal(3, 2)
    plain, hooked = sample(model, x, plan), sample(model, x, plan, hook=lambda x0: x0)
    assert torch.allclose(plain, hooked, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("basis", ["data", "noise"])
def test_a_hook_sees_and_replaces_the_predicted_picture(basis):
    schedule = SCHEDULES["epsilon"]
    grid = Grid.karras(schedule, 5)
    plan = DPMSolver(order=2, basis=basis).compile(schedule, grid)
    target = normal(3, 2, seed=9)
    seen = []

    def hook(x0):
        seen.append(x0)
        return target

    # the network is overruled at every step, and the last step goes to sigma = 0, where nothing but x0 is left
    assert torch.allclose(sample(lambda x, t: x, normal(3, 2), plan, hook=hook), target, rtol=1e-10, atol=1e-10)
    x = plan.init_scale * normal(3, 2)
    assert torch.allclose(seen[0], (1 - grid.sigma[0]) / grid.alpha[0] * x, rtol=1e-12)


@pytest.mark.parametrize("max_value", [1.0, 1.5, 3.0, 100.0])
@pytest.mark.parametrize("ratio", [0.5, 0.995, 1.0])
def test_thresholding_equals_diffusers(ratio, max_value):
    theirs = diffusers.DDPMScheduler(dynamic_thresholding_ratio=ratio, sample_max_value=max_value)
    x0 = 2 * normal(3, 3, 8, 8, dtype=torch.float32)
    expected = theirs._threshold_sample(x0)
    assert torch.equal(DynamicThreshold(ratio, max_value)(x0), expected)


def test_thresholding_and_clipping_inside_a_run():
    schedule = SCHEDULES["epsilon"]
    plan = DDIM().compile(schedule, Grid.uniform_t(schedule, 4))
    model = lambda x, t: -x  # noqa: E731
    for hook in (DynamicThreshold(0.9), Clip(1.0)):
        assert sample(model, 3 * normal(2, 3, 4, 4), plan, hook=hook).abs().max() <= 1 + 1e-12
    assert sample(model, 3 * normal(2, 3, 4, 4), plan).abs().max() > 1


@pytest.mark.parametrize(("ratio", "max_value"), [(0.0, 1.0), (1.1, 1.0), (0.9, 0.5), (float("nan"), 1.0)])
def test_impossible_thresholds_are_refused(ratio, max_value):
    with pytest.raises(FewstepError, match="thresholding"):
        DynamicThreshold(ratio, max_value)
