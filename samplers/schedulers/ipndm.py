"""iPNDM as a diffusers scheduler."""

from __future__ import annotations

from typing import Any, ClassVar

from fewstep.samplers.scheduler import SolverScheduler
from fewstep.samplers.solver import Solver
from fewstep.samplers.solvers.ipndm import IPNDM


class IPNDMScheduler(SolverScheduler):
    """iPNDM (2204.13902): see :class:`fewstep.samplers.IPNDM`. ``steps``: equal, variable or diff_sampler.

    On the model's own process and any grid; diffusers' class of this name has a process of its own.
    """

    options: ClassVar[dict[str, Any]] = {"solver_order": 4, "weights": "variable"}

    def solver(self) -> Solver:
        return IPNDM(order=self.config.solver_order, weights=self.config.weights)
