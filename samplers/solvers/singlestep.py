"""Methods of several network calls a step, which forget everything between steps: singlestep and Runge-Kutta methods."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from fewstep.errors import FewstepError, unknown
from fewstep.samplers.forms import Form, plan_from_forms
from fewstep.samplers.grid import Grid, Point
from fewstep.samplers.lagrange import Basis, Row, lagrange_row
from fewstep.samplers.plan import SolverPlan
from fewstep.samplers.scalar import Scalar, stack
from fewstep.samplers.schedule import NoiseSchedule
from fewstep.samplers.solver import Solver, checked, points_of


@dataclass(frozen=True, eq=False)
class Stages(Grid):
    """All states of a plan with stages: a grid whose levels may repeat (Heun's method evaluates the end of its step)."""

    def __post_init__(self) -> None:
        pass  # noise does not have to fall from a stage to the next

    @staticmethod
    def of(grid: Grid, lam: Sequence[Scalar]) -> Stages:
        """States at ``lam``; where it is a level of ``grid`` the network is told what the grid says."""
        schedule, levels = grid.schedule, stack(list(lam))
        t = schedule.t(levels)
        known = {v: i for i, v in enumerate(grid.lam.tolist()[:-1])}
        at = [known.get(v, -1) for v in levels.tolist()[:-1]]
        told = grid.model_time[torch.tensor(at).clamp(min=0)]
        model_time = torch.where(torch.tensor(at) >= 0, told, schedule.model_time(t[:-1]))
        return Stages(t, levels, model_time, schedule, grid.name)


@dataclass(frozen=True)
class Singlestep(Solver):
    """Base of methods whose steps restart: a subclass says where the stages lie and what the rows of one step are.

    The grid counts network calls: N intervals are N calls, and a step of k calls spans k intervals. Its stages lie where
    the method puts them; the points between serve only methods that say so. Steps from or to an infinite lambda that
    the method cannot make are split into a first-order step and the rest.
    """

    basis: Basis = field(default="data", kw_only=True)
    """Which converted output the rows combine."""

    bases: ClassVar[tuple[Basis, ...]] = ("data", "noise")

    def __post_init__(self) -> None:
        if self.basis not in self.bases:
            raise FewstepError(unknown(f"basis of {type(self).__name__}", self.basis, self.bases))

    @abstractmethod
    def sequence(self, calls: int) -> list[int]:
        """How ``calls`` network calls are shared among the steps, each entry the calls of one."""

    @abstractmethod
    def stages(self, s: Point, t: Point, between: Sequence[Point]) -> list[Scalar]:
        """lambda of the inner stages of the step s -> t, one for each point of the grid ``between``."""

    @abstractmethod
    def rows(self, s: Point, t: Point, inner: Sequence[Point]) -> list[Row]:
        """The rows that lead to each of ``inner`` and to t; row k reads the outputs at inner[k-1], ..., s.

        All start from s, or each from the stage before it where :attr:`chained`.
        """

    @abstractmethod
    def fits(self, s: Point, t: Point, calls: int) -> bool:
        """Whether a step of more than one call can be made from s to t, of which one may lie at infinite lambda."""

    @property
    def chained(self) -> bool:
        """Whether a row starts from the newest stage in place of the step's first state."""
        return False

    @property
    @abstractmethod
    def convergence_order(self) -> int:
        """p with a global error of O(h^p) where every step has the full number of calls."""

    def calls(self, points: Sequence[Point]) -> list[int]:
        """Network calls of every step: :meth:`sequence`, with first-order steps at ends where nothing else is possible."""
        counts = self.sequence(len(points) - 1)
        if counts[0] > 1 and not self.fits(points[0], points[counts[0]], counts[0]):
            counts[:1] = [1, counts[0] - 1]
        if counts[-1] > 1 and not self.fits(points[-1 - counts[-1]], points[-1], counts[-1]):
            counts[-1:] = [counts[-1] - 1, 1]
        return counts

    def compile(self, schedule: NoiseSchedule, grid: Grid) -> SolverPlan:
        points = points_of(schedule, grid)
        counts, lam, at = self.calls(points), [], 0
        for n in counts:
            lam += [points[at].lam, *self.stages(points[at], points[at + n], points[at + 1 : at + n])]
            at += n
        states = Stages.of(grid, [*lam, points[-1].lam])
        forms, noise = self._forms(states.points(), counts)
        basis: list[Basis] = [self.basis] * grid.steps
        if self._starts_at_pure_noise(points[0]):
            basis[0] = "data"
        return checked(
            plan_from_forms(schedule, states, basis, forms, noise=noise, method=str(self), order=self.convergence_order)
        )

    def _forms(self, states: Sequence[Point], counts: Sequence[int]) -> tuple[list[Form], list[Scalar]]:
        forms, noise, first = [], [], 0
        for n in counts:
            s, inner, t = states[first], states[first + 1 : first + n], states[first + n]
            noise_only = self._starts_at_pure_noise(s)
            rows = [lagrange_row("data", "lambda", [s], s, t)] if noise_only else self.rows(s, t, inner)
            for k, row in enumerate(rows):
                outputs = {first + k - j: w for j, w in enumerate(row.outputs)}
                forms.append(Form({first + k if self.chained else first: row.state}, outputs))
                noise.append(row.noise)
            first += n
        return forms, noise

    def _starts_at_pure_noise(self, s: Point) -> bool:
        """At alpha = 0 only x0 says where to go; the step is of first order and the noise basis begins after it."""
        return self.basis == "noise" and s.pure_noise
