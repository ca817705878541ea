"""The diffusers schedulers, one a method: its options under diffusers' names, and the solver that they describe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from fewstep.errors import FewstepError, GridError, unknown
from fewstep.samplers.convert import Clip
from fewstep.samplers.ddim import DDIM
from fewstep.samplers.deis import DEIS
from fewstep.samplers.dpm_solver import DPMSolver
from fewstep.samplers.grid import Grid
from fewstep.samplers.lagrange import Basis
from fewstep.samplers.plan import SolverPlan
from fewstep.samplers.scheduler import Numbers, SolverScheduler, SolverSchedulerOutput
from fewstep.samplers.solver import Solver
from fewstep.samplers.unipc import UniPC

LOWERING: dict[str, Any] = {"lower_order_final": True, "euler_at_final": False}


def _lowering(config: Any) -> dict[str, Any]:
    return {"order": config.solver_order, "lower_order_final": config.lower_order_final}


class DDIMScheduler(SolverScheduler):
    """DDIM (2010.02502): see :class:`fewstep.samplers.DDIM`. ``step`` takes ``eta``, as diffusers' pipelines pass it.

    ``clip_sample`` is off unless the config says otherwise: diffusers' default of True damages latents when the config of
    a scheduler that has no such key is loaded.
    """

    convention = "ddim"
    options: ClassVar[dict[str, Any]] = {
        "timestep_spacing": "leading", "clip_sample": False, "clip_sample_range": 1.0, "set_alpha_to_one": True, "eta": 0.0,
    }  # fmt: skip

    def _configure(self) -> None:
        super()._configure()
        self._eta = float(self.config.eta)
        if self.config.clip_sample and self._hook is None:
            self._hook = Clip(self.config.clip_sample_range)

    def solver(self) -> Solver:
        return DDIM(eta=self._eta)

    def _terminal(self) -> Literal["zero", "sigma_min"]:
        return "zero" if self.config.set_alpha_to_one and self.config.final_sigmas_type == "zero" else "sigma_min"

    def step(  # type: ignore[override]
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        eta: float | None = None,
        use_clipped_model_output: bool = False,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> SolverSchedulerOutput | tuple[Tensor]:
        """As :meth:`SolverScheduler.step`. A non-zero ``eta`` here, fixed for the run, replaces the config's."""
        del use_clipped_model_output  # x0 and eps always agree here
        wanted = float(self.config.eta) if not eta else float(eta)
        if wanted != self._eta and self._grid is not None:
            self._eta = wanted
            self._plan, self._executors = self.solver().compile(self.schedule, self._grid), {}
        return super().step(model_output, timestep, sample, generator, variance_noise, return_dict)


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
        kinds: dict[str, tuple[Basis, float]] = {
            "dpmsolver++": ("data", 0.0),
            "dpmsolver": ("noise", 0.0),
            "sde-dpmsolver++": ("data", 1.0),
        }
        if config.algorithm_type == "sde-dpmsolver":
            raise FewstepError(
                "algorithm_type='sde-dpmsolver' adds variance that the process does not have (6.9 times at h = 1); "
                "use 'sde-dpmsolver++'"
            )
        # "deis" and the solver types of other families are what diffusers' own DPM-Solver maps to its defaults
        kind = "dpmsolver++" if config.algorithm_type == "deis" else config.algorithm_type
        if kind not in kinds:
            raise FewstepError(unknown("algorithm_type", config.algorithm_type, kinds))
        basis, eta = kinds[kind]
        solver_type: Any = "midpoint" if config.solver_type in ("logrho", "bh1", "bh2") else config.solver_type
        return DPMSolver(
            **_lowering(config), euler_at_final=config.euler_at_final, basis=basis, eta=eta, type=solver_type,
            third_order=config.third_order,
        )  # fmt: skip


class DEISScheduler(SolverScheduler):
    """DEIS (2204.13902): see :class:`fewstep.samplers.DEIS`. ``solver_type``: logrho (diffusers' kind) or rho."""

    options: ClassVar[dict[str, Any]] = {
        "solver_order": 2, "solver_type": "logrho", "final_sigmas_type": "sigma_min", **LOWERING,
    }  # fmt: skip

    def solver(self) -> Solver:
        config = self.config
        known = {
            "logrho": "lambda",
            "rho": "rho",
            "midpoint": "lambda",
            "heun": "lambda",
            "bh1": "lambda",
            "bh2": "lambda",
        }
        if config.solver_type not in known:
            raise FewstepError(unknown("solver_type of DEIS", config.solver_type, ("logrho", "rho")))
        variable: Any = known[config.solver_type]
        return DEIS(**_lowering(config), euler_at_final=config.euler_at_final, variable=variable)


class UniPCScheduler(SolverScheduler):
    """UniPC (2302.04867): see :class:`fewstep.samplers.UniPC`. ``solver_type``: bh1 or bh2."""

    options: ClassVar[dict[str, Any]] = {
        "solver_order": 2, "solver_type": "bh2", "predict_x0": True, "disable_corrector": [], **LOWERING,
    }  # fmt: skip

    def solver(self) -> Solver:
        config = self.config
        b: Any = "bh2" if config.solver_type in ("midpoint", "heun", "logrho") else config.solver_type
        return UniPC(
            **_lowering(config), euler_at_final=config.euler_at_final, basis="data" if config.predict_x0 else "noise", b=b,
            disable_corrector=tuple(config.disable_corrector),
        )  # fmt: skip


class PlanScheduler(SolverScheduler):
    """Runs a saved or learned :class:`SolverPlan`.

    ``plan`` is a path ending in .json, or the plan's own ``to_dict()``; either way the config keeps the whole plan, so
    that a saved pipeline needs no other file. :meth:`from_plan` takes the object.
    """

    options: ClassVar[dict[str, Any]] = {"plan": None}

    @classmethod
    def from_plan(cls, plan: SolverPlan, config: Mapping[str, Any], **kwargs: Any) -> PlanScheduler:
        """A scheduler that runs ``plan`` on the model of ``config``; refuses a plan made for another schedule."""
        scheduler: PlanScheduler = cls.from_config(config, plan=plan.to_dict(), **kwargs)
        return scheduler

    def _configure(self) -> None:
        super()._configure()
        source = self.config.plan
        if source is None:
            raise FewstepError(
                "PlanScheduler needs plan=: a path ending in .json, or use PlanScheduler.from_plan(plan, config)"
            )
        self.plan_file = SolverPlan.from_dict(source) if isinstance(source, Mapping) else SolverPlan.load(source)
        self.plan_file.check_schedule(self.schedule)
        self.register_to_config(plan=self.plan_file.to_dict())

    def solver(self) -> Solver:
        raise FewstepError("a PlanScheduler runs a finished plan; it has no solver to compile")

    def _compile(
        self, n: int | None, timesteps: Numbers | None, sigmas: Numbers | Grid | None
    ) -> tuple[Grid | None, SolverPlan]:
        plan = self.plan_file
        own = sigmas is None or (not isinstance(sigmas, Grid) and self._is_placeholder(sigmas))
        if timesteps is not None or not own:
            raise GridError(
                f"plan {plan.method} has its own grid; call set_timesteps({plan.nfe}) without timesteps or sigmas"
            )
        asked = n if sigmas is None else len(sigmas)
        if asked != plan.nfe:
            raise GridError(f"plan {plan.method} has {plan.nfe} network calls, {asked} steps were asked for")
        return None, plan


__all__ = [
    "DDIMScheduler",
    "DEISScheduler",
    "DPMSolverScheduler",
    "PlanScheduler",
    "SchedulerMixin",  # diffusers looks the base class of a saved scheduler up where the scheduler is
    "UniPCScheduler",
]
