"""A learned plan as a solver, so that learning can go on from it: on another model, or with other numbers of its own."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch

from fewstep.errors import PlanError
from fewstep.samplers.grid import Grid
from fewstep.samplers.lagrange import Basis, Row, Variable, lagrange_row
from fewstep.samplers.plan import SolverPlan, plan_from_rows
from fewstep.samplers.scalar import value
from fewstep.samplers.schedule import NoiseSchedule
from fewstep.samplers.solver import Solver, checked, points_of


@dataclass(frozen=True)
class Mixture(Solver):
    """First-order steps whose output is a mixture of all outputs so far, and whose state may be scaled.

    shares[i] are those of row i, newest first, in units of the first-order row's weight; they add up to 1 where the row is
    consistent. They do not depend on the grid, so every plan of one basis and one state a row is one of these: :meth:`of`.
    """

    shares: tuple[tuple[float, ...], ...]
    factors: tuple[float, ...]
    """Of every row's state, in units of the first-order row's."""
    basis: Basis = "data"
    bases: ClassVar[tuple[Basis, ...]] = ("data", "noise", "velocity")

    def __str__(self) -> str:
        return f"Mixture({len(self.shares)} rows)"

    @property
    def convergence_order(self) -> int:
        return 1

    @property
    def consistent(self) -> bool:
        return all(f == 1 for f in self.factors) and all(abs(sum(row) - 1) < 1e-12 for row in self.shares)

    @staticmethod
    def of(plan: SolverPlan, schedule: NoiseSchedule) -> Mixture:
        """The mixture that makes the rows of ``plan`` on its own grid.

        Raises:
            PlanError: a plan that mixes bases or states.
        """
        if len(set(plan.basis)) > 1 or plan.state.shape[1] > 1 or plan.sample_shape:
            raise PlanError(f"plan {plan.method} mixes bases or states, so learning cannot go on from it")
        output = torch.nn.functional.pad(plan.output, (0, plan.steps))
        first = _first_order(plan.basis[0], grid_of(plan, schedule))
        rows = [[w / value(row.outputs[0]) for w in output[i, : i + 1].tolist()] for i, row in enumerate(first)]
        factors = [
            float(plan.state[i, 0]) / value(row.state) if value(row.state) else 1.0 for i, row in enumerate(first)
        ]
        return Mixture(tuple(tuple(row) for row in rows), tuple(factors), plan.basis[0])

    def compile(self, schedule: NoiseSchedule, grid: Grid) -> SolverPlan:
        points_of(schedule, grid)
        if grid.steps != len(self.shares):
            raise PlanError(f"{self} was given a grid of {grid.steps} steps")
        rows = [
            Row(first.state * factor, [first.outputs[0] * w for w in share])
            for first, factor, share in zip(_first_order(self.basis, grid), self.factors, self.shares, strict=True)
        ]
        bases: list[Basis] = [self.basis for _ in rows]
        plan = plan_from_rows(schedule, grid, bases, rows, method=str(self), order=1)
        return checked(plan, strict=self.consistent)


def _first_order(basis: Basis, grid: Grid) -> list[Row]:
    variable: Variable = "sigma" if basis == "velocity" else "lambda"
    points = grid.points()
    return [lagrange_row(basis, variable, [s], s, t) for s, t in pairwise(points)]


def grid_of(plan: SolverPlan, schedule: NoiseSchedule) -> Grid:
    """The grid of a plan of one call a row, with the times that its network is told."""
    lam = torch.log(plan.alpha) - torch.log(plan.sigma)
    return Grid(schedule.t(lam), lam, plan.model_time, schedule, plan.grid_name)
