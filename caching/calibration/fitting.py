"""Fit the affine predictor of a schedule, on the trajectory that the cached network itself takes.

At every reused step the true value is computed beside what is kept, the least-squares weights per channel follow, and the
run goes on with the prediction: so each step's correction is fitted to the states that earlier corrections lead to.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from fewstep.caching.calibration.recording import Deep
from fewstep.caching.calibration.runs import Runs
from fewstep.caching.controller import applied
from fewstep.caching.plan import Actions, CachePlan
from fewstep.caching.predictors import Affine, channel_axis
from fewstep.caching.store import Cell

Array = np.ndarray[Any, np.dtype[np.float64]]
RIDGE = 1e-4
"""Pull of a fit towards its prior, as a share of the predictors' mean square: keeps channels that hardly vary from weights
that fit rounding."""


class _Sums:
    """Sums of a least-squares problem of one site and step, per channel."""

    def __init__(self, channels: int, depth: int) -> None:
        self.products = np.zeros((channels, depth, depth))
        self.sums = np.zeros((channels, depth))
        self.targets = np.zeros((channels, depth))
        self.target_sums = np.zeros(channels)
        self.count = 0

    def add(self, x: Array, y: Array) -> None:
        """x: (C, D, n) past values, y: (C, n) the true one."""
        self.products += x @ x.transpose(0, 2, 1)
        self.sums += x.sum(2)
        self.targets += (x @ y[..., None])[..., 0]
        self.target_sums += y.sum(1)
        self.count += y.shape[1]

    def weights(self, prior: Array) -> tuple[Array, Array]:
        return solve(self.products, self.sums, self.targets, self.target_sums, self.count, prior)


class Fitter:
    """The teacher of a cache: sees true values, answers with fitted predictions.

    Attributes:
        depth: how many past values a prediction reads.
        steps: of the trajectory.
    """

    def __init__(self, depth: int, steps: int) -> None:
        self.depth, self.steps = depth, steps
        self._sums: dict[tuple[str, int], _Sums] = {}
        self._fitted: dict[tuple[str, int], tuple[Array, Array]] = {}
        self._past: dict[tuple[str, int], list[int]] = {}

    def __call__(self, cell: Cell, step: int, true: Any) -> Any:
        history = list(cell.history)[: self.depth]
        leaves, _ = tree_flatten(true)
        key = (cell.site, step)
        self._past[key] = [value.step for value in history]
        x = np.stack([_channels(value.leaves) for value in history], 1)
        y = _channels(leaves)
        if key not in self._sums:
            self._sums[key] = _Sums(len(y), len(history))
        self._sums[key].add(x, y)
        prior = np.zeros(len(history))
        prior[0] = 1.0  # the last value, as it is
        weights, shift = self._fitted[key] = self._sums[key].weights(prior)
        scale = torch.from_numpy(weights.T[None]).float()
        table = Affine({cell.site: scale}, {cell.site: torch.from_numpy(shift[None]).float()})
        return table.predict(_alone(cell, len(history)), 0)

    def predictor(self) -> Affine:
        """The fitted tables of all sites and steps."""
        scale: dict[str, Tensor] = {}
        shift: dict[str, Tensor] = {}
        past: dict[str, Tensor] = {}
        for (site, step), (weights, offsets) in self._fitted.items():
            if site not in scale:
                scale[site] = torch.zeros(self.steps, self.depth, len(offsets))
                scale[site][:, 0] = 1
                shift[site] = torch.zeros(self.steps, len(offsets))
                past[site] = torch.full((self.steps, self.depth), -1)
            scale[site][step, 0] = 0
            scale[site][step, : weights.shape[1]] = torch.from_numpy(weights.T).float()
            shift[site][step] = torch.from_numpy(offsets).float()
            steps = self._past[site, step]
            past[site][step, : len(steps)] = torch.tensor(steps)
        return Affine(scale, shift, past)


def fit(runs: Runs, sites: tuple[str, ...], actions: Actions, depth: int) -> tuple[Affine, Tensor]:
    """The affine predictor of a schedule, and the latents that the last batches ended with while it was fitted.

    The first batch is fitted on itself, each later one on all before it and itself.
    """
    plan = CachePlan(sites, actions, Deep(depth))
    fitter = Fitter(depth, plan.steps)
    with _taught(runs.pipe, plan, fitter):
        latents = runs.latents()
    return fitter.predictor(), latents


@contextmanager
def _taught(pipe: Any, plan: CachePlan, fitter: Fitter) -> Iterator[None]:
    with applied(pipe, plan) as controller:
        for cache in controller.caches:
            cache.teacher = fitter
        yield


def _alone(cell: Cell, depth: int) -> Cell:
    """The cell with only the values that are read."""
    alone = Cell.empty(cell.site, depth)
    alone.history.extend(list(cell.history)[:depth])
    return alone


def _channels(leaves: list[Any]) -> Array:
    """(channels of all leaves, values), float64. Leaves of different sizes are thinned to the smallest."""
    flat = [
        leaf.detach().double().cpu().movedim(channel_axis(leaf), 0).flatten(1)
        for leaf in leaves
        if isinstance(leaf, Tensor)
    ]
    shortest = min(part.shape[1] for part in flat)
    return torch.cat([part[:, :: part.shape[1] // shortest][:, :shortest] for part in flat]).numpy()


def solve(
    products: Array, sums: Array, targets: Array, target_sums: Array, count: int, prior: Array
) -> tuple[Array, Array]:
    """Per channel the weights and the shift that predict best, drawn a little towards a prior.

        min over w, b of  sum (y - w . x - b)^2 + r n |w - w0|^2,   r = RIDGE * mean variance of x

    Args:
        products: (C, D, D) sums of x x'.
        sums: (C, D) sums of x.
        targets: (C, D) sums of x y.
        target_sums: (C,) sums of y.
        count: n.
        prior: (D,) w0.

    Returns:
        (C, D) weights and (C,) shifts.
    """
    depth = sums.shape[1]
    a = products - sums[:, :, None] * sums[:, None, :] / count
    b = targets - sums * target_sums[:, None] / count
    ridge = RIDGE * np.trace(a, axis1=1, axis2=2) / depth + 1e-30 * count
    a = a + ridge[:, None, None] * np.eye(depth)
    weights = np.linalg.solve(a, (b + ridge[:, None] * prior)[..., None])[..., 0]
    return weights, (target_sums - (weights * sums).sum(1)) / count
