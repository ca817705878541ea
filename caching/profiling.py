"""Profiling: what online methods decide on some prompts becomes a plan, and what features do becomes a method's data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from fewstep.caching.actions import Action
from fewstep.caching.calibration.runs import Runs
from fewstep.caching.controller import applied, controller_of
from fewstep.caching.families import Family
from fewstep.caching.layers import Call
from fewstep.caching.method import Decider, Entry, Method, Planned
from fewstep.caching.model_cache import ModelCache
from fewstep.caching.plan import CachePlan
from fewstep.errors import FewstepError


def profile(
    pipe: Any,
    method: Method,
    prompts: Sequence[str] | None = None,
    *,
    num_inference_steps: int,
    guidance_scale: float | None = None,
    samples: int = 16,
    seed: int = 10_000,
    batch: int = 1,
    call: Mapping[str, Any] | None = None,
) -> CachePlan:
    """The plan that an online method follows most often: at every step and site what it decided for most prompts.

    A plan needs no signal and no number from the device, has a cost that is known ahead, and is the same for every prompt;
    what it gives up is that prompts differ. How far they do is in the plan's ``provenance`` as ``agreement``: the share of
    decisions that are the plan's.

    Args:
        pipe: a diffusers pipeline with the scheduler that it will be used with; left as it was.
        method: an online method; a static one is compiled.
        prompts: drawn in turn; names of classes, or nothing, where the pipeline takes these.
        num_inference_steps: steps of the plan.
        guidance_scale: the pipeline's default where left out.
        samples, seed, batch: how many samples, the seed of the first, and how many at once. An online method decides once
            for a batch, so one at once lets every sample vote.
        call: further arguments of the pipeline.

    Raises:
        FewstepError: for what is no method, and where the pipeline has a cache already or lacks the method's sites.
    """
    if not isinstance(method, Method):
        raise FewstepError(
            f"method is of type {type(method).__name__}; give one to profile, such as caching.TeaCache(0.2)"
        )
    runs = pipeline_runs(pipe, prompts, samples, num_inference_steps, guidance_scale, seed, batch, call)
    return profiled(runs, method)


def profiled(runs: Runs, method: Method) -> CachePlan:
    """:func:`profile` on given runs.

    Raises:
        FewstepError: where the method decided nothing, or the pipeline has several networks.
    """
    with applied(runs.pipe, method) as controller:
        if len(controller.caches) != 1:
            raise FewstepError(
                f"{type(runs.pipe).__name__} has {len(controller.caches)} networks; profile each by itself"
            )
        (cache,) = controller.caches
        for begin in range(0, len(runs) if method.online else 1, runs.batch):
            runs.batch_latents(begin)
        if not cache.log:
            raise FewstepError(f"{method.describe()} decided nothing: the network was not called, or none of its sites")
        decider = cache.streams()[0].deciders[0]
        if isinstance(decider, Planned):  # compiled for the positions and times of the run
            return replace(decider.plan, provenance={**decider.plan.provenance, "steps": runs.steps})
    positions = 1 + max(step for step, _, _ in cache.log)  # more than steps where the scheduler calls twice a step
    counts = np.zeros((positions, len(cache.sites), len(Action)), dtype=np.int64)
    for (step, site, action), times in cache.log.items():
        counts[step, site, action] += times
    return CachePlan(
        tuple(site.name for site in cache.sites),
        counts.argmax(2).astype(np.int8),
        method.predictor,
        {"class": cache.family.name},
        type(runs.pipe.scheduler).__name__,
        method.describe(),
        {"steps": runs.steps, "samples": len(runs), "agreement": float(counts.max(2).sum() / counts.sum())},
    )


@dataclass(frozen=True)
class Sight:
    """What a step of an uncached trajectory shows.

    Attributes:
        step: its position.
        entry: the call of the site's first module.
        value: the site's value, its first tensor (of a range of blocks the residual of the hidden states).
        output: what the network predicted.
    """

    step: int
    entry: Entry
    value: Tensor
    output: Tensor


See = Callable[[Sight], None]


@dataclass(frozen=True)
class _Watching(Method):
    """Computes everything and shows what it sees; ``begin()`` makes who sees a trajectory of a stream."""

    online: ClassVar[bool] = True
    at: Callable[[Family], str]
    begin: Callable[[], See]

    def sites(self, family: Family) -> list[str]:
        return [self.at(family)]

    def decider(self, family: Family, steps: int | None) -> Decider:
        return _Watcher(self.begin())


class _Watcher:
    def __init__(self, see: See) -> None:
        self.see = see
        self.entry: Entry | None = None

    def __call__(self, entry: Entry) -> Action:
        self.entry = entry
        return Action.COMPUTE

    def keeps(self, step: int, site: int) -> bool:
        return True


def watch_runs(
    pipe: Any,
    at: Callable[[Family], str],
    begin: Callable[[], See],
    *,
    prompts: Sequence[str] | None,
    num_inference_steps: int,
    guidance_scale: float | None = None,
    samples: int = 1,
    seed: int = 10_000,
    batch: int = 8,
    call: Mapping[str, Any] | None = None,
) -> None:
    """Draw some samples without any reuse and show every step of every stream.

    Args:
        pipe: a diffusers pipeline; left as it was.
        at: names the site that is looked at.
        begin: makes, for each trajectory of each stream, the function that is shown its steps.
        prompts, num_inference_steps, guidance_scale, samples, seed, batch, call: as of :func:`profile`.
    """
    runs = pipeline_runs(pipe, prompts, samples, num_inference_steps, guidance_scale, seed, batch, call)
    with applied(pipe, _Watching(at, begin)) as controller, _observed(controller.caches):
        for start in range(0, len(runs), runs.batch):
            runs.batch_latents(start)


@contextmanager
def _observed(caches: Sequence[ModelCache]) -> Iterator[None]:
    for cache in caches:
        cache.observers.append(_show)
    try:
        yield
    finally:
        for cache in caches:
            cache.observers.remove(_show)


def _show(call: Call, output: Any) -> None:
    watcher, cell = call.stream.deciders[0], call.stream.cells[0]
    if not isinstance(watcher, _Watcher) or watcher.entry is None:
        return
    tensors = [leaf for leaf in cell.history[0].leaves if isinstance(leaf, Tensor)] if cell.history else []
    if not tensors:
        raise FewstepError(
            f"site {cell.site!r} has no single value to look at; give a range of blocks, a branch or a module"
        )
    first = output if isinstance(output, Tensor) else output[0]
    watcher.see(Sight(call.step, watcher.entry, tensors[0], first))


def pipeline_runs(
    pipe: Any,
    prompts: Sequence[str] | None,
    samples: int,
    steps: int,
    guidance: float | None,
    seed: int,
    batch: int,
    call: Mapping[str, Any] | None,
) -> Runs:
    from fewstep.caching.calibration.calibrate import default_guidance

    if controller_of(pipe) is not None:
        raise FewstepError("the pipeline has a cache; take it away before profiling (caching.remove_)")
    chosen = default_guidance(pipe) if guidance is None else guidance
    return Runs.of(pipe, prompts, samples, steps, chosen, seed, batch, call)
