"""Solvers of flow models in the velocity basis: Adams-Bashforth and FlowTurbo."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from fewstep.errors import FewstepError, GridError, unknown
from fewstep.samplers.forms import Form, combine, plan_from_forms
from fewstep.samplers.grid import Grid, Point
from fewstep.samplers.lagrange import Basis, Row, lagrange_row
from fewstep.samplers.plan import SolverPlan
from fewstep.samplers.schedule import NoiseSchedule
from fewstep.samplers.solver import Multistep, Solver, checked, points_of
from fewstep.samplers.solvers.ipndm import EQUAL_STEPS
from fewstep.samplers.solvers.singlestep import Stages


def check_flow(schedule: NoiseSchedule) -> None:
    """Raise unless ``schedule`` is one of flow matching, where x moves along the velocity eps - x0 in sigma."""
    if schedule.family != "flow":
        raise FewstepError(f"the velocity basis is for flow models, this schedule's family is {schedule.family}")


@dataclass(frozen=True)
class FlowSolver(Multistep):
    """x_t = x_s + (sigma_t - sigma_s) sum_j w_j u_j, Adams-Bashforth on the velocity u = eps - x0; flow models only.

    ``weights`` says which steps the weights are those of:

        variable   the steps as they are: exact for velocities polynomial in sigma
        equal      fixed weights, as "adam2" and "adam4" are published; of the full order on even grids only, of order 2 at
                   most where steps change smoothly, else of order 1

    Order 1 is Euler's method, which is DDIM. sigma = 1 and sigma = 0 are points like others here, so no order is lost there.

    Source: Adams-Bashforth, as a baseline in Differentiable Solver Search, 2505.21114, section 4.
    """

    weights: Literal["variable", "equal"] = "variable"
    lower_order_final: bool = False
    basis: Basis = "velocity"
    max_order: ClassVar[int] = 4
    bases: ClassVar[tuple[Basis, ...]] = ("velocity",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weights not in ("variable", "equal"):
            raise FewstepError(unknown("weights of FlowSolver", self.weights, ("variable", "equal")))

    def orders(self, grid: Grid) -> list[int]:
        n = grid.steps
        lowering = self.lower_order_final and (self.lower_order_below is None or n < self.lower_order_below)
        orders = [min(self.order, i + 1, n - i if lowering else n) for i in range(n)]
        return [*orders[:-1], 1] if self.euler_at_final else orders

    @property
    def convergence_order(self) -> int:
        """On grids whose steps change smoothly."""
        return self.order if self.weights == "variable" else min(self.order, 2)

    def on(self, schedule: NoiseSchedule) -> Multistep:
        check_flow(schedule)
        return self

    def row(self, s: Point, t: Point, past: Sequence[Point]) -> Row:
        if self.weights == "variable":
            return lagrange_row("velocity", "sigma", past, s, t)
        return Row(1.0, [(t.sigma - s.sigma) * w for w in EQUAL_STEPS[len(past)]])


@dataclass(frozen=True)
class FlowTurbo(Solver):
    """FlowTurbo's Heun steps, then its pseudo-corrector steps, without the refiner network; flow models only.

        H   predict x' = x + D u(x), then x = x + D/2 (u(x) + u(x')): two calls
        P   the same with u(x) replaced by the velocity at the last prediction: one call

    A prediction after H or P is, seen from the last prediction, x' + (D_next + D/2) u(x') - D/2 u_before: on even grids
    Adams-Bashforth of order 2 on the predicted states, whose corrections cancel but for the last. That one needs the
    velocity at the end point, so it is made only with ``correct_end``, which needs a network that is meant to be called
    there.

    The grid counts calls: H spans two intervals but for the last one, whose second call is where the first P begins. One H
    therefore costs as much as none, and ``heun=1`` is the least.

    Source: FlowTurbo, 2409.18128, section 3.2.
    """

    heun: int = 1
    """Number of H steps; the rest of the grid is P."""
    correct_end: bool = False
    bases: ClassVar[tuple[Basis, ...]] = ("velocity",)

    def __post_init__(self) -> None:
        if type(self.heun) is not int or self.heun < 1:
            raise FewstepError(f"FlowTurbo begins with at least one Heun step, got heun={self.heun!r}")

    @property
    def convergence_order(self) -> int:
        return 2

    def compile(self, schedule: NoiseSchedule, grid: Grid) -> SolverPlan:
        check_flow(schedule)
        points = points_of(schedule, grid)
        whole = 2 * (self.heun - 1)
        least = whole + 1 + self.correct_end
        if grid.steps < least:
            raise GridError(f"{self} needs at least {least} network calls, this grid has {grid.steps}")
        # every call's level: begin and end of the H steps but the last, then the points of the rest
        rest = points[whole:]
        if self.correct_end:  # the last interval's two are one, its call is made at the end
            rest = [*rest[:-2], rest[-1]]
        lam = [p.lam for i in range(0, whole, 2) for p in (points[i], points[i + 2])] + [p.lam for p in rest]
        states = Stages.of(grid, [*lam, points[-1].lam] if self.correct_end else lam)
        sigma = [p.sigma for p in states.points()]
        forms: list[Form] = []
        for i in range(grid.steps):
            now, before = Form.output(i), Form.output(i - 1)
            step = sigma[i + 1] - sigma[i]
            if i < whole and i % 2:
                half = (sigma[i] - sigma[i - 1]) / 2
                forms.append(combine([(1.0, Form.state(i - 1)), (half, now), (half, before)]))
            elif i <= whole:
                forms.append(combine([(1.0, Form.state(i)), (step, now)]))
            else:
                half = (sigma[i] - sigma[i - 1]) / 2
                forms.append(combine([(1.0, Form.state(i)), (step + half, now), (-half, before)]))
        basis: list[Basis] = ["velocity"] * grid.steps
        return checked(plan_from_forms(schedule, states, basis, forms, method=str(self), order=self.convergence_order))
