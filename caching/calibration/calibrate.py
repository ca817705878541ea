"""calibrate: from a method and a budget to a plan, decided on samples that nothing was fitted to."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from fewstep.caching.calibration.budget import Budget, as_budget
from fewstep.caching.calibration.quality import Quality
from fewstep.caching.calibration.runs import Runs
from fewstep.caching.controller import controller_of
from fewstep.caching.families import family_of
from fewstep.caching.method import Method
from fewstep.caching.methods.dp_cache import DPCache
from fewstep.caching.methods.erta import ERTACache
from fewstep.caching.methods.router import Router
from fewstep.caching.plan import CachePlan
from fewstep.errors import FewstepError

Tick = Callable[[str], None]


def calibrate(
    pipe: Any,
    method: Method,
    prompts: Sequence[str] | None = None,
    *,
    num_inference_steps: int,
    guidance_scale: float | None = None,
    budget: Budget | float | None = None,
    samples: int = 16,
    held_out: int = 8,
    seed: int = 10_000,
    batch: int = 8,
    call: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> CachePlan:
    """The best plan that keeps a budget, found on some samples and judged on others.

    Args:
        pipe: a diffusers pipeline with the scheduler that it will be used with; left as it was.
        method: :class:`DPCache`, :class:`Router`, :class:`ERTACache`, or a method with one knob (``DeepCache``'s interval, a
            threshold), which is then turned.
        prompts: drawn in turn; names of classes, or nothing, where the pipeline takes these.
        num_inference_steps: steps of the plan.
        guidance_scale: the pipeline's default where left out.
        budget: a share of the MACs, or a :class:`Budget`; the method's own where left out.
        samples: all samples, those held out among them.
        held_out: samples that decide; nothing is fitted to them.
        seed: of the first sample; the others count on.
        batch: samples drawn at once.
        call: further arguments of the pipeline.
        progress: whether to show a bar.

    Returns:
        the plan, with MACs, the held-out error and its 95 % interval, and what it was made of in ``provenance``.

    Raises:
        FewstepError: for a budget that no plan keeps (the best possible is said), a pipeline that has a cache already or
            several networks, or latents that are not finite.
    """
    from fewstep.eval.costs.calls import denoisers

    if controller_of(pipe) is not None:
        raise FewstepError("the pipeline has a cache; take it away before calibrating (caching.remove_)")
    if not isinstance(method, Method):
        raise FewstepError(
            f"method is of type {type(method).__name__}; give one to calibrate, such as caching.DPCache(budget=0.5)"
        )
    if (count := len(denoisers(pipe))) != 1:
        raise FewstepError(f"{type(pipe).__name__} has {count} networks; a cache is calibrated for pipelines with one")
    guidance = default_guidance(pipe) if guidance_scale is None else guidance_scale
    runs = Runs.of(pipe, prompts, samples, num_inference_steps, guidance, seed, batch, call)
    runs.split(held_out)  # refused before anything is drawn
    wanted = as_budget(budget, getattr(method, "budget", None))
    runs = runs.followed()
    if runs.first and isinstance(method, DPCache | Router | ERTACache):
        raise FewstepError(
            f"the call begins at position {runs.first} of {runs.positions}, and {type(method).__name__} is calibrated on whole "
            "trajectories; a method with a knob, such as TaylorSeer, can be calibrated on parts"
        )
    train, test = runs.split(held_out)
    with _bar(progress) as tick:
        if isinstance(method, DPCache):
            from fewstep.caching.calibration.search import search

            plan, quality = search(method, wanted, train, test, tick)
        elif isinstance(method, Router):
            from fewstep.caching.calibration.routing import train as trained

            plan, quality = trained(method, wanted, train, test, tick)
        elif isinstance(method, ERTACache):
            from fewstep.caching.calibration.rectifying import rectified

            plan, quality = rectified(method, wanted, train, test, tick)
        else:
            from fewstep.caching.calibration.knobs import turn

            plan, quality = turn(method, wanted, test, tick, train=train)
    if not math.isfinite(quality.latent_rms):
        raise FewstepError(
            f"{type(pipe).__name__} ends with latents that are not finite even with the best cache; run it in float32"
        )
    return _with_provenance(plan, quality, wanted, runs, held_out)


def _with_provenance(plan: CachePlan, quality: Quality, budget: Budget, runs: Runs, held_out: int) -> CachePlan:
    family = family_of(_network(runs.pipe))
    return replace(
        plan,
        model={"class": family.name, "config": family.config_hash},
        scheduler=type(runs.pipe.scheduler).__name__,
        provenance={
            **plan.provenance,
            "budget": {budget.name: budget.value},
            "steps": runs.steps,
            "guidance": runs.guidance,
            "prompts": sorted(set(runs.prompts)),
            "seeds": [runs.seeds[0], runs.seeds[-1]],
            "held_out": held_out,
            "call": {name: value for name, value in runs.call.items() if isinstance(value, str | int | float | bool)},
            "adapters": family.adapters,
            **quality.summary(),
        },
    )


def _network(pipe: Any) -> torch.nn.Module:
    from fewstep.eval.costs.calls import denoisers

    return denoisers(pipe)[0]


def default_guidance(pipe: Any) -> float:
    """What the pipeline takes for its ``guidance_scale`` where nothing is said; 1 where it takes none."""
    parameter = inspect.signature(type(pipe).__call__).parameters.get("guidance_scale")
    return float(parameter.default) if parameter is not None and isinstance(parameter.default, int | float) else 1.0


class _bar:
    """A progress line that says what is being done; the number of runs is not known ahead."""

    def __init__(self, shown: bool) -> None:
        self.shown = shown

    def __enter__(self) -> Tick:
        if not self.shown:
            return lambda what: None
        from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        self.progress = Progress(
            SpinnerColumn(), TextColumn("{task.completed} runs, {task.description}"), TimeElapsedColumn()
        )
        self.progress.start()
        task = self.progress.add_task("calibrating", total=None)
        return lambda what: self.progress.update(task, advance=1, description=what)

    def __exit__(self, *raised: object) -> None:
        if self.shown:
            self.progress.stop()
