"""DPM-Solver and DPM-Solver++, multistep and singlestep, and the SDE version of the latter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal

from fewstep.errors import FewstepError, unknown
from fewstep.samplers.grid import Point
from fewstep.samplers.lagrange import Basis, Row, lagrange_row
from fewstep.samplers.scalar import Scalar, expm1, sqrt, value
from fewstep.samplers.solver import Multistep
from fewstep.samplers.solvers.singlestep import Singlestep

SolverType = Literal["midpoint", "heun"]
ThirdOrder = Literal["exact", "as_published", "diffusers_sde"]


def secant_row(first: Row, half: Scalar, s: Point, t: Point, older: Point) -> Row:
    """A first-order row corrected by ``half`` times the secant slope (m0 - m1) h / h0.

    It is what second-order methods use that do not integrate the linear polynomial exactly (DPM-Solver's midpoint,
    UniP-2). Where the older node lies at lambda = -inf the slope is 0 and the row stays first order.
    """
    slope = half * (t.lam - s.lam) / (s.lam - older.lam)
    return Row(first.state, [first.outputs[0] + slope, -slope], first.noise)


@dataclass(frozen=True)
class DPMSolver(Multistep):
    """DPM-Solver++ (data basis) and DPM-Solver (noise basis), multistep of orders 1 to 3.

    With h = lambda_t - lambda_s, D1 = (m0 - m1) h / h0 the slope, and J_k the exponential moments:

        2M midpoint   x_t = (sigma_t/sigma_s) x + alpha_t J_0 (m0 + D1/2)
        2M heun       x_t = (sigma_t/sigma_s) x + alpha_t (J_0 m0 + J_1 D1/h)          = Lagrange through {s0, s1}
        3M exact      Lagrange through {s0, s1, s2} in lambda                          = UniP-3
        3M published  the same with half the quadratic term, as in the authors' code, diffusers and k-diffusion: their
                      D2 is half of the second derivative that its coefficient expects, so a step is as accurate as 2M's
        3M diffusers_sde  diffusers' ``sde-dpmsolver++``: that half, and the quadratic coefficient too small by 1, so that a
                      step is less accurate than 2M's

    ``eta`` = 1 solves the reverse SDE (diffusers' ``sde-dpmsolver++``), 0 the ODE; the data basis only. The noise basis
    has the same forms with alpha and sigma exchanged and tends to be unstable under strong guidance.

    Sources: DPM-Solver, 2206.00927, appendix; DPM-Solver++, 2211.01095, algorithm 2 and section 5.
    """

    solver_type: SolverType = "midpoint"
    third_order: ThirdOrder = "exact"
    eta: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for what, given, known in (
            ("solver_type", self.solver_type, ("midpoint", "heun")),
            ("third_order", self.third_order, ("exact", "as_published", "diffusers_sde")),
        ):
            if given not in known:
                raise FewstepError(unknown(what, given, known))
        _check_eta(self.eta, self.basis)
        if self.third_order == "diffusers_sde" and self.eta != 1:
            raise FewstepError(f"third_order='diffusers_sde' is the formula of eta=1, got eta={self.eta}")

    @property
    def convergence_order(self) -> int:
        """On the ODE. With noise the law of a sample is of order 1 or 2, whatever the order of the deterministic part."""
        return {"exact": self.order, "as_published": min(self.order, 2), "diffusers_sde": 1}[self.third_order]

    def row(self, s: Point, t: Point, past: Sequence[Point]) -> Row:
        if len(past) == 2 and self.solver_type == "midpoint":
            first = lagrange_row(self.basis, "lambda", [s], s, t, eta=self.eta)
            return secant_row(first, 0.5 * first.outputs[0], s, t, past[1])
        factors: tuple[Scalar, ...] = ()
        if len(past) == 3 and self.third_order == "as_published":
            factors = (1.0, 1.0, 0.5)
        elif len(past) == 3 and self.third_order == "diffusers_sde":
            h2 = 2 * (t.lam - s.lam)
            exact = 0.5 - (h2 + expm1(-h2)) / h2**2
            factors = (1.0, 1.0, 0.5 * (exact - 1) / exact)
        return lagrange_row(self.basis, "lambda", past, s, t, eta=self.eta, moment_factors=factors)


def _check_eta(eta: float, basis: str) -> None:
    if not 0 <= eta < math.inf or (eta and basis != "data"):
        raise FewstepError(f"eta must be at least 0, and 0 in the noise basis; got eta={eta}, basis {basis!r}")


@dataclass(frozen=True)
class DPMSolverSinglestep(Singlestep):
    """DPM-Solver++ (data basis) and DPM-Solver (noise basis) with 1, 2 or 3 calls a step, whose stages restart from s.

    A step of k calls has its stages at lambda_s + r1 h and lambda_s + r2 h. With D_k = m_k - m_s:

        1S            DDIM
        2S midpoint   x_t = a x_s + M_0 (m_s + D_1 / (2 r1))           heun      Lagrange through {s, s1} in lambda
        3S            x_2: Lagrange through {s, s1}
           midpoint   x_t: Lagrange through {s, s2}            heun      Lagrange through {s, s1, s2}

    3S is of third order for r2 = 2/3, or on grids whose r2 tend to it: elsewhere midpoint is not exact for quadratic
    outputs, and heun gives m_1, which is known to second order only, a weight.

    ``order`` 3 makes steps of three calls and a rest: with ``lower_order_final`` the paper's "fast" sequences for N calls,
    3...3 2 1, 3...3 1 and 3...3 2; without it 3...3 and what is left. ``order`` 2: 2...2, and 1 if N is odd.

    ``eta`` > 0 (data basis) solves the reverse SDE: eta = 1 with 2S is DPM-Solver++'s ``sde`` singlestep. The noise of a
    stage is the beginning of the noise of the whole step, so a row continues from the newest stage and adds what is
    missing; that has the right covariance between stage and step, which two independent draws do not.

    Sources: DPM-Solver, 2206.00927, algorithms 1 and 2, section 3.4; DPM-Solver++, 2211.01095, algorithm 1.
    """

    order: int = 2
    solver_type: SolverType = "midpoint"
    placing: Literal["lambda", "grid"] = "lambda"
    """Where the stages lie: at r1 and r2, or at the grid's own points (as in the authors' code and in diffusers)."""
    r1: float | None = None
    """Default 1/2 for 2S and 1/3 for 3S."""
    r2: float = 2 / 3
    second_stage: SolverType = "heun"
    """The formula of 3S's second stage; diffusers uses that of the whole step, both keep the order."""
    lower_order_final: bool = True
    eta: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for what, given, known in (
            ("solver_type", self.solver_type, ("midpoint", "heun")),
            ("type of a second stage", self.second_stage, ("midpoint", "heun")),
            ("placing", self.placing, ("lambda", "grid")),
        ):
            if given not in known:
                raise FewstepError(unknown(what, given, known))
        if type(self.order) is not int or not 1 <= self.order <= 3:
            raise FewstepError(f"{type(self).__name__} has orders 1 to 3, got order={self.order!r}")
        _check_eta(self.eta, self.basis)
        r1 = 1 / 3 if self.r1 is None else self.r1
        if not 0 < r1 < 1 or (self.order == 3 and not r1 < self.r2 < 1):
            raise FewstepError(f"stages need 0 < r1 < r2 < 1, got r1={self.r1}, r2={self.r2}")

    @property
    def convergence_order(self) -> int:
        """Of the ODE, on grids whose steps change smoothly; :class:`DPMSolver` says what noise does to it."""
        third = self.placing == "grid" or self.r2 == 2 / 3
        return self.order if third else min(self.order, 2)

    def sequence(self, calls: int) -> list[int]:
        p, rest = self.order, calls % self.order
        whole = calls // p
        if p == 3 and rest == 0 and self.lower_order_final:
            return [3] * (whole - 1) + [2, 1]
        return [p] * whole + [rest] * (rest > 0)

    def stages(self, s: Point, t: Point, between: Sequence[Point]) -> list[Scalar]:
        if self.placing == "grid":
            return [p.lam for p in between]
        if not between:
            return []
        r1 = 1 / (len(between) + 1) if self.r1 is None else self.r1
        return [s.lam + r * (t.lam - s.lam) for r in (r1, self.r2)[: len(between)]]

    def fits(self, s: Point, t: Point, calls: int) -> bool:
        return math.isfinite(value(s.lam)) and math.isfinite(value(t.lam))

    @property
    def chained(self) -> bool:
        return self.eta > 0

    def rows(self, s: Point, t: Point, inner: Sequence[Point]) -> list[Row]:
        rows = [self._through([s], s, inner[0] if inner else t)]
        if len(inner) == 1:
            rows.append(self._second(s, t, inner[0], self.solver_type))
        elif inner:
            s1, s2 = inner
            rows.append(self._second(s, s2, s1, self.second_stage))
            if self.solver_type == "heun":
                rows.append(self._through([s2, s1, s], s, t))
            else:
                last = self._through([s2, s], s, t)
                rows.append(Row(last.state, [last.outputs[0], 0.0, last.outputs[1]], last.noise))
        return self._chain(rows, [s, *inner, t]) if self.chained else rows

    def _through(self, nodes: Sequence[Point], s: Point, t: Point) -> Row:
        return lagrange_row(self.basis, "lambda", nodes, s, t, eta=self.eta)

    def _second(self, s: Point, t: Point, stage: Point, kind: SolverType) -> Row:
        if kind == "heun":
            return self._through([stage, s], s, t)
        first = self._through([s], s, t)
        row = secant_row(first, 0.5 * first.outputs[0], s, t, stage)
        return Row(row.state, row.outputs[::-1], row.noise)

    def _chain(self, rows: Sequence[Row], points: Sequence[Point]) -> list[Row]:
        """``rows`` from the first point rewritten to start from the one before: x_s and the common noise cancel."""
        chained = list(rows[:1])
        for (before, row), (s, t) in zip(pairwise(rows), pairwise(points[1:]), strict=True):
            w = row.state / before.state
            outputs = [b - w * c for b, c in zip(row.outputs, [0.0, *before.outputs], strict=True)]
            chained.append(Row(w, outputs, t.sigma * sqrt(-expm1(-2 * self.eta * (t.lam - s.lam)))))
        return chained


@dataclass(frozen=True)
class DPMSolverSDE(DPMSolverSinglestep):
    """SDE-DPM-Solver++ 2S: :class:`DPMSolverSinglestep` with noise, two calls a step.

    What k-diffusion calls dpmpp_sde and diffusers DPMSolverSDEScheduler, but for the law of the noise: theirs correlates
    stage and step by a Brownian motion that runs in sigma, here it is the SDE's own.
    """

    eta: float = 1.0
    bases: ClassVar[tuple[Basis, ...]] = ("data",)
