"""tune: the cheapest recipe that is good enough, or the best that is cheap enough."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.caching import CachePlan
from fewstep.caching.calibration.runs import Runs
from fewstep.errors import FewstepError
from fewstep.pipelines.recipes.applying import applied
from fewstep.pipelines.recipes.asked import check
from fewstep.pipelines.recipes.parts import Parts, Quantised, Sampler, Tell, quantised, samplers, with_caches
from fewstep.pipelines.recipes.recipe import Recipe

SLACK = 1.2
"""A prediction may be so many times the bound and still be tried: errors do not always add."""
TRIALS = 6
"""Recipes that are measured."""


@dataclass(frozen=True)
class Candidate:
    """One combination, predicted or measured."""

    sampler: Sampler
    cache: CachePlan | None
    quant: Quantised | None
    measured: float | None = None
    """Mean RMS error of held-out latents."""

    @property
    def work(self) -> float:
        """In calls of the unchanged network: calls x share of the MACs x seconds of a quantised call over an unchanged one."""
        share = 1.0 if self.cache is None else float(self.cache.provenance["macs_share"])
        return self.sampler.plan.nfe * share * (1.0 if self.quant is None else self.quant.time)

    @property
    def error(self) -> float:
        """As if the parts' errors were independent."""
        cache = 0.0 if self.cache is None else float(self.cache.provenance["latent_rms"])
        return math.hypot(self.sampler.error, cache, 0.0 if self.quant is None else self.quant.error)

    def summary(self) -> dict[str, Any]:
        return {
            "calls": self.sampler.plan.nfe,
            "cache": None if self.cache is None else self.cache.provenance["macs_share"],
            "quant": None if self.quant is None else self.quant.plan.method,
            "work": round(self.work, 4),
            "predicted": round(self.error, 6),
            "measured": None if self.measured is None or not math.isfinite(self.measured) else round(self.measured, 6),
        }

    def recipe(self, guidance: float | None, provenance: dict[str, Any]) -> Recipe:
        quant = None if self.quant is None else self.quant.plan
        return Recipe(self.sampler.plan, guidance=guidance, cache=self.cache, quant=quant, provenance=provenance)


def tune(
    pipe: Any,
    prompts: Sequence[str] | None = None,
    *,
    quality: float | None = None,
    budget: float | None = None,
    guidance: float | None = None,
    calls: Sequence[int] = (4, 6, 8, 12, 16),
    caches: Sequence[float] = (0.5, 0.7),
    quants: Sequence[Any] | None = None,
    minutes: float = 10.0,
    trajectories: int = 48,
    held_out: int = 8,
    reference: int = 100,
    seed: int = 2_000_000,
    folder: str | Path | None = None,
    call: dict[str, Any] | None = None,
    tell: Tell | None = None,
) -> Recipe:
    """Search sampler, cache and quantisation together for one pipeline.

    Samplers of each number of calls are learned from the pipeline's own trajectories, caches calibrated on them, formats
    tried. What a combination errs by is predicted from its parts, as if these were independent; the promising ones are then
    measured: RMS error of the final latents of samples that nothing was fitted to, against ``reference`` steps of the same
    seeds. Work is counted in calls of the unchanged network: calls x share of the MACs that the cache computes x seconds of
    a quantised call over an unchanged one, measured here.

    Args:
        pipe: a diffusers pipeline with one denoiser that it calls once a step; left as it was.
        prompts: drawn in turn; names of classes, or nothing, where the pipeline takes these.
        quality: the largest error; the recipe with the least work is sought.
        budget: the most work an image, in calls; the recipe with the least error is sought. Give one of the two.
        guidance: the pipeline's default where left out.
        calls: numbers of network calls to learn samplers for.
        caches: shares of the MACs to calibrate caches to, on samplers of at least 8 calls; () for none.
        quants: configs or plans of :mod:`fewstep.quant` whose weights are rounded to the nearest; ``Int8()`` where left out,
            () for none. One that is no faster here is left out.
        minutes: of learning, shared by the samplers; trajectories, caches and measuring come on top.
        trajectories: to learn from and to judge by.
        held_out: samples that recipes are measured on.
        reference: steps of UniPC of order 3 that are the truth, for learning as for measuring.
        seed: of the first trajectory; held-out samples have the seeds after the last.
        folder: where trajectories are kept, so that another search goes on from them.
        call: further arguments of the pipeline.
        tell: told what is being done.

    Returns:
        The recipe; ``provenance`` holds its measured error, its work, and everything tried. ``recipe.plot()`` draws that.

    Raises:
        FewstepError: neither or both of ``quality`` and ``budget``, or another argument that cannot be; nothing keeps the
            bound (the best found is said); a pipeline that has a recipe; a quantisation that needs calibration data.
    """
    check(
        pipe, quality=quality, budget=budget, guidance=guidance, calls=calls, caches=caches, quants=quants, minutes=minutes,
        trajectories=trajectories, held_out=held_out,
    )  # fmt: skip
    say: Tell = tell if tell is not None else lambda text: None
    from fewstep.caching.calibration.calibrate import default_guidance
    from fewstep.eval.drawing.batch import borrowed
    from fewstep.eval.drawing.calling import guided

    scale = default_guidance(pipe) if guidance is None else float(guidance)
    prompts = [prompts] if isinstance(prompts, str) else prompts
    given = list(prompts or [""])
    parts = Parts(pipe, [given[i % len(given)] for i in range(trajectories)], scale, reference, seed, folder, call)
    runs = Runs.of(pipe, prompts, held_out, reference, scale, seed + trajectories, call=call)
    with borrowed(pipe):
        candidates = _candidates(parts, calls, 60 * minutes / len(calls), quants, caches, say)
        measured = _measured(_promising(candidates, quality, budget), quality, runs, say)
    best = _best(measured, candidates, quality, budget)
    tried = {_key(c): c for c in (*candidates, *measured)}
    provenance = {
        **parts.about,
        "tuned_for": {"quality": quality} if quality is not None else {"budget": budget},
        "error": round(_of(best), 6),
        "work": round(best.work, 4),
        "reference": f"UniPC(order=3), {reference} steps",
        "held_out": held_out,
        "tried": [c.summary() for c in sorted(tried.values(), key=lambda c: c.work)],
    }
    return best.recipe(scale if guided(type(pipe)) else None, provenance)


def _candidates(
    parts: Parts, calls: Sequence[int], seconds: float, quants: Sequence[Any] | None, caches: Sequence[float], say: Tell
) -> list[Candidate]:
    found = samplers(parts, calls, seconds, say)
    formats = quantised(parts, found, quants, say)
    cached = with_caches(parts, found, caches, say)
    return [Candidate(s, c, q) for s in found for c in (None, *cached.get(s.plan.nfe, ())) for q in (None, *formats)]


def _measured(promising: Sequence[Candidate], quality: float | None, runs: Runs, say: Tell) -> list[Candidate]:
    """Those that were carried out; for a quality no more than it takes to keep it."""
    if not promising:
        return []
    say(f"reference: {runs.steps} steps")
    truth, done = _truth(runs), list[Candidate]()
    for candidate in promising:
        say(f"measuring {candidate.summary()}")
        error = _error(candidate.recipe(None, {}), runs, truth)
        done.append(replace(candidate, measured=error))
        if quality is not None and error <= quality:
            break
    return done


def _promising(candidates: Sequence[Candidate], quality: float | None, budget: float | None) -> list[Candidate]:
    """Those worth measuring: for a quality the cheapest first, for a budget the best first."""
    if quality is not None:
        hopeful = [c for c in candidates if c.error <= SLACK * quality]
        front = [c for c in hopeful if not any(o.work < c.work and o.error < c.error for o in hopeful)]
        return sorted(front, key=lambda c: c.work)[: 2 * TRIALS] or sorted(candidates, key=lambda c: c.error)[:1]
    affordable = [c for c in candidates if budget is not None and c.work <= budget]
    return sorted(affordable, key=lambda c: c.error)[:TRIALS]


def _best(
    measured: Sequence[Candidate], candidates: Sequence[Candidate], quality: float | None, budget: float | None
) -> Candidate:
    if not measured:
        least = min(candidates, key=lambda c: c.work)
        raise FewstepError(f"nothing costs as little as {budget} calls; the cheapest candidate costs {least.work:.2f}")
    best = min(measured, key=_of)
    if not math.isfinite(_of(best)):
        raise FewstepError(
            f"none of the {len(measured)} recipes that were tried gives finite latents; run the model in float32"
        )
    if quality is None:
        return best
    good = [c for c in measured if _of(c) <= quality]
    if not good:
        raise FewstepError(
            f"no recipe errs by at most {quality:g}; the best one found errs by {_of(best):.4g} with the work of "
            f"{best.work:.2f} calls. Allow more calls or minutes"
        )
    return min(good, key=lambda c: c.work)


def _of(candidate: Candidate) -> float:
    return math.inf if candidate.measured is None else candidate.measured


def _key(candidate: Candidate) -> tuple[int, str | None, str | None]:
    quant = None if candidate.quant is None else str(candidate.quant.plan.provenance)
    return candidate.sampler.plan.nfe, None if candidate.cache is None else candidate.cache.digest, quant


def _truth(runs: Runs) -> Tensor:
    """The held-out latents of many steps; no scheduler of the user's stays changed."""
    from fewstep.samplers import UniPCScheduler

    pipe, before = runs.pipe, runs.pipe.scheduler
    pipe.scheduler = UniPCScheduler.from_config(before.config, solver_order=3, grid="uniform_lambda")
    try:
        latents: Tensor = runs.latents()
    finally:
        pipe.scheduler = before
    if not bool(torch.isfinite(latents).all()):
        raise FewstepError("the reference samples are NaN or infinite; run the model in float32, or at weaker guidance")
    return latents


def _error(recipe: Recipe, runs: Runs, truth: Tensor) -> float:
    """Infinite where a latent is not finite."""
    from fewstep.eval.pairs.latents import latent_rmse

    assert recipe.steps is not None
    with applied(runs.pipe, recipe):
        latents = replace(runs, steps=recipe.steps).latents()
    return float(latent_rmse(latents, truth).mean()) if bool(latents.isfinite().all()) else math.inf
