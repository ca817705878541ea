"""LML: its formula against dense linear algebra, its limits, and its place in a run."""

import math

import pytest
import torch

from fewstep import samplers
from fewstep.errors import FewstepError
from fewstep.samplers import LML, DPMSolver, Executor, Grid, Run, sample
from fewstep.samplers.testing import GaussianMixture
from tests.solver_fixtures import SD, VP, normal

DATA = GaussianMixture.random(3, 5, 0)


@pytest.mark.parametrize(("damping", "kappa"), [(1e-4, 0.1), (0.3, 0.5), (10.0, 1.0)])
def test_it_is_the_damped_solve_at_the_length_of_the_update(damping, kappa):
    u, previous = normal(3, 2, 4), normal(3, 2, 4, seed=1)
    result = LML(damping, kappa)(u, previous)
    for i in range(3):
        a, b = u[i].flatten(), previous[i].flatten()
        e = kappa * b + (1 - kappa) * a
        w = torch.linalg.solve(torch.outer(e, e) + damping * 8 * torch.eye(8, dtype=torch.float64), a)
        # the solve loses the digits of its condition number, at most (|e|^2 + 8 damping) / (8 damping)
        condition = 1 + float(e @ e) / (8 * damping)
        assert torch.allclose(result[i].flatten(), w / w.norm() * a.norm(), rtol=0, atol=1e-14 * condition * 8)


def test_its_limits():
    u, previous = normal(2, 7), normal(2, 7, seed=1)
    assert torch.equal(LML(0.5, 0.2)(u, None), u)
    # far above the mean square of e: the rank-one term is |e||u| / damping d of u
    e = 0.2 * previous + 0.8 * u
    bound = float((e.square().sum(1) / (1e6 * 7)).max())
    assert (LML(1e6, 0.2)(u, previous) - u).norm(dim=1).max() <= 2 * bound * u.norm(dim=1).max()
    # far below: orthogonal to e; what is left of it is damping d / (damping d + |e|^2)
    turned = LML(1e-9, 0.2)(u, previous)
    orthogonal = u - e * ((e * u).sum(1) / e.square().sum(1))[:, None]
    assert torch.allclose(
        turned, orthogonal / orthogonal.norm(dim=1, keepdim=True) * u.norm(dim=1, keepdim=True), atol=1e-6
    )
    # parallel to the update before it, or zero: there is nothing to turn
    assert torch.allclose(LML(0.5, 0.2)(u, 2 * u), u, atol=1e-14)
    assert torch.equal(LML(0.5, 0.2)(torch.zeros(2, 7), torch.zeros(2, 7)), torch.zeros(2, 7))


@pytest.mark.parametrize("basis", ["data", "noise"])
@pytest.mark.parametrize("order", [1, 2])
def test_a_run_is_the_loop_written_out(basis, order):
    """X_{i+1} = a X_i + LML(sum_j b_j m_j), the sum remembered as it was before the change."""
    plan = DPMSolver(order=order, basis=basis).compile(VP, Grid.karras(VP, 6, terminal="sigma_min"))
    model, lml, x = DATA.model(VP), LML(0.2, 0.3), normal(4, 5)
    result = sample(model, x, plan, update=lml)
    outputs, previous = [], None
    x = x * plan.init_scale
    for i in range(plan.steps):
        eps = model(x, plan.model_time[i])
        outputs.append(eps if basis == "noise" else (x - plan.sigma[i] * eps) / plan.alpha[i])
        u = sum(w * outputs[i - k] for k, w in enumerate(plan.output[i]) if w)
        x, previous = plan.state[i, 0] * x + lml(u, previous), u
    # u is found as a difference in the executor, whose rounding the next steps carry along
    assert torch.allclose(result, x, rtol=0, atol=1e-12 * plan.steps * float(x.abs().max()))
    assert not torch.allclose(result, sample(model, normal(4, 5), plan), atol=1e-3)


def test_noise_rows_get_their_noise_unchanged():
    """The change is to what the network says: with outputs that all agree the noise of the reverse SDE is all there is."""
    plan = DPMSolver(order=1, eta=1.0).compile(VP, Grid.karras(VP, 3))
    x, z = normal(1, 6), normal(1, 6, seed=4)
    states = []
    for update in (None, LML(0.5, 0.5)):
        executor, run, y = Executor(plan, update=update), Run(), x
        for _ in range(2):
            y = executor.advance(run, torch.zeros_like(y), y, noise=z)
        states.append(y)
    # eps = 0: x0 is parallel to X, and the second update to the first where z is; z itself is added after the change
    first = Executor(plan).advance(Run(), torch.zeros_like(x), x, noise=z)
    assert torch.equal(Executor(plan, update=LML(0.5, 0.5)).advance(Run(), torch.zeros_like(x), x, noise=z), first)
    assert not torch.equal(*states)


def test_samples_and_runs_do_not_see_each_other():
    plan = DPMSolver(order=2).compile(VP, Grid.karras(VP, 5))
    model, x = DATA.model(VP), normal(4, 5)
    whole = sample(model, x, plan, update=LML())
    for i in range(4):  # one pass more or less over a batch changes the order of no sum, but matrix kernels may differ
        assert torch.allclose(sample(model, x[i : i + 1], plan, update=LML()), whole[i : i + 1], rtol=1e-12, atol=1e-12)
    assert torch.equal(sample(model, x, plan, update=LML()), whole)


def test_the_scheduler_runs_it_and_forgets_it_between_runs():
    model, x = DATA.model(VP), normal(2, 5)
    scheduler = samplers.LMLScheduler.from_config(SD, lml_damping=0.2, lml_kappa=0.3, grid="karras")
    scheduler.set_timesteps(6)
    expected = sample(model, x, scheduler.plan, update=LML(0.2, 0.3))
    for _ in range(2):
        y = x * scheduler.init_noise_sigma
        scheduler.set_timesteps(6)
        for t in scheduler.timesteps:
            y = scheduler.step(model(y, t), t, y, return_dict=False)[0]
        # timesteps are float32: the network sees a time that is rounded by up to 6e-8 of its size
        assert torch.allclose(y, expected, rtol=1e-4, atol=1e-4)
    again = samplers.LMLScheduler.from_config(scheduler.config)
    assert (again.config.lml_damping, again.config.lml_kappa) == (0.2, 0.3)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"damping": 0.0}, "positive number, got 0.0"),
        ({"damping": math.inf}, "positive number"),
        ({"kappa": 0.0}, "changes nothing but rounding"),
        ({"kappa": 1.5}, "got 1.5"),
    ],
)
def test_impossible_options_are_refused(options, match):
    with pytest.raises(FewstepError, match=match):
        LML(**options)
    with pytest.raises(FewstepError, match=match):
        samplers.LMLScheduler.from_config(SD, **{f"lml_{key}": v for key, v in options.items()})
