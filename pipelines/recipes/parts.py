"""What recipes are put together from: learned samplers, calibrated caches and formats, each with the error it makes alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from fewstep.caching import CachePlan
from fewstep.errors import FewstepError
from fewstep.pipelines.recipes.applying import denoiser
from fewstep.quant import QuantPlan
from fewstep.samplers import PlanScheduler, SolverPlan, learn

FEWEST_CACHED = 8
"""Calls below which neighbouring steps are too far apart for a cache to be worth its calibration."""
FASTER = 0.97
"""What a quantised call may take of an unchanged one's time to count as faster."""

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Sampler:
    """A plan and its mean RMS error on held-out trajectories."""

    plan: SolverPlan
    error: float


@dataclass(frozen=True)
class Quantised:
    """A plan of formats, how far it moves the latents, and the time of a call over that of the unchanged network."""

    plan: QuantPlan
    error: float
    time: float


class Parts:
    """One pipeline with its trajectories."""

    def __init__(
        self, pipe: Any, prompts: Sequence[str], guidance: float, steps: int, seed: int, folder: str | Path | None,
        call: dict[str, Any] | None,
    ) -> None:  # fmt: skip
        self.pipe, self.prompts, self.guidance, self.seed, self.call = pipe, prompts, guidance, seed, call
        seeds = range(seed, seed + len(prompts))
        self.teacher = learn.Teacher(pipe, prompts, guidance, steps, seeds, folder=folder, call=call)

    @cached_property
    def problem(self) -> learn.Problem:
        return self.teacher.problem()

    @cached_property
    def judge(self) -> learn.Problem:
        """The trajectories that no sampler is learned from."""
        return self.problem.split(max(1, len(self.problem) // 3))[1]

    @property
    def about(self) -> dict[str, Any]:
        return dict(self.teacher.about)


def samplers(parts: Parts, calls: Sequence[int], seconds: float, tell: Tell) -> list[Sampler]:
    """A learned plan of each number of calls."""
    found = []
    tell(f"teacher: {len(parts.prompts)} trajectories")
    judged = len(parts.judge)
    for nfe in sorted(set(calls)):
        tell(f"sampler of {nfe} calls")
        plan = learn.tune(parts.problem, nfe, seconds=seconds, held_out=judged)
        found.append(Sampler(plan, float(plan.provenance["error_after"])))
    return found


def quantised(parts: Parts, found: Sequence[Sampler], configs: Sequence[Any] | None, tell: Tell) -> list[Quantised]:
    """The formats that are faster here, with what they do to the latents of a sampler of a middling number of calls."""
    from fewstep import quant

    plan = found[len(found) // 2].plan
    network, made = denoiser(parts.pipe), []
    some = parts.judge.take(slice(0, 8))
    with torch.no_grad():
        for config in [quant.Int8()] if configs is None else configs:
            tell(f"quantisation {type(config).__name__}")
            exact, before = learn.run(plan, some).end, _seconds(plan, some)
            try:
                report = quant.quantize_(network, config)
            except FewstepError as error:
                if configs is not None:
                    raise
                tell(f"no int8 here: {error}")
                continue
            try:
                moved, after = learn.run(plan, some).end, _seconds(plan, some)
            finally:
                quant.dequantize_(network)
            if after < FASTER * before:
                error_ = float((moved - exact).flatten(1).square().mean(1).sqrt().mean())
                made.append(Quantised(report.plan, error_, after / before))
            else:
                tell(f"{type(config).__name__} is no faster here ({after / before:.2f} of the time) and left out")
    return made


def _seconds(plan: SolverPlan, problem: learn.Problem) -> float:
    """Of one network call."""
    from fewstep.eval.costs.clock import wall_clock

    time = float(plan.model_time[0])
    return wall_clock(lambda: problem.network(problem.noise, time, problem.which)).median


def with_caches(
    parts: Parts, found: Sequence[Sampler], shares: Sequence[float], tell: Tell
) -> dict[int, list[CachePlan]]:
    """For each sampler of enough calls a cache a share of the MACs, where that can be kept."""
    from fewstep import caching

    pipe, made = parts.pipe, dict[int, list[CachePlan]]()
    before = pipe.scheduler
    for sampler in found:
        if sampler.plan.nfe < FEWEST_CACHED:
            continue
        for share in shares:
            tell(f"cache at {share:.0%} of {sampler.plan.nfe} calls")
            try:
                pipe.scheduler = PlanScheduler.from_plan(sampler.plan, before.config)
                plan = caching.calibrate(
                    pipe, caching.DPCache(budget=share, refine=6, polish=1), parts.prompts, num_inference_steps=sampler.plan.nfe,
                    guidance_scale=parts.guidance, seed=parts.seed, call=parts.call, progress=False,
                )  # fmt: skip
            except FewstepError as error:
                tell(f"no cache: {error}")
                continue
            finally:
                pipe.scheduler = before
            made.setdefault(sampler.plan.nfe, []).append(plan)
    return made
