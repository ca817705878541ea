"""Runge-Kutta methods as a diffusers scheduler."""

from __future__ import annotations

from typing import Any, ClassVar

from fewstep.samplers.scheduler import SolverScheduler
from fewstep.samplers.solver import Solver
from fewstep.samplers.solvers.runge_kutta import RungeKutta


class RungeKuttaScheduler(SolverScheduler):
    """Runge-Kutta methods: see :class:`fewstep.samplers.RungeKutta`. In rho, and in sigma for flow models.

    ``method``: heun, midpoint, ralston, kutta3, heun3, ralston3, houwen3, ssp3 or rk4. ``num_inference_steps`` counts network
    calls: 2 N - 1 of them are N of diffusers' HeunDiscreteScheduler. ``timesteps`` lists them all, and of those that are
    given only the first of every step is used, for the method places its stages. On fewer than ``euler_below`` calls it is
    Euler's method: under strong guidance two or three long steps with stages are many times worse than that.
    """

    options: ClassVar[dict[str, Any]] = {"method": "heun", "euler_below": 8}

    def solver(self) -> Solver:
        return RungeKutta(
            self.config.method, basis="velocity" if self.schedule.family == "flow" else "noise",
            euler_below=self.config.euler_below,
        )  # fmt: skip
