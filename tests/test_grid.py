"""Grids: given values are taken as they are, tails and points, near-duplicates, gradients."""

import math
import random

import pytest
import torch

from fewstep.errors import GridError
from fewstep.samplers import DEIS, DPMSolver, Grid, UniPC
from fewstep.samplers.schedule import EDM, DiscreteVP, Flow, f64
from tests.grid_fixtures import SCHEDULES, VP, ZERO_SNR


# -- given values ------------------------------------------------------------------------------------------------------
def test_sigmas_are_taken_as_they_are_and_never_shifted():
    assert Grid.sigmas(Flow(shift=3.0), [1.0, 0.5, 0.25]).noise_levels.tolist() == pytest.approx([1.0, 0.5, 0.25, 0.0])
    assert Grid.sigmas(EDM(), [3.0, 1.0, 0.0]).steps == 2, "a list that ends at 0 gets no further end"


def test_timesteps_are_taken_as_they_are():
    grid = Grid.timesteps(VP, [999, 500.5, 1])
    assert grid.model_time.tolist() == [999.0, 500.5, 1.0]
    mean = (VP.log_rho[500] + VP.log_rho[501]) / 2
    assert grid.lam[1].item() == pytest.approx(-mean.item(), rel=1e-14)
    assert Grid.timesteps(Flow(), [1000, 250]).noise_levels.tolist() == pytest.approx([1.0, 0.25, 0.0])


@pytest.mark.parametrize("name", SCHEDULES)
def test_ends_that_float32_rounded_beyond_the_range_are_its_ends(name):
    schedule = SCHEDULES[name]
    hi = schedule.model_time(f64([schedule.t_range[0]]))
    given = torch.nextafter(hi.float(), torch.tensor(math.inf)).double()
    grid = Grid.timesteps(schedule, given)
    assert grid.lam[0] == Grid.timesteps(schedule, hi).lam[0]
    assert torch.equal(grid.model_time, given)


def test_zero_snr_grid_starts_at_pure_noise():
    grid = Grid.uniform_t(ZERO_SNR, 5)
    assert grid.alpha[0] == 0
    assert grid.sigma[0] == 1
    assert grid.lam[1:].isfinite()[:-1].all()


# -- tail, order, text -------------------------------------------------------------------------------------------------
def test_tail_is_the_end_of_the_grid():
    grid = Grid.karras(VP, 6)
    tail = grid.tail(2)
    assert tail.steps == 4
    assert torch.equal(tail.lam, grid.lam[2:])
    assert torch.equal(tail.model_time, grid.model_time[2:])
    assert torch.equal(grid.tail(0).lam, grid.lam)
    for begin in (-1, 6, 7):
        with pytest.raises(GridError, match=f"begin index {begin}"):
            grid.tail(begin)


def test_a_grid_is_a_sequence_of_points():
    grid = Grid.karras(VP, 3)
    points = list(grid)
    assert len(grid) == 3
    assert len(points) == 4
    for i, p in enumerate(points):
        assert p.lam == grid.lam[i]
        assert p.alpha == grid.alpha[i]
        assert p.sigma == grid.sigma[i]
        assert p.rho == pytest.approx(grid.noise_levels[i].item(), rel=1e-12)
    assert len(str(grid).splitlines()) == 5


# -- near-duplicates ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("seed", range(5))
def test_near_duplicates_give_finite_coefficients_and_duplicates_are_refused(name, seed):
    """Random lambdas, some of them 1e-6 apart: the compiler's own check of every row must still hold."""
    schedule = SCHEDULES[name]
    rng = random.Random(seed)
    low, high = -4.0, 4.5
    lam = sorted(rng.uniform(low, high) for _ in range(6))
    lam = sorted([*lam, *(x + 1e-6 for x in rng.sample(lam, 3))])
    grid = Grid.lambdas(schedule, [*lam, math.inf])
    for solver in (
        DPMSolver(order=2), DPMSolver(order=3), DPMSolver(order=2, solver_type="heun", eta=1.0), UniPC(order=3),
        UniPC(order=2, solver_type="bh1", basis="noise"), DEIS(order=3), DEIS(order=3, variable="rho"),
    ):  # fmt: skip
        plan = solver.compile(schedule, grid)
        assert plan.output.isfinite().all()
        assert plan.problems() == []
    i = rng.randrange(len(lam))
    with pytest.raises(GridError, match=f"repeats at index {i + 1}"):
        Grid.lambdas(schedule, [*lam[: i + 1], *lam[i:]])


def test_gradients_reach_the_lambdas_of_a_grid():
    lam = f64([-2.0, 0.0, 2.0]).requires_grad_()
    for schedule in SCHEDULES.values():
        grid = Grid.lambdas(schedule, lam)
        (gradient,) = torch.autograd.grad(grid.model_time.sum() + grid.alpha.sum() + grid.sigma.sum(), lam)
        assert gradient.isfinite().all()
        assert (gradient != 0).all() or isinstance(schedule, DiscreteVP)
