"""Solvers in the velocity basis as a diffusers scheduler."""

from __future__ import annotations

from typing import Any, ClassVar

from fewstep.errors import FewstepError, unknown
from fewstep.samplers.scheduler import SolverScheduler
from fewstep.samplers.solver import Solver
from fewstep.samplers.solvers.flow import FlowSolver, FlowTurbo

_METHODS = ("adams", "adams_equal", "flowturbo")


class FlowScheduler(SolverScheduler):
    """Solvers of flow models in their own velocity: see :class:`fewstep.samplers.FlowSolver` and ``FlowTurbo``.

    ``method``: adams_equal (Adams-Bashforth with the weights of equal steps, ``solver_order`` 1 to 4), adams (with those of the
    steps as they are, which on shifted grids extrapolate further than strong guidance bears) or flowturbo (``heun_steps`` of
    Heun, then pseudo-corrector steps).
    """

    options: ClassVar[dict[str, Any]] = {"method": "adams_equal", "solver_order": 2, "heun_steps": 1}

    def solver(self) -> Solver:
        config = self.config
        if config.method not in _METHODS:
            raise FewstepError(unknown("method of a flow model", config.method, _METHODS))
        if config.method == "flowturbo":
            return FlowTurbo(heun=config.heun_steps)
        return FlowSolver(order=config.solver_order, weights="variable" if config.method == "adams" else "equal")
