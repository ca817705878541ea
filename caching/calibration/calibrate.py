"""calibrate: from a method and a budget to a plan, decided on samples that nothing was fitted to."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.caching.actions import Action
from fewstep.caching.calibration.budget import Budget, as_budget
from fewstep.caching.calibration.fitting import fit
from fewstep.caching.calibration.gram import Gram
from fewstep.caching.calibration.quality import Quality, measure
from fewstep.caching.calibration.recording import grams, sensitivity
from fewstep.caching.calibration.runs import Runs
from fewstep.caching.calibration.schedule import Cost, best_keys, even_keys
from fewstep.caching.controller import applied, controller_of
from fewstep.caching.cost import row_macs
from fewstep.caching.families import family_of
from fewstep.caching.method import Method
from fewstep.caching.methods.dp_cache import DPCache
from fewstep.caching.methods.erta import ERTACache
from fewstep.caching.methods.router import Router
from fewstep.caching.plan import Actions, CachePlan
from fewstep.caching.predictors import Affine, Extrapolate
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
        FewstepError: for a budget that no plan keeps (the best possible is said), a pipeline that has a cache already, or
            images that are not finite.
    """
    if controller_of(pipe) is not None:
        raise FewstepError("the pipeline has a cache; take it away before calibrating (caching.remove_)")
    guidance = default_guidance(pipe) if guidance_scale is None else guidance_scale
    runs = Runs.of(pipe, prompts, samples, num_inference_steps, guidance, seed, batch, call)
    train, test = runs.split(held_out)
    wanted = as_budget(budget, getattr(method, "budget", None))
    with _bar(progress) as tick:
        if isinstance(method, DPCache):
            plan, quality = _dp(method, wanted, train, test, tick)
        elif isinstance(method, Router):
            from fewstep.caching.calibration.routing import train as trained

            plan, quality = trained(method, wanted, train, test, tick)
        elif isinstance(method, ERTACache):
            from fewstep.caching.calibration.rectifying import rectified

            plan, quality = rectified(method, wanted, train, test, tick)
        else:
            from fewstep.caching.calibration.knobs import turn

            plan, quality = turn(method, wanted, test, tick)
    return _with_provenance(plan, quality, wanted, runs, held_out)


def _with_provenance(plan: CachePlan, quality: Quality, budget: Budget, runs: Runs, held_out: int) -> CachePlan:
    model = _network(runs.pipe)
    return replace(
        plan,
        model={"class": type(model).__name__, "config": family_of(model).config_hash},
        scheduler=type(runs.pipe.scheduler).__name__,
        provenance={
            **plan.provenance,
            "budget": {budget.name: budget.value},
            "steps": runs.steps,
            "guidance": runs.guidance,
            "prompts": sorted(set(runs.prompts)),
            "seeds": [runs.seeds[0], runs.seeds[-1]],
            "held_out": held_out,
            **quality.summary(),
        },
    )


@dataclass
class _Candidate:
    site: str
    share: float
    """Share of a full call's MACs that a reused step takes."""
    cost: Cost


def _dp(method: DPCache, budget: Budget, train: Runs, test: Runs, tick: Tick) -> tuple[CachePlan, Quality]:
    model = _network(train.pipe)
    sites = method.candidates(family_of(model))
    uncached_test = test.latents()
    tick("uncached runs")
    few = replace(train, prompts=train.prompts[: train.batch], seeds=train.seeds[: train.batch])
    tried: list[tuple[CachePlan, Quality, _Candidate]] = []
    best_possible, uncached = 1.0, uncached_test
    for site in sites:
        candidate, uncached = _candidate(site, method, train, few, tick)
        best_possible = min(best_possible, (1 + candidate.share * (train.steps - 1)) / train.steps)
        judge = _judge(candidate, method, train, test, uncached_test, budget.name, tick)
        if budget.name == "macs":
            count = _affordable(budget.value, candidate.share, train.steps)
            if count >= 1:
                tried.append((*judge(count), candidate))
        elif (found := _fewest(judge, budget, train.steps)) is not None:
            tried.append((*found, candidate))
    if not tried:
        raise FewstepError(_cannot(budget, best_possible))
    plan, quality, candidate = min(tried, key=lambda t: t[1].latent_rms if budget.name == "macs" else t[1].macs_share)
    if method.refine:
        plan, quality = _refined(plan, quality, candidate, method, train, test, uncached, uncached_test, tick)
    return replace(plan, method=method.describe()), quality


def _candidate(site: str, method: DPCache, train: Runs, few: Runs, tick: Tick) -> tuple[_Candidate, Tensor]:
    """A site with what reusing it costs, in work and in expected error of the final latents."""
    recorded, uncached = grams(train, [site])
    tick(f"{site}: features")
    moved = sensitivity(few, site, uncached[: len(few)], lambda: tick(f"{site}: sensitivity"))
    weights = np.array([0.0] + [moved[i] / max(_held(recorded, i, i - 1), 1e-30) for i in range(1, train.steps)])
    remembered: dict[tuple[int, int, int], float] = {}

    def cost(step: int, key: int, earlier: int) -> float:
        place = (step, key, earlier if method.depth > 1 else -1)
        if place not in remembered:
            past = [key] if place[2] < 0 else [key, earlier]
            remembered[place] = weights[step] * sum(_relative(g, g.left(step, past)) for g in recorded.values())
        return remembered[place]

    plan = CachePlan((site,), np.zeros((1, 1), dtype=np.int8))
    full, reused = row_macs(plan, _network(train.pipe), np.ones((1, 1), dtype=np.int8))
    return _Candidate(site, reused / full, cost), uncached


def _relative(gram: Gram, left: float) -> float:
    """A remaining error as a share of what the site's values are, so that values of several sizes can be summed."""
    return left / max(float(np.mean([gram.scale(t) for t in range(gram.steps)])), 1e-30)


def _held(recorded: Mapping[str, Gram], step: int, past: int) -> float:
    return sum(_relative(gram, gram.held(step, past)) for gram in recorded.values())


def _affordable(share: float, reused: float, steps: int) -> int:
    """The most steps that can be computed in full within a share of the MACs."""
    return min(steps, int((share - reused) * steps / (1 - reused) + 1e-9)) if reused < 1 else 0


Judge = Callable[[int], tuple[CachePlan, Quality]]


def _judge(
    candidate: _Candidate, method: DPCache, train: Runs, test: Runs, uncached: Tensor, bound: str, tick: Tick
) -> Judge:
    """Of a number of computed steps the best plan by its held-out quality.

    Two schedules, the one that costs least by what was recorded and an even one, each with the fitted correction and with
    plain extrapolation: what was recorded does not see how errors add up, so the held-out samples choose.
    """

    def judge(count: int) -> tuple[CachePlan, Quality]:
        share = (count + candidate.share * (train.steps - count)) / train.steps
        found = []
        for keys in {best_keys(train.steps, count, candidate.cost), even_keys(train.steps, count)}:
            for fitted in (True, False):
                plan = _made(candidate.site, keys, method, train, fitted)[0]
                found.append((plan, measure(plan, test, uncached, share, bound)))
                tick(f"{candidate.site}: {count} of {train.steps} steps")
        return min(found, key=lambda pair: pair[1].latent_rms)

    return judge


def _fewest(judge: Judge, budget: Budget, steps: int) -> tuple[CachePlan, Quality] | None:
    """The fewest computed steps that keep a bound on quality, by bisection; None where not even half the errors do."""
    low, high, found = 0, steps, None
    while high - low > 1:
        count = (low + high) // 2
        made = judge(count)
        if budget.met(made[1].values(budget.name)):
            high, found = count, made
        else:
            low = count
    return found


def _made(
    site: str, keys: Sequence[int], method: DPCache, train: Runs, fitted: bool, latents: bool = False
) -> tuple[CachePlan, Tensor | None]:
    """The plan of a schedule, and where asked for the latents that it leads to on the samples of the fit."""
    actions = _actions(keys, train.steps)
    if fitted:
        predictor, reached = fit(train, (site,), actions, method.depth)
        return CachePlan((site,), actions, predictor), reached
    plan = CachePlan((site,), actions, Extrapolate(method.depth - 1))
    if not latents:
        return plan, None
    with applied(train.pipe, plan):
        return plan, train.latents()


def _actions(keys: Sequence[int], steps: int) -> Actions:
    actions = np.full((steps, 1), Action.REUSE, dtype=np.int8)
    actions[list(keys)] = Action.COMPUTE
    return actions


def _refined(
    plan: CachePlan,
    quality: Quality,
    candidate: _Candidate,
    method: DPCache,
    train: Runs,
    test: Runs,
    uncached: Tensor,
    uncached_test: Tensor,
    tick: Tick,
) -> tuple[CachePlan, Quality]:
    """Hill climbing on the measured error of the fitted samples: one computed step is moved at a time.

    The start stays if the held-out samples do not confirm what was found.
    """
    rng = random.Random(0)
    keys = tuple(int(i) for i in np.flatnonzero(plan.actions[:, 0] == Action.COMPUTE))
    fitted = isinstance(plan.predictor, Affine)
    error = _error(_made(candidate.site, keys, method, train, fitted, latents=True)[1], uncached)
    seen = {keys}
    for _ in range(method.refine):
        moved = _moved(keys, train.steps, rng, seen)
        if moved is None:
            break
        seen.add(moved)
        found, latents = _made(candidate.site, moved, method, train, fitted, latents=True)
        reached = _error(latents, uncached)
        tick(f"{candidate.site}: refine")
        if reached < error:
            keys, error = moved, reached
            better = found
            plan_quality = measure(better, test, uncached_test, quality.macs_share)
            if plan_quality.latent_rms < quality.latent_rms:
                plan, quality = better, plan_quality
    return plan, quality


def _moved(keys: tuple[int, ...], steps: int, rng: random.Random, seen: set[tuple[int, ...]]) -> tuple[int, ...] | None:
    """Keys with one of them, not the first, moved to a free step, mostly near by; None where nothing new is found."""
    for _ in range(200):
        if len(keys) < 2:
            return None
        chosen = rng.choice(keys[1:])
        place = chosen + rng.choice((-2, -1, 1, 2)) if rng.random() < 0.7 else rng.randrange(1, steps)
        moved = tuple(sorted({*keys} - {chosen} | {place}))
        if 0 < place < steps and len(moved) == len(keys) and moved not in seen:
            return moved
    return None


def _error(latents: Tensor | None, uncached: Tensor) -> float:
    assert latents is not None
    error = float((latents - uncached).double().flatten(1).square().mean(1).sqrt().mean())
    return error if np.isfinite(error) else float("inf")


def _cannot(budget: Budget, best_possible: float) -> str:
    if budget.name == "macs":
        return (
            f"{budget.value:.0%} of the MACs cannot be kept: with one step computed in full it is {best_possible:.1%}; "
            "give at least that, or take fewer steps"
        )
    return f"no plan keeps {budget.name} {budget.value:g} without computing nearly every step; give a looser bound"


def _network(pipe: Any) -> torch.nn.Module:
    from fewstep.eval.costs.calls import denoisers

    return denoisers(pipe)[0]


def default_guidance(pipe: Any) -> float:
    parameter = inspect.signature(type(pipe).__call__).parameters.get("guidance_scale")
    return float(parameter.default) if parameter is not None and parameter.default is not parameter.empty else 1.0


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
