"""DEIS as a diffusers scheduler."""

from __future__ import annotations

from typing import Any, ClassVar

from fewstep.errors import FewstepError, unknown
from fewstep.samplers.scheduler import SolverScheduler
from fewstep.samplers.schedulers.options import LOWERING, lowering
from fewstep.samplers.solver import Solver
from fewstep.samplers.solvers.deis import DEIS


class DEISScheduler(SolverScheduler):
    """DEIS (2204.13902): see :class:`fewstep.samplers.DEIS`. ``solver_type``: logrho (diffusers' kind), rho or t."""

    options: ClassVar[dict[str, Any]] = {
        "solver_order": 2, "solver_type": "logrho", "final_sigmas_type": "sigma_min", **LOWERING,
    }  # fmt: skip

    def solver(self) -> Solver:
        config = self.config
        known = {
            "logrho": "lambda",
            "rho": "rho",
            "t": "t",
            **dict.fromkeys(("midpoint", "heun", "bh1", "bh2"), "lambda"),
        }
        if config.solver_type not in known:
            raise FewstepError(unknown("solver_type of DEIS", config.solver_type, ("logrho", "rho", "t")))
        variable: Any = known[config.solver_type]
        return DEIS(**lowering(config), variable=variable)
