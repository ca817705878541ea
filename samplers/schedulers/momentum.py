"""Momentum methods as diffusers schedulers."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from fewstep.samplers.scheduler import SolverScheduler
from fewstep.samplers.schedulers.bases import BASE, base_solver
from fewstep.samplers.schedulers.options import LOWERING, lowering
from fewstep.samplers.solver import Solver
from fewstep.samplers.solvers.ghvb import GHVB
from fewstep.samplers.solvers.momentum import HeavyBall


class HeavyBallScheduler(SolverScheduler):
    """Heavy ball and Nesterov momentum (2307.11118) on ``base``: see :class:`fewstep.samplers.HeavyBall`."""

    options: ClassVar[dict[str, Any]] = {**BASE, "beta": 0.8, "nesterov": False}

    def solver(self) -> Solver:
        return HeavyBall(base_solver(self.config), beta=self.config.beta, nesterov=self.config.nesterov)


class GHVBScheduler(SolverScheduler):
    """Generalised Heavy Ball (2307.11118): see :class:`fewstep.samplers.GHVB`.

    A ``solver_order`` with a fraction is the paper's notation, 3.7 being order 4 with beta 0.7; it replaces ``beta``.
    """

    options: ClassVar[dict[str, Any]] = {
        "solver_order": 4, "beta": 0.8, "variable": "rho", "weights": "variable", "predict_x0": False, **LOWERING,
    }  # fmt: skip

    def solver(self) -> Solver:
        config = self.config
        order, beta = config.solver_order, config.beta
        if isinstance(order, float):
            whole = GHVB.of(order) if math.isfinite(order) and order > 0 else GHVB(order=order)  # type: ignore[arg-type]
            order, beta = whole.order, beta if order == whole.order else whole.beta
        return GHVB(
            **{**lowering(config), "order": order}, beta=beta, variable=config.variable, weights=config.weights,
            basis="data" if config.predict_x0 else "noise",
        )  # fmt: skip
