"""Learned plans in use: which there are for the embedded models, and a warning where one is used for something else."""

from __future__ import annotations

import math
import warnings
import weakref
from pathlib import Path
from typing import Any

from fewstep.errors import ArtifactError, FewstepError, unknown
from fewstep.samplers.plan import SolverPlan
from fewstep.samplers.schedule import NoiseSchedule

FOLDER = Path(__file__).parent / "plans"
MARGIN = 0.05
"""By what share guidance may differ from what a plan was learned for before a warning says so."""


class OutsideCalibration(UserWarning):
    """A learned plan is used for what it was not learned for; it may be worse there than an untuned one."""


def shipped() -> dict[str, tuple[int, ...]]:
    """The numbers of calls for which there are learned plans, by embedded model."""
    found: dict[str, list[int]] = {}
    for path in FOLDER.glob("*.json"):
        name, _, nfe = path.stem.rpartition("-")
        found.setdefault(name, []).append(int(nfe))
    return {name: tuple(sorted(calls)) for name, calls in sorted(found.items())}


def load(model: str, nfe: int) -> SolverPlan:
    """The learned plan that comes with an embedded model.

    Raises:
        FewstepError: there is none for that model, or none of so many calls.
    """
    there = shipped()
    if model not in there:
        raise FewstepError(unknown("model with learned plans", model, there))
    if nfe not in there[model]:
        raise FewstepError(f"{model} has learned plans of {', '.join(map(str, there[model]))} calls, not of {nfe}")
    return SolverPlan.load(FOLDER / f"{model}-{nfe}.json")


def use_(pipe: Any, plan: SolverPlan | str | Path, *, other_model: bool = False) -> None:
    """Let ``pipe`` sample by a learned plan: its scheduler becomes a :class:`~fewstep.samplers.PlanScheduler`.

    Call the pipeline with ``num_inference_steps=plan.nfe`` and the guidance that the plan was learned at. Where a pipeline
    keeps its guidance as ``guidance_scale`` (Stable Diffusion and its kin), another one draws
    :class:`OutsideCalibration` when a run begins.

    Args:
        plan: the plan, or the path of its JSON file.
        other_model: take a plan that was learned with other weights, and be warned.

    Weights in another precision count as others. Those of a quantised network are not compared: they are no more what they
    were.

    Raises:
        ArtifactError: a plan for another noise schedule or prediction type, or for other weights.
    """
    from fewstep.quant import plan_of
    from fewstep.samplers.learn.teaching.capture import denoiser_of
    from fewstep.samplers.schedulers import PlanScheduler

    plan = plan if isinstance(plan, SolverPlan) else SolverPlan.load(plan)
    plan.check_schedule(NoiseSchedule.from_config(pipe.scheduler.config))
    learned_on = plan.provenance.get("model")
    if learned_on is not None and plan_of(network := denoiser_of(pipe)) is None:
        from fewstep.eval import fingerprint

        here = fingerprint.of_module(network)
        if here != learned_on:
            said = f"the plan was learned on weights {learned_on[:12]}, this pipeline has {here[:12]}"
            if not other_model:
                raise ArtifactError(
                    f"{said}, or the same in another precision; learn one for it, or give other_model=True to try this one"
                )
            warnings.warn(said, OutsideCalibration, stacklevel=2)
    scheduler = PlanScheduler.from_plan(plan, pipe.scheduler.config)
    scheduler.on_run = GuidanceCheck(plan, pipe)
    pipe.scheduler = scheduler


class GuidanceCheck:
    """Warns where a run of ``pipe`` begins with guidance that ``plan`` was not learned for.

    Copied along with the pipeline it looks at the copy; copied or pickled without one it looks at none.
    """

    def __init__(self, plan: SolverPlan, pipe: Any = None) -> None:
        self.plan = plan
        self._pipe = None if pipe is None else weakref.ref(pipe)

    def __call__(self) -> None:
        pipe = self._pipe() if self._pipe is not None else None
        scale = getattr(pipe, "guidance_scale", None)
        if scale is not None:
            check_guidance(self.plan, float(scale))

    def __deepcopy__(self, memo: dict[int, Any]) -> GuidanceCheck:
        pipe = self._pipe() if self._pipe is not None else None
        return GuidanceCheck(self.plan, None if pipe is None else memo.get(id(pipe)))

    def __reduce__(self) -> tuple[Any, ...]:
        return GuidanceCheck, (self.plan,)


def check_guidance(plan: SolverPlan, guidance: float) -> None:
    """Warn with :class:`OutsideCalibration` where ``guidance`` is not among what the plan was learned for."""
    known = plan.provenance.get("guidance")
    if not known:
        return
    low, high = (max(1.0, float(g)) for g in known)  # at most 1 is without
    if not low * (1 - MARGIN) <= max(1.0, guidance) <= high * (1 + MARGIN) or not math.isfinite(guidance):
        span = f"{low:g}" if low == high else f"{low:g} to {high:g}"
        warnings.warn(
            f"this plan was learned at guidance {span} and is used at {guidance:g}; learn one for it",
            OutsideCalibration,
            stacklevel=4,  # who called set_timesteps
        )
