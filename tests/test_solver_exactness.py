"""Where every solver is exact: outputs that do not change, and starts from pure noise."""

from dataclasses import replace

import pytest
import torch

from fewstep.samplers import DDIM, Executor, Grid, Run
from tests.solver_fixtures import DETERMINISTIC, SCHEDULES, STOCHASTIC, grids, normal, raw_of


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("solver", [*DETERMINISTIC, *STOCHASTIC], ids=str)
def test_a_constant_output_is_solved_exactly(solver, name):
    """A.4: x0 and eps constant along the trajectory give alpha x0 + sigma eps. Stochastic rows: alpha x0 exactly."""
    schedule = SCHEDULES[name]
    x0, eps = normal(2, 3), normal(2, 3, seed=1)
    for lowering in (True, False):
        for n in (1, 2, 3, 20):
            for grid in grids(schedule, n):
                plan = replace(solver, lower_order_final=lowering).compile(schedule, grid)
                assert plan.problems() == []
                executor, run = Executor(plan), Run()
                used = torch.zeros_like(eps) if plan.has_noise else eps
                x = grid.alpha[0] * x0 + grid.sigma[0] * used
                largest = torch.maximum(x0.abs().max(), x.abs().max())
                for i in range(n):
                    alpha, sigma = grid.alpha[i], grid.sigma[i]
                    raw = raw_of(schedule, x0, used, alpha, sigma)
                    x = executor.advance(run, raw, x, noise=torch.zeros_like(x))
                    if plan.has_noise:
                        break  # eps is not constant any more: one step says all
                    largest = torch.maximum(largest, x.abs().max())
                i = run.i
                expected = grid.alpha[i] * x0 + (0 if plan.has_noise else grid.sigma[i] * used)
                # rounding of every step relative to the largest state (80 for EDM), times what a row's weights magnify;
                # explicit rows in the noise basis magnify it further where eps is computed from x0, by less than 100
                weights = plan.output.abs().sum(1).max().clamp(min=1)
                assert (x - expected).abs().max() <= 1e-13 * n * weights * largest


@pytest.mark.parametrize("name", ["zero-snr", "flow"])
@pytest.mark.parametrize("solver", [s for s in DETERMINISTIC if s.basis == "noise"], ids=str)
def test_noise_basis_methods_start_from_pure_noise_in_the_data_basis(solver, name):
    """At alpha = 0 the noise says nothing; the first row is DDIM's on x0, and no later row reads that output."""
    schedule = SCHEDULES[name]
    grid = Grid.uniform_t(schedule, 6, spacing="trailing")
    assert grid.alpha[0] == 0
    plan = solver.compile(schedule, grid)
    assert plan.basis == ("data", *["noise"] * 5)
    assert torch.equal(plan.output[0, :1], DDIM().compile(schedule, grid).output[0])
    assert all(plan.output[i, i] == 0 for i in range(1, min(6, plan.output.shape[1])))
