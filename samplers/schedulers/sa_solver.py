"""SA-Solver as a diffusers scheduler."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from fewstep.errors import FewstepError
from fewstep.samplers.schedule import f64
from fewstep.samplers.scheduler import SolverScheduler
from fewstep.samplers.schedulers.options import uncorrected_of
from fewstep.samplers.solver import Solver
from fewstep.samplers.solvers.sa_solver import SASolver


class SASolverScheduler(SolverScheduler):
    """SA-Solver (2309.05019): see :class:`fewstep.samplers.SASolver`.

    ``tau_window`` says from which to which timestep of training there is noise; by default 200 to 800, as diffusers'
    SASolverScheduler has it, and null for everywhere. ``tau`` is the noise there. diffusers' results are those of
    ``simplified=True, disable_corrector=[]``.
    """

    options: ClassVar[dict[str, Any]] = {
        "predictor_order": 2, "corrector_order": 2, "tau": 1.0, "tau_window": (200, 800), "simplified": False,
        "disable_corrector": None, "algorithm_type": "data_prediction", "lower_order_final": True,
    }  # fmt: skip

    def solver(self) -> Solver:
        config = self.config
        if config.algorithm_type != "data_prediction":
            raise FewstepError(f"SASolver has algorithm_type='data_prediction' alone, got {config.algorithm_type!r}")
        low, high = 0.0, math.inf
        if config.tau_window is not None:
            window = list(config.tau_window)
            if len(window) != 2 or window[0] > window[1]:
                raise FewstepError(f"tau_window is {window}; give the first and the last timestep with noise, or null")
            low, high = self._noise_levels(window)
        return SASolver(
            order=config.predictor_order, corrector_order=config.corrector_order, tau=config.tau, low=low, high=high,
            simplified=config.simplified, disable_corrector=uncorrected_of(config),
            lower_order_final=config.lower_order_final,
        )  # fmt: skip

    def _noise_levels(self, times: list[float]) -> list[float]:
        """sigma/alpha at these timesteps."""
        at = self.schedule.at(self.schedule.t_from_model_time(f64(times)))
        return [float(rho) for rho in at.sigma / at.alpha]
