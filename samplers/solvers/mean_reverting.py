"""MR sampler: any solver, on a process that reverts to a given tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

from fewstep.errors import FewstepError
from fewstep.samplers.grid import Grid, Point
from fewstep.samplers.lagrange import Basis, Row
from fewstep.samplers.plan import SolverPlan
from fewstep.samplers.reverting import Reverting
from fewstep.samplers.scalar import sqrt
from fewstep.samplers.schedule import NoiseSchedule
from fewstep.samplers.solver import Multistep, Solver, checked, points_of
from fewstep.samplers.solvers.dpm_solver import DPMSolver


@dataclass(frozen=True)
class MeanReverting(Solver):
    """``base`` on x_t = alpha x0 + (1 - alpha) mu + sigma eps: centre, solve, un-centre.

    X - mu is an ordinary diffusion of x0 - mu, whose rows are those of ``base``; written for X they add a multiple of mu,
    the plan's ``constant``: 1 - sum_k state[k] - sum_j output[j] for outputs x0, and 1 - sum_k state[k] for outputs eps.
    Where a network that predicts eps is read as x0, mu's share in that conversion is part of the same number, so a step
    costs one multiply-add more than without mu.

    The MR sampler's four kinds are those of the base: ``DPMSolver(order=3, basis="noise")``, ``DPMSolver(order=3)``, and
    ``DPMSolver(order=2, eta=1)`` for the SDE; its third order is ``third_order="as_published"``. On ResShift's process
    :class:`ResShift` is the published sampler; the deterministic solvers need fewer of its steps.

    Source: MaRS: A Fast Sampler for Mean Reverting Diffusion based on ODE and SDE Solvers, 2502.07856, propositions 2 and
    3 and appendix A.
    """

    base: Solver = field(default_factory=DPMSolver)
    bases: ClassVar[tuple[Basis, ...]] = ("data", "noise")

    @property
    def convergence_order(self) -> int:
        return self.base.convergence_order

    @property
    def consistent(self) -> bool:
        return self.base.consistent

    def compile(self, schedule: NoiseSchedule, grid: Grid) -> SolverPlan:
        if not isinstance(schedule, Reverting):
            raise FewstepError(
                f"{type(schedule).__name__} does not revert to a mean; compile {self.base} itself, "
                "or make the schedule with process='mean_reverting' or 'residual_shift'"
            )
        points_of(schedule, grid)
        centred = schedule.centred()
        plan = self.base.compile(centred, replace(grid, schedule=centred))
        if plan.sample_shape:
            raise FewstepError(f"{self.base} brings constants of its own; take a solver without calibrated statistics")
        plan = replace(plan, schedule=schedule.identity(), fingerprint=schedule.fingerprint, method=str(self))
        return checked(replace(plan, constant=plan.reverting_constant()), strict=self.consistent)


@dataclass(frozen=True)
class ResShift(Multistep):
    """x_t = r x_s + (alpha_t - r alpha_s) x0 + sigma_t sqrt(1 - r) z with r = (sigma_t / sigma_s)^2: ResShift's own sampler.

    In its own terms, alpha = 1 - eta and sigma = kappa sqrt(eta), the weight of x0 is 1 - eta_t / eta_s, the variance
    kappa^2 eta_t (eta_s - eta_t) / eta_s, and mu has no weight. For ve it is DDIM with eta = 1.

    Source: ResShift, 2307.12348, eq. 7.
    """

    order: int = 1
    max_order: ClassVar[int] = 1
    bases: ClassVar[tuple[Basis, ...]] = ("data",)

    def row(self, s: Point, t: Point, past: Sequence[Point]) -> Row:
        del past
        ratio = t.sigma / s.sigma
        r = ratio**2
        return Row(r, [t.alpha - r * s.alpha], t.sigma * sqrt((1 - ratio) * (1 + ratio)))
