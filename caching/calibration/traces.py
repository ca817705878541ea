"""What changing a site at one step does to the end: uncached trajectories, replayed up to the step that is changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from fewstep.caching.actions import Action
from fewstep.caching.calibration.recording import Recording, whole_trajectories
from fewstep.caching.calibration.runs import Runs
from fewstep.caching.controller import applied
from fewstep.caching.layers import Call
from fewstep.caching.model_cache import ModelCache
from fewstep.caching.plan import CachePlan
from fewstep.caching.predictors import Hold
from fewstep.caching.store import Cell, Value

Matrix = np.ndarray[Any, np.dtype[np.float64]]
MOST = 8
"""Samples that are followed: each has as many numbers to fit to as its latents."""


@dataclass
class Trace:
    """One batch's uncached trajectory.

    Attributes:
        runs: the samples of the batch.
        sites: what was recorded.
        cells: by stream the sites' memories, which hold the values of all steps.
        outputs: what the network returned, by stream and step.
        latents: where the trajectory ended.
    """

    runs: Runs
    sites: tuple[str, ...]
    cells: dict[str, list[Cell]] = field(default_factory=dict)
    outputs: dict[tuple[str, int], Any] = field(default_factory=dict)
    latents: Tensor = field(default_factory=lambda: torch.zeros(0))

    @classmethod
    def of(cls, runs: Runs, sites: Sequence[str]) -> Trace:
        """Draw the first samples of some runs, at most :data:`MOST` and a batch, and keep everything."""
        count = min(runs.batch, MOST)
        part = replace(runs, prompts=runs.prompts[:count], seeds=runs.seeds[:count])
        trace = cls(part, tuple(sites))

        def observe(call: Call, out: Any) -> None:
            trace.outputs[call.name, call.step] = out
            trace.cells[call.name] = call.stream.cells

        with applied(runs.pipe, Recording(at=trace.sites, steps=runs.positions)) as controller:
            (cache,) = controller.caches
            cache.observers.append(observe)
            trace.latents = part.latents()
        return trace

    def products(self) -> Matrix:
        """(steps, steps): inner products of the sites' values at all pairs of steps, summed over all values there are."""
        total = np.zeros((self.runs.positions, self.runs.positions))
        for cell in chain(*self.cells.values()):
            for part in whole_trajectories(cell):
                rows = [_flat(value) for value in sorted(part.history, key=lambda value: value.step)]
                stacked = torch.stack(rows)
                total += (stacked @ stacked.T).numpy()
        return total

    def changed(self, step: int, past: Sequence[int], scale: float = 1.0) -> list[Tensor]:
        """Change of the final latents where the sites' values at ``step`` are moved towards those of a past step.

        F(step) + scale (F(past) - F(step)) stands for F(step), once for each past step; everything after is computed. The
        change is divided by ``scale``: a small one is a derivative.
        """
        actions = np.zeros((self.runs.positions, len(self.sites)), dtype=np.int8)
        actions[step] = Action.REUSE
        found = []
        with applied(self.runs.pipe, CachePlan(self.sites, actions, Hold())) as controller:
            (cache,) = controller.caches
            replay = _Replay(self, cache, step, scale)
            cache.lesson, cache.teacher = replay.call, replay.teach
            for replay.past in past:
                cache.reset()
                found.append((self.runs.latents() - self.latents) / scale)
        return found


class _Replay:
    """Answers with the recorded outputs before the step; there, the sites' values are mixed with past ones."""

    def __init__(self, trace: Trace, cache: ModelCache, step: int, scale: float) -> None:
        self.trace, self.cache, self.step, self.scale = trace, cache, step, scale
        self.past = 0

    def call(self, run: Callable[[], Any], bare: Callable[[], Any]) -> Any:
        call = self.cache.call
        assert call is not None
        if call.step < self.step:
            return self.trace.outputs[call.name, call.step]
        if call.step == self.step:
            call.stream.cells = self.trace.cells[call.name]
        return run() if call.step == self.step else bare()

    def teach(self, cell: Cell, step: int, true: Any) -> Any:
        old = next(value for value in cell.history if value.step == self.past)
        old.check(cell.site)
        leaves, spec = tree_flatten(true)
        mixed = [
            torch.lerp(new, was, self.scale) if isinstance(new, Tensor) else new
            for new, was in zip(leaves, old.leaves, strict=True)
        ]
        return tree_unflatten(mixed, spec)


def _flat(value: Value) -> Tensor:
    return torch.cat([leaf.double().cpu().flatten() for leaf in value.leaves if isinstance(leaf, Tensor)])
