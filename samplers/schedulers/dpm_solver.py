"""DPM-Solver and DPM-Solver++ as diffusers schedulers, multistep and singlestep."""

from __future__ import annotations

from typing import Any, ClassVar

from fewstep.errors import FewstepError, unknown
from fewstep.samplers.lagrange import Basis
from fewstep.samplers.scheduler import SolverScheduler
from fewstep.samplers.schedulers.options import LOWERING, lowering
from fewstep.samplers.solver import Solver
from fewstep.samplers.solvers.dpm_solver import DPMSolver, DPMSolverSinglestep, SolverType

_KINDS: dict[str, tuple[Basis, float]] = {
    "dpmsolver++": ("data", 0.0),
    "dpmsolver": ("noise", 0.0),
    "sde-dpmsolver++": ("data", 1.0),
}


def basis_and_eta(config: Any) -> tuple[Basis, float]:
    """What ``algorithm_type`` stands for."""
    if config.algorithm_type == "sde-dpmsolver":
        raise FewstepError(
            "algorithm_type='sde-dpmsolver' adds variance that the process does not have (6.9 times at h = 1); "
            "use 'sde-dpmsolver++'"
        )
    # "deis" is what diffusers' own DPM-Solver maps to its default
    kind = "dpmsolver++" if config.algorithm_type == "deis" else config.algorithm_type
    if kind not in _KINDS:
        raise FewstepError(unknown("algorithm_type", config.algorithm_type, _KINDS))
    return _KINDS[kind]


def _type(config: Any) -> SolverType:
    """``solver_type``, that of other families being mapped to the default as diffusers does."""
    return "midpoint" if config.solver_type in ("logrho", "bh1", "bh2") else config.solver_type


class DPMSolverScheduler(SolverScheduler):
    """DPM-Solver and DPM-Solver++ multistep (2206.00927, 2211.01095): see :class:`fewstep.samplers.DPMSolver`.

    ``algorithm_type``: dpmsolver++, dpmsolver, or sde-dpmsolver++. ``third_order="as_published"`` gives the third-order
    update of the papers' code and of diffusers, which halves the quadratic term; the default is the exact one.
    """

    options: ClassVar[dict[str, Any]] = {
        "solver_order": 2, "algorithm_type": "dpmsolver++", "solver_type": "midpoint", "third_order": "exact", **LOWERING,
    }  # fmt: skip

    def solver(self) -> Solver:
        config = self.config
        basis, eta = basis_and_eta(config)
        return DPMSolver(
            **lowering(config), basis=basis, eta=eta, solver_type=_type(config),
            third_order=config.third_order,
        )  # fmt: skip


class DPMSolverSinglestepScheduler(SolverScheduler):
    """DPM-Solver and DPM-Solver++ singlestep: see :class:`fewstep.samplers.DPMSolverSinglestep`.

    ``num_inference_steps`` counts network calls, and ``timesteps`` lists them all. ``placing="grid"`` takes the stages from
    the timesteps, as the papers' code and diffusers do; "lambda" places them by their share of the step in lambda.
    """

    options: ClassVar[dict[str, Any]] = {
        "solver_order": 2, "algorithm_type": "dpmsolver++", "solver_type": "midpoint", "second_stage": "heun",
        "placing": "grid", "lower_order_final": True,
    }  # fmt: skip

    def solver(self) -> Solver:
        config = self.config
        basis, eta = basis_and_eta(config)
        return DPMSolverSinglestep(
            order=config.solver_order, lower_order_final=config.lower_order_final, basis=basis, eta=eta,
            solver_type=_type(config), second_stage=config.second_stage, placing=config.placing,
        )  # fmt: skip
