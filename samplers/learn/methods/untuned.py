"""What learning starts from and has to beat: the solvers and grids that need no model to be chosen."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from fewstep.errors import FewstepError
from fewstep.samplers.grid import Grid, Terminal
from fewstep.samplers.learn.fitting.mixture import Mixture
from fewstep.samplers.learn.fitting.runner import error
from fewstep.samplers.learn.teaching.problem import Problem
from fewstep.samplers.plan import SolverPlan
from fewstep.samplers.schedule import NoiseSchedule
from fewstep.samplers.solver import Solver
from fewstep.samplers.solvers.deis import DEIS
from fewstep.samplers.solvers.dpm_solver import DPMSolver
from fewstep.samplers.solvers.flow import FlowSolver
from fewstep.samplers.solvers.ipndm import IPNDM
from fewstep.samplers.solvers.unipc import UniPC


@dataclass(frozen=True, eq=False)
class Untuned:
    """A solver on a grid, and its mean RMS error."""

    solver: Solver
    grid: Grid
    plan: SolverPlan
    error: float


USUAL: tuple[tuple[str, Terminal], ...] = tuple(
    (name, "zero") for name in ("uniform_lambda", "trailing", "linspace", "karras", "ays")
)
EARLY: tuple[tuple[str, Terminal], ...] = (
    ("karras(rho=5, low=0.05)", "zero"), ("exponential(low=0.1)", "zero"), ("beta", "zero"), ("beta", "sigma_min"),
    ("beta(a=0.8, b=0.8)", "sigma_min"), ("karras(rho=5)", "sigma_min"), ("trailing", "sigma_min"),
)  # fmt: skip
"""Grids that end before the noise does, which few calls are often better with."""
ROUNDS = ((1, 12), (2, 6), (6, 6))
"""(samples, candidates that go on) of :func:`shortlist`."""


def candidates(
    schedule: NoiseSchedule, nfe: int, solvers: Iterable[Solver], grids: Iterable[tuple[str, Terminal]]
) -> Iterator[Untuned]:
    """Solvers on grids, as far as they exist for this model and number of calls; their errors are not known yet."""
    for name, terminal in grids:
        try:
            grid = Grid.named(name, schedule, nfe, terminal=terminal)
        except FewstepError:
            continue
        for solver in solvers:
            try:
                yield Untuned(solver, grid, solver.compile(schedule, grid), math.nan)
            except FewstepError:
                continue


def untuned(problem: Problem, nfe: int, *, samples: int = 16) -> list[Untuned]:
    """The usual solvers on the usual grids by their error on some of the problem's samples, the best first.

    Raises:
        FewstepError: a number of calls that no candidate can make, or NaN from all of them.
    """
    solvers: list[Solver] = [DPMSolver(order=2), DPMSolver(order=3), UniPC(order=2), UniPC(order=3)]
    if problem.schedule.family == "flow":
        solvers.append(FlowSolver(order=2))
    found = list(candidates(problem.schedule, nfe, solvers, USUAL))
    return _ranked(found, problem.take(slice(0, samples)), nfe)


def shortlist(problem: Problem, nfe: int) -> list[Untuned]:
    """The best solvers on three different grids, out of more grids than the usual ones, the best first.

    All are tried on one sample, the better ones on more (successive halving, 1502.07943): a bad grid is seen to be one on any
    sample.

    Raises:
        FewstepError: as :func:`untuned`.
    """
    schedule = problem.schedule
    solvers: list[Solver] = [DPMSolver(order=2), UniPC(order=2), DEIS(order=3), IPNDM(order=3)]
    if schedule.family == "flow":
        solvers += [FlowSolver(order=2), FlowSolver(order=2, weights="equal")]
    alive = [u for u in candidates(schedule, nfe, solvers, (*USUAL, *EARLY)) if _is_mixture(u.plan, schedule)]
    for samples, count in ROUNDS:
        alive = _ranked(alive, problem.take(slice(0, samples)), nfe)[:count]
    on: dict[Grid, Untuned] = {}
    for one in alive:
        on.setdefault(one.grid, one)
    return list(on.values())[:3]


def _is_mixture(plan: SolverPlan, schedule: NoiseSchedule) -> bool:
    """Whether learning can go on from it."""
    try:
        Mixture.of(plan, schedule)
    except FewstepError:
        return False
    return True


def _ranked(found: Iterable[Untuned], problem: Problem, nfe: int) -> list[Untuned]:
    judged = [replace(u, error=float(error(u.plan, problem).mean())) for u in found]
    ranked = sorted((u for u in judged if math.isfinite(u.error)), key=lambda u: u.error)
    if not ranked:
        raise FewstepError(
            f"no solver makes finite samples of this model in {nfe!r} calls; give a whole number of at least 1"
        )
    return ranked
