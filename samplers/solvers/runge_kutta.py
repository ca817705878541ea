"""Runge-Kutta methods in the variable in which the trajectory is straight: rho (DEIS rho-RK, EDM's Heun) or a flow's sigma."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

from fewstep.errors import FewstepError, unknown
from fewstep.samplers.grid import Grid, Point
from fewstep.samplers.lagrange import Basis, Row, linear_part
from fewstep.samplers.plan import SolverPlan
from fewstep.samplers.scalar import Scalar, log, value
from fewstep.samplers.schedule import NoiseSchedule
from fewstep.samplers.solvers.singlestep import Singlestep


class Tableau(NamedTuple):
    """An explicit Butcher tableau: ``a`` holds the weights of the inner stages, ``b`` those of the step."""

    order: int
    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]

    @property
    def c(self) -> tuple[float, ...]:
        """Where the inner stages lie, as shares of the step."""
        return tuple(math.fsum(row) for row in self.a)


TABLEAUS: dict[str, Tableau] = {
    "euler": Tableau(1, (), (1.0,)),
    "midpoint": Tableau(2, ((1 / 2,),), (0.0, 1.0)),
    "heun": Tableau(2, ((1.0,),), (1 / 2, 1 / 2)),
    "ralston": Tableau(2, ((2 / 3,),), (1 / 4, 3 / 4)),
    "kutta3": Tableau(3, ((1 / 2,), (-1.0, 2.0)), (1 / 6, 4 / 6, 1 / 6)),
    "heun3": Tableau(3, ((1 / 3,), (0.0, 2 / 3)), (1 / 4, 0.0, 3 / 4)),
    "ralston3": Tableau(3, ((1 / 2,), (0.0, 3 / 4)), (2 / 9, 3 / 9, 4 / 9)),
    "houwen3": Tableau(3, ((8 / 15,), (1 / 4, 5 / 12)), (1 / 4, 0.0, 3 / 4)),
    "ssp3": Tableau(3, ((1.0,), (1 / 4, 1 / 4)), (1 / 6, 1 / 6, 4 / 6)),
    "rk4": Tableau(4, ((1 / 2,), (0.0, 1 / 2), (0.0, 0.0, 1.0)), (1 / 6, 2 / 6, 2 / 6, 1 / 6)),
}
"""DEIS calls them 1euler, 2heun, 3kutta, 3heun, 3ral, 3vdh (houwen3), 3ssprk (ssp3) and 4rk."""
_REST = {1: "euler", 2: "midpoint", 3: "heun3"}
"""What a rest of fewer calls is made with; none of these evaluates the end of its step."""


@dataclass(frozen=True)
class RungeKutta(Singlestep):
    """An explicit Runge-Kutta method with k calls a step, in rho (noise basis) or sigma (velocity basis, flows only).

        noise     d(x/alpha) / d rho = eps      x_t = (alpha_t/alpha_s) x_s + alpha_t (rho_t - rho_s) sum_j b_j eps_j
        velocity  dx / d sigma = eps - x0       x_t = x_s + (sigma_t - sigma_s) sum_j b_j u_j

    and the same with the rows of ``a`` for the stages. In rho, ``heun`` is EDM's deterministic sampler (2206.00364,
    algorithm 1) and its namesakes are DEIS rho-RK; in sigma it is diffusers' FlowMatchHeun. Calls that do not make a whole
    step at the end go to a step of as many calls (midpoint, Heun's third-order method). A method that evaluates the end
    of its step cannot do so at sigma = 0; its last step is then split, which for ``heun`` leaves Euler's method there.

    Source: Fast Sampling of Diffusion Models with Exponential Integrator, 2204.13902, section 4 (rho-RK-DEIS).
    """

    method: str = "heun"
    basis: Basis = field(default="noise", kw_only=True)
    euler_below: int = 0
    """On grids of fewer calls than this, Euler's method: strong guidance throws a stage at the end of a long step far off."""
    bases: ClassVar[tuple[Basis, ...]] = ("noise", "velocity")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method not in TABLEAUS:
            raise FewstepError(unknown("Runge-Kutta method", self.method, TABLEAUS))

    @property
    def convergence_order(self) -> int:
        return TABLEAUS[self.method].order

    def compile(self, schedule: NoiseSchedule, grid: Grid) -> SolverPlan:
        if self.basis == "velocity" and schedule.family != "flow":
            raise FewstepError(
                f"the velocity basis is for flow models, this one is {schedule.family}; take basis='noise'"
            )
        return super().compile(schedule, grid)

    def _tableau(self, calls: int) -> Tableau:
        own = TABLEAUS[self.method]
        return own if calls == len(own.b) else TABLEAUS[_REST[calls]]

    def sequence(self, calls: int) -> list[int]:
        k = len(TABLEAUS[self.method].b) if calls >= self.euler_below else 1
        return [k] * (calls // k) + [calls % k] * (calls % k > 0)

    def stages(self, s: Point, t: Point, between: Sequence[Point]) -> list[Scalar]:
        return [self._between(s, t, c) for c in self._tableau(len(between) + 1).c]

    def _between(self, s: Point, t: Point, c: float) -> Scalar:
        if c == 1:
            return t.lam
        if self.basis == "noise":
            return -log(s.rho + c * (t.rho - s.rho))
        sigma = s.sigma + c * (t.sigma - s.sigma)
        return log((1 - sigma) / sigma)

    def fits(self, s: Point, t: Point, calls: int) -> bool:
        starts = self.basis == "velocity" or math.isfinite(value(s.lam))
        return starts and (math.isfinite(value(t.lam)) or max(self._tableau(calls).c) < 1)

    def rows(self, s: Point, t: Point, inner: Sequence[Point]) -> list[Row]:
        a, b = self._tableau(len(inner) + 1)[1:]
        step = t.rho - s.rho if self.basis == "noise" else t.sigma - s.sigma
        rows = []
        for end, weights in zip([*inner, t], [*a, b], strict=True):
            scale = end.alpha * step if self.basis == "noise" else step
            rows.append(Row(linear_part(self.basis, s, end), [scale * w for w in reversed(weights)]))
        return rows
