"""USF: a solver as a list of decisions, one a step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import Tensor

from fewstep.artifact import read_json, write_json
from fewstep.errors import FewstepError, GridError, unknown
from fewstep.samplers.forms import Form, combine, plan_from_forms
from fewstep.samplers.grid import Grid, Point
from fewstep.samplers.lagrange import VARIABLES, Basis, Row, Variable, lagrange_row
from fewstep.samplers.modifiers import analytic_first_step
from fewstep.samplers.plan import SolverPlan
from fewstep.samplers.scalar import Scalar, value
from fewstep.samplers.schedule import NoiseSchedule
from fewstep.samplers.solver import Solver, checked, points_of
from fewstep.samplers.solvers.unipc import UniPC

Relaxation = Literal["none", "bh1", "bh2"]


@dataclass(frozen=True)
class Decision:
    """How one step is made.

    Raises:
        FewstepError: an order that is no positive integer, past nodes that are repeated, do not contain the newest or are
            fewer than the order, or a combination that has no closed form.
    """

    order: int = 2
    """Terms of the Taylor expansion of the output that are integrated."""
    nodes: tuple[int, ...] = ()
    """The outputs from which its derivatives are estimated, counted back from the newest (0); () is as many as the order.

    Nodes beyond the order estimate the derivatives more accurately; without the truncation they would raise the order.
    Those from before the start are left out.
    """
    basis: Basis = "data"
    """The output that is expanded: x0 (data), eps (noise), or eps - x0 of a flow (velocity)."""
    variable: Variable = "lambda"
    """In what it is a polynomial."""
    relaxation: Relaxation = "none"
    """bh1, bh2: the weight of the first derivative as UniPC has it where it solves no system; bh2 is DPM-Solver's midpoint."""
    derivative_scale: float = 0.0
    """c: the first derivative is taken 1 + c h times."""
    corrector: bool = False
    """Whether the end of this step is corrected with the output there (UniC), which costs no call."""
    start: int = 0
    """From which state the step goes, counted back from the newest (0)."""

    def __post_init__(self) -> None:
        if isinstance(self.order, bool) or not isinstance(self.order, int) or self.order < 1:
            raise FewstepError(f"a decision's order is a positive integer, got {self.order!r}")
        if self.basis not in VARIABLES:
            raise FewstepError(unknown("basis of a decision", self.basis, VARIABLES))
        if self.variable not in VARIABLES[self.basis]:
            raise FewstepError(unknown(f"variable of the {self.basis} basis", self.variable, VARIABLES[self.basis]))
        if self.relaxation not in ("none", "bh1", "bh2"):
            raise FewstepError(unknown("relaxation", self.relaxation, ("none", "bh1", "bh2")))
        if self.relaxation != "none" and (
            self.variable != "lambda" or self.nodes or self.derivative_scale or self.start
        ):
            raise FewstepError(
                f"relaxation {self.relaxation!r} goes with the variable lambda, the last nodes and state, no scale"
            )
        if any(isinstance(k, bool) or not isinstance(k, int) or k < 0 for k in (*self.nodes, self.start)):
            raise FewstepError(f"nodes and start count back from 0, got nodes={self.nodes}, start={self.start!r}")
        if self.nodes and (0 not in self.nodes or len(set(self.nodes)) != len(self.nodes)):
            raise FewstepError(f"nodes are different outputs, the newest (0) among them; got {self.nodes}")
        if self.nodes and len(self.nodes) < self.order:
            raise FewstepError(f"order {self.order} needs as many nodes, got {self.nodes}")
        if self.derivative_scale and self.variable != "lambda":
            raise FewstepError(f"derivative_scale multiplies h in lambda; the variable here is {self.variable!r}")
        if not math.isfinite(self.derivative_scale):
            raise FewstepError(f"derivative_scale must be a finite number, got {self.derivative_scale!r}")

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Decision:
        """From JSON values; missing keys have their defaults, unknown ones are refused."""
        known = [f.name for f in fields(Decision)]
        for key in data:
            if key not in known:
                raise FewstepError(unknown("key of a decision", key, known))
        options: dict[str, Any] = {k: tuple(v) if k == "nodes" else v for k, v in data.items()}
        return Decision(**options)

    @property
    def convergence_order(self) -> int:
        """What a method that always decides so converges with."""
        # a share c h of the first derivative is off by O(h^3)
        exact = min(self.order, 2) if self.derivative_scale else self.order
        return exact + 1 if self.corrector else exact

    def row(self, s: Point, t: Point, past: Sequence[Point]) -> Row:
        """The step from ``s`` to ``t`` over the outputs at ``past``, newest first, at most this order of them kept."""
        order = min(self.order, len(past))
        if self.relaxation != "none" and order <= 2:
            return UniPC(solver_type=self.relaxation, basis=self.basis).row(s, t, past)
        return lagrange_row(self.basis, self.variable, past, s, t, moment_factors=self._factors(order, len(past), s, t))

    def correction(self, s: Point, t: Point, past: Sequence[Point]) -> Row:
        """The same step over the outputs at t and ``past``."""
        if self.relaxation != "none" and len(past) == 1:
            return UniPC(solver_type=self.relaxation, basis=self.basis).corrector(s, t, past)
        return lagrange_row(self.basis, self.variable, [t, *past], s, t)

    def _factors(self, order: int, count: int, s: Point, t: Point) -> list[float]:
        factors = [1.0] * order + [0.0] * (count - order)
        if order > 1 and self.derivative_scale:
            factors[1] = 1 + self.derivative_scale * value(t.lam - s.lam)
        return factors


@dataclass(frozen=True)
class USF(Solver):
    """Every step decides for itself: order, past outputs, basis, variable, relaxation, corrector and start.

    Existing methods are uniform lists: ``Decision(relaxation="bh2")`` is DPM-Solver++ 2M, with ``corrector=True`` UniPC,
    ``Decision(3, basis="noise")`` DEIS. A single decision stands for all steps. Decisions for more steps than the
    grid has count from their end (image to image).

    Steps from or to an infinite lambda, where interpolation in lambda has no meaning, are of first order; the noise basis
    takes its step from alpha = 0 on x0.

    ``first_step_free`` makes the first step with an assumed output instead of a call, see
    :func:`fewstep.samplers.modifiers.analytic_first_step`.

    Source: A Unified Sampling Framework for Solver Searching of Diffusion Probabilistic Models, 2312.07243, section 3. Its
    third basis, DPM-Solver-v3's, is :class:`EMS`.

    Raises:
        FewstepError: no decision at all.
        GridError: (from ``compile``) fewer decisions than steps.
    """

    decisions: tuple[Decision, ...] = (Decision(),)
    first_step_free: bool = False
    bases: ClassVar[tuple[Basis, ...]] = ("data", "noise", "velocity")

    def __post_init__(self) -> None:
        if not self.decisions:
            raise FewstepError("USF needs at least one decision")

    def __str__(self) -> str:
        kinds = len(set(self.decisions))
        return f"USF({len(self.decisions)} decisions, {kinds} different)" if kinds > 1 else f"USF({self.decisions[0]})"

    @property
    def convergence_order(self) -> int:
        """That of the least accurate decision, given starting steps that are as accurate."""
        return min(d.convergence_order for d in self.decisions)

    @property
    def consistent(self) -> bool:
        return not self.first_step_free

    def compile(self, schedule: NoiseSchedule, grid: Grid) -> SolverPlan:
        points = points_of(schedule, grid)
        decisions = self._for_grid(grid.steps)
        bases: list[Basis] = [_usable(d.basis, points[i]) for i, d in enumerate(decisions)]
        build = _Build(points, bases)
        for i, decision in enumerate(decisions):
            build.step(i, decision)
        plan = plan_from_forms(schedule, grid, bases, build.states, method=str(self), order=self.convergence_order)
        plan = checked(plan)
        return analytic_first_step(plan) if self.first_step_free else plan

    def _for_grid(self, steps: int) -> tuple[Decision, ...]:
        if len(self.decisions) == 1:
            return self.decisions * steps
        if len(self.decisions) < steps:
            raise GridError(f"{len(self.decisions)} decisions were given for a grid of {steps} steps")
        return self.decisions[len(self.decisions) - steps :]

    # -- files --------------------------------------------------------------------------------------------------------
    def save(self, path: str | Path, provenance: Mapping[str, Any] | None = None) -> None:
        """Write the decisions as JSON; ``provenance`` says for which model, guidance and grid they were found."""
        body = {
            "decisions": [asdict(d) for d in self.decisions], "first_step_free": self.first_step_free,
            "provenance": dict(provenance or {}),
        }  # fmt: skip
        write_json(path, "Decisions", body)

    @staticmethod
    def load(path: str | Path) -> USF:
        """Read what :meth:`save` wrote.

        Raises:
            ArtifactError: unreadable, of another kind or version, with unknown or missing keys.
            FewstepError: a decision that cannot be made.
        """
        body = read_json(path, "Decisions", ("decisions", "first_step_free", "provenance"))
        return USF(tuple(Decision.from_dict(d) for d in body["decisions"]), bool(body["first_step_free"]))


class _Build:
    """The states as forms, step by step."""

    def __init__(self, points: Sequence[Point], bases: Sequence[Basis]) -> None:
        self.points, self.bases = points, bases
        self.states: list[Form] = []
        self.corrected: list[Form] = []
        """The states that steps start from: X_i with its correction."""
        self.pending: tuple[Decision, Row, list[int], int] | None = None
        """What the correction of the next state needs: decision, predictor, its nodes, its start."""

    def step(self, i: int, decision: Decision) -> None:
        points = self.points
        self.corrected.append(self._correct(i))
        s, t = points[i], points[i + 1]
        start = i - decision.start if decision.start <= i and not points[i - decision.start].pure_noise else i
        nodes = [i - k for k in decision.nodes or range(decision.order) if k <= i]
        basis = _usable(decision.basis, s)
        if t.clean and decision.variable == "lambda":
            nodes, start = [i], i
        if basis != decision.basis:
            row = lagrange_row(basis, "lambda", [s], s, t)
        else:
            row = decision.row(points[start], t, [points[j] for j in nodes])
        self.states.append(combine([(row.state, self.corrected[start]), *self._read(row.outputs, nodes, basis)]))
        # from alpha = 0 on B(h) = h is infinite, and so is the ratio of the noise basis
        correctable = not s.pure_noise or (decision.basis == "data" and decision.relaxation != "bh1")
        self.pending = (decision, row, nodes, start) if decision.corrector and correctable else None

    def _correct(self, i: int) -> Form:
        if self.pending is None:
            return Form.state(i)
        decision, row, nodes, start = self.pending
        s, t = self.points[start], self.points[i]
        fixed = decision.correction(s, t, [self.points[j] for j in nodes])
        new = self._read(fixed.outputs, [i, *nodes], decision.basis)
        old = self._read([-1.0 * w for w in row.outputs], nodes, decision.basis)
        return combine([(1.0, Form.state(i)), *new, *old])

    def _read(self, weights: Sequence[Scalar], nodes: Sequence[int], basis: Basis) -> list[tuple[Scalar, Form]]:
        read = [(w, j) for w, j in zip(weights, nodes, strict=True) if isinstance(w, Tensor) or w]
        return [(w, self._output(j, basis)) for w, j in read]

    def _output(self, j: int, basis: Basis) -> Form:
        """Output j in ``basis``, whatever basis it is kept in: x0, eps and X are two of three."""
        kept, at = self.bases[j], self.points[j]
        if kept == basis:
            return Form.output(j)
        alpha, sigma = at.alpha, at.sigma
        # of X = alpha x0 + sigma eps and the output kept follows x0 or eps, and from one of them what is asked for
        if kept == "velocity":
            u, v = 1 / (alpha + sigma), (-sigma if basis == "data" else alpha) / (alpha + sigma)
        elif kept == "noise":
            u, v = (1 / alpha, -sigma / alpha) if basis == "data" else (-1 / alpha, (alpha + sigma) / alpha)
        else:
            u, v = (1 / sigma, -alpha / sigma) if basis == "noise" else (1 / sigma, -(alpha + sigma) / sigma)
        return Form({j: u}, {j: v})


def _usable(basis: Basis, at: Point) -> Basis:
    """At alpha = 0 the noise says nothing about where to go, but x0 does."""
    return "data" if basis == "noise" and at.pure_noise else basis
