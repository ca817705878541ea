"""What the features of sites do along uncached trajectories, and how much each step matters for where they end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from fewstep.caching.actions import Action
from fewstep.caching.calibration.gram import Gram
from fewstep.caching.calibration.runs import Runs
from fewstep.caching.controller import Controller, applied
from fewstep.caching.families import Family
from fewstep.caching.method import Decider, Entry, Method
from fewstep.caching.plan import CachePlan
from fewstep.caching.predictors import Hold, Predictor
from fewstep.caching.store import Cell


@dataclass(frozen=True)
class _All(Predictor):
    """Keeps every value of a trajectory."""

    steps: int = 1

    @property
    def depth(self) -> int:
        return self.steps


class _Computing:
    def __call__(self, entry: Entry) -> Action:
        return Action.COMPUTE

    def keeps(self, step: int, site: int) -> bool:
        return True


@dataclass(frozen=True)
class Recording(Method):
    """Computes everything and keeps the values of all steps at the named sites."""

    online = True
    at: tuple[str, ...] = ()
    steps: int = 1

    def sites(self, family: Family) -> list[str]:
        return list(self.at)

    @property
    def predictor(self) -> Predictor:
        return _All(self.steps)

    def decider(self, family: Family, steps: int | None) -> Decider:
        return _Computing()


def grams(runs: Runs, sites: Sequence[str]) -> tuple[dict[str, Gram], Tensor]:
    """For every value of the sites its :class:`Gram`, and the latents of the uncached runs.

    A site with several values (the encoder) has one of each, named ``site:path``.
    """
    found: dict[str, Gram] = {}
    latents = []
    with applied(runs.pipe, Recording(at=tuple(sites), steps=runs.steps)) as controller:
        for begin in range(0, len(runs), runs.batch):
            latents.append(runs.batch_latents(begin))
            for cell in _cells(controller):
                values = [tree_flatten(value.tree())[0] for value in reversed(cell.history)]
                for i, leaf in enumerate(values[0]):
                    if isinstance(leaf, Tensor):
                        name = cell.site if len(values[0]) == 1 else f"{cell.site}:{i}"
                        found.setdefault(name, Gram()).add([leaves[i] for leaves in values])
            controller.reset()
    return found, torch.cat(latents)


def _cells(controller: Controller) -> Iterator[Cell]:
    """The memories that hold whole trajectories."""
    for cache in controller.caches:
        for stream in cache.streams():
            for cell in stream.cells:
                for part in (cell, *cell.parts.values()):
                    if len(part.history) > 1:
                        yield part


def sensitivity(
    runs: Runs, site: str, uncached: Tensor, tick: Callable[[], None] = lambda: None
) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """(steps,): mean square change of the final latents when the site is held at one step alone; NaN at step 0."""
    out = np.full(runs.steps, np.nan)
    for step in range(1, runs.steps):
        actions = np.zeros((runs.steps, 1), dtype=np.int8)
        actions[step] = Action.REUSE
        with applied(runs.pipe, CachePlan((site,), actions, Hold())):
            out[step] = float((runs.latents() - uncached).double().square().mean())
        tick()
    return out
