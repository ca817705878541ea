"""What learning starts from and has to beat: the solvers and grids that need no model to be chosen."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from fewstep.errors import FewstepError
from fewstep.samplers.grid import Grid
from fewstep.samplers.learn.fitting.runner import error
from fewstep.samplers.learn.teaching.problem import Problem
from fewstep.samplers.plan import SolverPlan
from fewstep.samplers.schedule import NoiseSchedule
from fewstep.samplers.solver import Solver
from fewstep.samplers.solvers.dpm_solver import DPMSolver
from fewstep.samplers.solvers.flow import FlowSolver
from fewstep.samplers.solvers.unipc import UniPC


@dataclass(frozen=True, eq=False)
class Untuned:
    """A solver on a grid, and its mean RMS error."""

    solver: Solver
    grid: Grid
    plan: SolverPlan
    error: float


def candidates(schedule: NoiseSchedule, nfe: int) -> Iterator[tuple[Solver, Grid, SolverPlan]]:
    """The usual solvers on the usual grids, as far as they exist for this model and number of calls."""
    solvers: list[Solver] = [DPMSolver(order=2), DPMSolver(order=3), UniPC(order=2), UniPC(order=3)]
    if schedule.family == "flow":
        solvers.append(FlowSolver(order=2))
    for name in ("uniform_lambda", "trailing", "linspace", "karras", "ays"):
        try:
            grid = Grid.named(name, schedule, nfe)
        except FewstepError:
            continue
        for solver in solvers:
            try:
                yield solver, grid, solver.compile(schedule, grid)
            except FewstepError:
                continue


def untuned(problem: Problem, nfe: int, *, samples: int = 16) -> list[Untuned]:
    """All candidates by their error on some of the problem's samples, the best first.

    Raises:
        FewstepError: a number of calls that no candidate can make, or NaN from all of them.
    """
    some = problem.take(slice(0, samples))
    found = [Untuned(s, g, p, float(error(p, some).mean())) for s, g, p in candidates(problem.schedule, nfe)]
    found = sorted((u for u in found if math.isfinite(u.error)), key=lambda u: u.error)
    if not found:
        raise FewstepError(
            f"no solver makes finite samples of this model in {nfe!r} calls; give a whole number of at least 1"
        )
    return found
