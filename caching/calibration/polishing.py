"""The weights of a schedule's predictions, fitted to where the trajectory ends.

At each reused step the site's value is sum_j w_j F(k_j) of the last few computed values, sum_j w_j = 1, the same for all
channels. That is a handful of numbers a plan, so Gauss-Newton's method can take the end itself for its target: the final
latents of the cached runs against those of the uncached ones, with finite differences for derivatives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.caching.actions import Action
from fewstep.caching.calibration.runs import Runs
from fewstep.caching.controller import applied
from fewstep.caching.plan import Actions, CachePlan
from fewstep.caching.predictors import Affine, Extrapolate

Vector = np.ndarray[Any, np.dtype[np.float64]]
STEP = 0.05
"""Difference of a weight in a derivative; weights are of the size of 1."""
DAMPING = (1e-3, 1e-2, 1e-1, 1.0)
"""Levenberg's, as a share of the mean curvature: the first that helps is taken."""


@dataclass(frozen=True)
class Weighted:
    """A plan's predictions as numbers.

    Attributes:
        site: what is cached.
        actions: (steps, 1) its schedule.
        weights: (steps, depth) of the last computed values, newest first; zeros where there are not so many.
    """

    site: str
    actions: Actions
    weights: Vector

    @classmethod
    def polynomial(cls, site: str, actions: Actions, depth: int, order: int) -> Weighted:
        """Every prediction the polynomial of a degree through the last values."""
        weights = np.zeros((len(actions), depth))
        weights[:, 0] = 1
        rule = Extrapolate(order)
        for step, past in _reused(actions, depth):
            row = rule.weights(past[: order + 1], step)
            weights[step] = [*row, *[0.0] * (depth - len(row))]
        return cls(site, actions, weights)

    @property
    def plan(self) -> CachePlan:
        """As one applies it."""
        table = torch.from_numpy(self.weights[:, :, None]).float()
        past = torch.full(self.weights.shape, -1)
        for step, steps in _reused(self.actions, self.weights.shape[1]):
            past[step, : len(steps)] = torch.tensor(steps)
        shift = torch.zeros(len(self.weights), 1)
        return CachePlan((self.site,), self.actions, Affine({self.site: table}, {self.site: shift}, {self.site: past}))

    @property
    def free(self) -> list[tuple[int, int]]:
        """(step, j) of the weights that can be chosen; the newest value's makes up the sum."""
        depth = self.weights.shape[1]
        return [(step, j) for step, past in _reused(self.actions, depth) for j in range(1, len(past))]

    def moved(self, change: Vector) -> Weighted:
        """With the free weights changed, one number each."""
        weights = self.weights.copy()
        for (step, j), by in zip(self.free, change, strict=True):
            weights[step, j] += by
            weights[step, 0] -= by
        return replace(self, weights=weights)


def polished(
    start: Weighted, runs: Runs, uncached: Tensor, iterations: int, tick: Callable[[], None] = lambda: None
) -> Iterator[Weighted]:
    """The weights after each of some steps of Gauss and Newton that make the mean RMS change of the samples' latents less.

    A mean of root mean squares is a sum of squares weighted by their roots: so a sample that is far off does not decide for
    all. An iteration takes one cached trajectory of all samples for each free weight.
    """

    def change(made: Weighted) -> Vector:
        with applied(runs.pipe, made.plan):
            latents = runs.latents()
        tick()
        off: Vector = (latents - uncached).double().flatten(1).numpy()
        return np.nan_to_num(off, nan=1e6, posinf=1e6, neginf=-1e6)

    best, count = start, len(start.free)
    off = change(best)
    for _ in range(iterations if count else 0):
        error = _errors(off)
        balance = 1 / np.sqrt(error + 0.1 * error.mean() + 1e-12)[:, None]
        slopes = np.stack(
            [((change(best.moved(STEP * unit)) - off) / STEP * balance).ravel() for unit in np.eye(count)]
        )
        curvature, downhill = slopes @ slopes.T, -slopes @ (off * balance).ravel()
        if not np.trace(curvature) > 0:  # no weight moves the end
            return
        for damping in DAMPING:
            damped = curvature + damping * np.trace(curvature) / count * np.eye(count)
            tried = best.moved(np.linalg.solve(damped, downhill))
            reached = change(tried)
            if _errors(reached).mean() < error.mean():
                break
        else:
            return
        best, off = tried, reached
        yield best
        if _errors(reached).mean() > 0.98 * error.mean():
            return


def _errors(off: Vector) -> Vector:
    """(samples,) RMS."""
    made: Vector = np.sqrt((off**2).mean(1))
    return made


def _reused(actions: Actions, depth: int) -> list[tuple[int, list[int]]]:
    """Every reused step with the last computed ones, newest first."""
    found, past = [], list[int]()
    for step, action in enumerate(actions[:, 0]):
        if action == Action.COMPUTE:
            past.insert(0, step)
        else:
            found.append((step, past[:depth]))
    return found
