"""UniPC as a diffusers scheduler."""

from __future__ import annotations

from typing import Any, ClassVar

from fewstep.samplers.scheduler import SolverScheduler
from fewstep.samplers.schedulers.options import LOWERING, lowering, uncorrected_of
from fewstep.samplers.solver import Solver
from fewstep.samplers.solvers.unipc import UniPC


class UniPCScheduler(SolverScheduler):
    """UniPC (2302.04867): see :class:`fewstep.samplers.UniPC`. ``solver_type``: bh1 or bh2."""

    options: ClassVar[dict[str, Any]] = {
        "solver_order": 2, "solver_type": "bh2", "predict_x0": True, "disable_corrector": None, **LOWERING,
    }  # fmt: skip

    def solver(self) -> Solver:
        config = self.config
        b: Any = "bh2" if config.solver_type in ("midpoint", "heun", "logrho") else config.solver_type
        return UniPC(
            **lowering(config), basis="data" if config.predict_x0 else "noise", solver_type=b,
            disable_corrector=uncorrected_of(config),
        )  # fmt: skip
