"""Heavy ball and Nesterov momentum on the steps of any multistep method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from fewstep.errors import FewstepError
from fewstep.samplers.forms import Form, combine, direction, filtered, plan_from_forms, predict_correct
from fewstep.samplers.grid import Grid, Point
from fewstep.samplers.lagrange import Basis, Row
from fewstep.samplers.plan import SolverPlan
from fewstep.samplers.scalar import Scalar
from fewstep.samplers.schedule import NoiseSchedule
from fewstep.samplers.solver import Multistep, Solver, checked, points_of
from fewstep.samplers.solvers.dpm_solver import DPMSolver


@dataclass(frozen=True)
class HeavyBall(Solver):
    """A multistep method whose direction is low-pass filtered: fewer artefacts under strong guidance, less accuracy.

    With g_i the base's direction at step i, that is its combination of outputs divided by the sum of its weights, and
    v = g at the first step:

        heavy ball   v_i = (1 - beta) v_{i-1} + beta g_i           the step takes v_i in place of g_i
        Nesterov     the same v_i                                  the step takes (1 - beta) v_i + beta g_i

    beta = 1 is the base. Below 1 the region of stability grows (see :mod:`fewstep.samplers.stability`) and the order
    drops to 1, because v lags behind; :class:`GHVB` keeps the order. A corrector (UniPC's) is filtered with a velocity
    of its own. The step to sigma = 0 is the base's: no later step would make up for the lag.

    Source: Diffusion Sampling with Momentum for Mitigating Divergence Artifacts, 2307.11118, section 4.1 and appendix. Its
    code starts v at the first second-order direction of DPM-Solver++ 2M and so leaves the first step out of the average;
    here v starts at the first step of finite length in lambda, whatever the base.

    Raises:
        FewstepError: beta outside (0, 1].
    """

    base: Multistep = field(default_factory=DPMSolver)
    beta: float = 0.8
    nesterov: bool = False
    bases: ClassVar[tuple[Basis, ...]] = ("data", "noise")

    def __post_init__(self) -> None:
        check_beta(self.beta)

    @property
    def convergence_order(self) -> int:
        """The base's with beta = 1, else 1."""
        return self.base.convergence_order if self.beta == 1 else 1

    @property
    def consistent(self) -> bool:
        return self.base.consistent

    def compile(self, schedule: NoiseSchedule, grid: Grid) -> SolverPlan:
        points, base = points_of(schedule, grid), self.base.on(schedule)
        orders = base.orders(grid)
        rows = base.rows(points, orders)
        forms = predict_correct(
            [row.state for row in rows],
            [form or Form() for form in self._filtered(rows, points, 0)],
            self._filtered(base.correctors(points, orders), points, -1),
        )
        return checked(
            plan_from_forms(
                schedule, grid, base.output_bases(points), forms, noise=[row.noise for row in rows], method=str(self),
                order=self.convergence_order,
            ),
            strict=self.consistent,
        )  # fmt: skip

    def _filtered(self, rows: Sequence[Row | None], points: Sequence[Point], begin: int) -> list[Form | None]:
        """The directions of ``rows``, row i being that of the interval from point i + ``begin``."""
        outputs = [Form.output(i) for i in range(len(rows))]
        result = [None if row is None else direction(row, outputs[i::-1]) for i, row in enumerate(rows)]
        scales: dict[int, Scalar] = {}
        for i, row in enumerate(rows):
            s, t = points[i + begin], points[i + begin + 1]
            if row is not None and not s.pure_noise and not t.clean:
                scales[i] = sum(row.outputs)
        own = [combine([(1 / scale, result[i] or Form())]) for i, scale in scales.items()]
        velocity = filtered(own, self.beta)
        if self.nesterov:
            velocity = [combine([(1 - self.beta, v), (self.beta, g)]) for v, g in zip(velocity, own, strict=True)]
        for (i, scale), v in zip(scales.items(), velocity, strict=True):
            result[i] = combine([(scale, v)])
        return result


def check_beta(beta: float) -> None:
    """Raise :class:`FewstepError` unless ``beta`` is a share."""
    if not 0 < beta <= 1:
        raise FewstepError(f"momentum's beta lies above 0 (frozen) and at most at 1 (no momentum), got beta={beta!r}")
