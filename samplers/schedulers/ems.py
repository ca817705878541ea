"""DPM-Solver-v3 as a diffusers scheduler."""

from __future__ import annotations

from typing import Any, ClassVar

from fewstep.samplers.scheduler import SolverScheduler
from fewstep.samplers.schedulers.options import LOWERING, lowering, uncorrected_of
from fewstep.samplers.solver import Solver
from fewstep.samplers.solvers.ems import EMS, ModelStatistics


class EMSScheduler(SolverScheduler):
    """DPM-Solver-v3 (2310.13268): see :class:`fewstep.samplers.EMS`.

    ``statistics`` is the path of a saved :class:`ModelStatistics`, or a list [l, s, b] of numbers that hold everywhere;
    the default makes it DPM-Solver++ with a corrector. They belong to one model, guidance scale and sample shape.
    """

    options: ClassVar[dict[str, Any]] = {
        "solver_order": 2, "statistics": [1.0, 0.0, 0.0], "corrector": "pseudo", "predictor_pseudo": False,
        "disable_corrector": None, "final_sigmas_type": "sigma_min", **LOWERING,
    }  # fmt: skip

    def _configure(self) -> None:
        super()._configure()
        given = self.config.statistics
        self._statistics = ModelStatistics.load(given) if isinstance(given, str) else ModelStatistics.constant(*given)

    def solver(self) -> Solver:
        config = self.config
        return EMS(
            **lowering(config), statistics=self._statistics,
            corrector=config.corrector, predictor_pseudo=config.predictor_pseudo,
            disable_corrector=uncorrected_of(config),
        )  # fmt: skip
