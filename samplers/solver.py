"""What a solver is: a frozen value that compiles a noise schedule and a grid into a plan."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import ClassVar

from fewstep.errors import FewstepError, GridError, unknown
from fewstep.samplers.forms import Form, direction, plan_from_forms, predict_correct
from fewstep.samplers.grid import Grid, Point
from fewstep.samplers.lagrange import Basis, Row, lagrange_row
from fewstep.samplers.plan import SolverPlan, plan_from_rows
from fewstep.samplers.schedule import NoiseSchedule


@dataclass(frozen=True)
class Solver(ABC):
    """A sampling method with its options. Hashable, immutable, without run state."""

    bases: ClassVar[tuple[Basis, ...]]
    """The converted outputs that its rows can combine."""

    @property
    @abstractmethod
    def convergence_order(self) -> int:
        """p with a global error of O(h^p); the methods say on which grids."""

    @abstractmethod
    def compile(self, schedule: NoiseSchedule, grid: Grid) -> SolverPlan:
        """The plan of this method on ``grid``; validated unless it is being differentiated.

        Raises:
            FewstepError: the method cannot run on this grid or this family; the message says what can.
        """

    @property
    def consistent(self) -> bool:
        """Whether every row is exact when x0 and eps do not change; some published formulas are not."""
        return True

    def __str__(self) -> str:
        """The name and the options that differ from their defaults."""
        changed = [(f.name, getattr(self, f.name)) for f in fields(self) if getattr(self, f.name) != f.default]
        options = [f"{name}={v if isinstance(v, Solver) else repr(v)}" for name, v in changed]
        return f"{type(self).__name__}({', '.join(options)})"


@dataclass(frozen=True)
class Multistep(Solver):
    """Base of methods that call the network once an interval and reuse past outputs: a subclass is one :meth:`row`.

    Orders warm up (1, 2, ..., order) and, where asked, come down again at the end. A step from or to an infinite lambda
    (flow time 1, zero terminal SNR, sigma = 0) is of first order, because interpolation in lambda has no meaning there.
    """

    order: int = 2
    lower_order_final: bool = True
    """Come down to first order at the end, by one a step."""
    lower_order_below: int | None = 15
    """Do that only on grids of fewer steps than this (diffusers' rule for all but UniPC); None: always."""
    euler_at_final: bool = False
    """Make just the last step first order."""
    basis: Basis = "data"
    """Which converted output the rows combine: x0 (data) or eps (noise)."""

    max_order: ClassVar[int] = 3
    bases: ClassVar[tuple[Basis, ...]] = ("data", "noise")

    def __post_init__(self) -> None:
        if self.basis not in self.bases:
            raise FewstepError(unknown(f"basis of {type(self).__name__}", self.basis, self.bases))
        if type(self.order) is not int or not 1 <= self.order <= self.max_order:
            raise FewstepError(f"{type(self).__name__} has orders 1 to {self.max_order}, got order={self.order!r}")

    @abstractmethod
    def row(self, s: Point, t: Point, past: Sequence[Point]) -> Row:
        """The step from ``s`` to ``t``; ``past`` holds the nodes to use, ``past[0]`` being s, as many as the order."""

    def orders(self, grid: Grid) -> list[int]:
        """The order of every step."""
        n, lam = grid.steps, grid.lam.tolist()
        lowering = self.lower_order_final and (self.lower_order_below is None or n < self.lower_order_below)
        result = []
        for i in range(n):
            p = min(self.order, i + 1)
            if lowering:
                p = min(p, n - i)
            if (
                (self.euler_at_final and i == n - 1)
                or math.isinf(lam[i])
                or (math.isinf(lam[i + 1]) and self.in_lambda)
            ):
                p = 1
            result.append(p)
        return result

    @property
    def in_lambda(self) -> bool:
        """Whether past outputs are interpolated in lambda, which has no place for sigma = 0."""
        return True

    def on(self, schedule: NoiseSchedule) -> Multistep:
        """This method with what its rows need to know of ``schedule`` beside the points: most need nothing."""
        del schedule
        return self

    def rows(self, points: Sequence[Point], orders: Sequence[int]) -> list[Row]:
        """All rows; ``orders[i]`` outputs are read by row i."""
        rows = []
        for i, p in enumerate(orders):
            s, t, past = points[i], points[i + 1], [points[i - k] for k in range(p)]
            first = i == 0 and self._starts_at_pure_noise(points)
            rows.append(lagrange_row("data", "lambda", past, s, t) if first else self.row(s, t, past))
        return rows

    def correctors(self, points: Sequence[Point], orders: Sequence[int]) -> list[Row | None]:
        """For every step the row that corrects its start: the interval before once more, now with the output at its end.

        Entry i is for the interval i-1 -> i; its outputs are those at i, i-1, ...; None where nothing is corrected.
        """
        del points
        return [None] * len(orders)

    def output_bases(self, points: Sequence[Point]) -> list[Basis]:
        """The basis of every output."""
        bases: list[Basis] = [self.basis] * (len(points) - 1)
        if self._starts_at_pure_noise(points):
            bases[0] = "data"
        return bases

    def _starts_at_pure_noise(self, points: Sequence[Point]) -> bool:
        """At alpha = 0 eps says nothing about where to go but x0 does, so a noise-basis method takes its first step there.

        No later row reads that output: a node at lambda = -inf carries no weight.
        """
        return self.basis == "noise" and points[0].pure_noise

    @property
    def convergence_order(self) -> int:
        """p with a global error of O(h^p) on smooth outputs, given starting steps that are as accurate."""
        return self.order

    def compile(self, schedule: NoiseSchedule, grid: Grid) -> SolverPlan:
        points = points_of(schedule, grid)
        orders, method = self.orders(grid), self.on(schedule)
        rows, correctors = method.rows(points, orders), method.correctors(points, orders)
        bases = self.output_bases(points)
        name, order = str(self), self.convergence_order
        if any(correctors):
            outputs = [Form.output(i) for i in range(len(rows))]
            forms = predict_correct(
                [row.state for row in rows],
                [direction(row, outputs[i::-1]) for i, row in enumerate(rows)],
                [None if row is None else direction(row, outputs[i::-1]) for i, row in enumerate(correctors)],
            )
            noise = [row.noise for row in rows]
            plan = plan_from_forms(schedule, grid, bases, forms, noise=noise, method=name, order=order)
        else:
            plan = plan_from_rows(schedule, grid, bases, rows, method=name, order=order)
        return checked(plan, strict=self.consistent)


def points_of(schedule: NoiseSchedule, grid: Grid) -> list[Point]:
    """The grid's points; raises :class:`GridError` if it was made for another schedule."""
    if grid.schedule != schedule:
        raise GridError(f"this grid was made for {grid.schedule.identity()}, not for {schedule.identity()}")
    return grid.points()


def checked(plan: SolverPlan, *, strict: bool = True) -> SolverPlan:
    """``plan``, validated unless it is being differentiated; see :meth:`SolverPlan.validate` for ``strict``."""
    return plan if plan.requires_grad else plan.validate(strict=strict)
