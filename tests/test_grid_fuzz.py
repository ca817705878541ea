"""Every builder on random grids: plans are finite and sound whatever the spacing, the ends and the number of steps."""

import math
import random

import pytest
import torch

from fewstep.errors import FewstepError, GridError
from fewstep.samplers import Executor, Grid, Run
from fewstep.samplers.capabilities import CAPABILITIES
from tests.solver_fixtures import SCHEDULES, VP, in_threads

NAMES = ("vp", "vp-v", "zero-snr", "edm", "flow")
BUILDERS = {c.name: c for c in CAPABILITIES if c.families}
"""Those for given x_0 and noise; mean-reverting methods have schedules of their own."""
UNSOUND = ("EMS", "AcceleratedDDIM", "AcceleratedDDPM", "NeuralSolver")
"""Coefficients from statistics, Taylor polynomials or learning: a constant x0 and eps are no fixed point of theirs."""
REFUSE_PURE_NOISE = ("AcceleratedDDIM", "AcceleratedDDPM")


def random_grid(schedule, rng, n):
    """n steps at random lambdas, a third of the points 1e-6 behind another; ends at sigma = 0 or alpha = 0 half of the time."""
    noisiest, high = schedule.lam(torch.tensor(schedule.t_range, dtype=torch.float64)).tolist()
    low = max(noisiest, -4.0)
    lam = [rng.uniform(low, high) for _ in range(n + 1)]
    for i in rng.sample(range(1, n + 1), n // 3):
        lam[i] = lam[i - 1] + 1e-6
    lam = sorted(set(lam))
    if rng.random() < 0.5:
        lam[-1] = math.inf
    if math.isinf(noisiest) and rng.random() < 0.5 and (n > 1 or math.isfinite(lam[-1])):
        lam[0] = -math.inf
    return Grid.lambdas(schedule, lam)


def steps_of(capability, rng):
    return rng.choice(capability.steps) if capability.steps else rng.choice([1, 2, 3, rng.randint(4, 60)])


def compile_unless_restart_is_out_of_reach(builder, solver, schedule, grid):
    """The plan; None where no level of this grid is near to what a Restart interval names."""
    try:
        return solver.compile(schedule, grid)
    except GridError as error:
        if builder != "Restart" or "a restart " not in str(error):
            raise
        return None


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("builder", BUILDERS)
def test_random_grids_give_finite_and_sound_plans(builder, name):
    capability, schedule = BUILDERS[builder], SCHEDULES[name]
    if schedule.family not in capability.families:
        with pytest.raises(FewstepError):
            capability.variants[0].compile(schedule, Grid.karras(schedule, 5))
        return
    rng = random.Random(f"{builder} {name}")
    for solver in capability.variants:
        compiled = 0
        for _ in range(3):
            grid = random_grid(schedule, rng, steps_of(capability, rng))
            where = f"{solver} on {grid.lam.tolist()}"
            if builder in REFUSE_PURE_NOISE and math.isinf(grid.lam[0]):
                with pytest.raises(FewstepError, match="alpha = 0"):
                    solver.compile(schedule, grid)
                continue
            plan = compile_unless_restart_is_out_of_reach(builder, solver, schedule, grid)
            if plan is None:
                continue
            compiled += 1
            for array in ("state", "output", "noise", "constant", "model_time", "in_scale"):
                assert getattr(plan, array).isfinite().all(), f"{array}: {where}"
            found = plan.validate(strict=False).problems()
            assert found == [] or builder in UNSOUND, where
            assert plan.alpha[-1] == grid.alpha[-1], where
            assert plan.sigma[-1] == grid.sigma[-1], where
            assert plan.nfe <= 4 * grid.steps or plan.has_noise, where
        assert compiled > 0 or builder in (*REFUSE_PURE_NOISE, "Restart")


@pytest.mark.parametrize("builder", BUILDERS)
def test_eight_threads_share_a_plan(builder):
    """Every thread runs its own state through one executor; results are those of the runs one after the other, bit by bit."""
    capability = BUILDERS[builder]
    name = "vp" if "vp" in capability.families else "flow"
    schedule = SCHEDULES[name]
    grid = Grid.karras(schedule, capability.steps[0] if capability.steps else 7, terminal="sigma_min")
    executor = Executor(capability.variants[-1].compile(schedule, grid))

    def work(seed):
        generator, run = torch.Generator().manual_seed(seed), Run()
        x = torch.randn(2, 3, generator=generator, dtype=torch.float64)
        for _ in executor.calls:
            x = executor.advance(run, torch.tanh(x), x, generator=generator)
        return x

    serial = [work(seed) for seed in range(8)]
    assert all(torch.equal(a, b) for a, b in zip(in_threads(work, 8), serial, strict=True))
    assert not torch.equal(serial[0], serial[1])


DIFFERENTIABLE = ("HeavyBall", "GHVB", "DCSolver", "USF", "AcceleratedDDIM", "AcceleratedDDPM")


@pytest.mark.parametrize("builder", DIFFERENTIABLE)
def test_coefficients_have_the_gradient_of_their_differences(builder):
    """d/dlambda of a weighted sum of a plan's numbers against central differences, off by h^2 = 1e-10 of a third derivative."""
    lam = torch.linspace(-2.0, 2.0, 8, dtype=torch.float64) + 0.1 * torch.tensor([0, 1, -1, 1, 0, 1, -1, 0]).double()

    def total(lam, solver):
        plan = solver.compile(VP, Grid.lambdas(VP, lam))
        parts = (plan.state, plan.output, plan.noise)
        return sum((v * torch.linspace(1, 2, v.numel(), dtype=torch.float64).reshape(v.shape)).sum() for v in parts)

    for solver in BUILDERS[builder].variants[-2:]:
        at = lam.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(total(at, solver), at)
        for i in range(len(lam)):
            h = torch.zeros_like(lam)
            h[i] = 1e-5
            difference = float(total(lam + h, solver) - total(lam - h, solver)) / 2e-5
            assert float(gradient[i]) == pytest.approx(difference, rel=1e-5, abs=1e-5)


def test_exact_duplicates_are_refused_for_every_builder_by_the_grid():
    with pytest.raises(FewstepError, match="repeats at index 2"):
        Grid.lambdas(VP, [-1.0, 0.5, 0.5, 2.0])
