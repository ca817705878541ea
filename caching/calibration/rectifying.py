"""ERTACache's calibration: from uncached trajectories a schedule, a grid and an affine correction, in closed form."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fewstep.caching.actions import Action
from fewstep.caching.calibration.budget import Budget
from fewstep.caching.calibration.quality import Quality, measure
from fewstep.caching.calibration.recording import Recording
from fewstep.caching.calibration.runs import Runs
from fewstep.caching.controller import applied
from fewstep.caching.methods.erta import ERTACache
from fewstep.caching.plan import CachePlan
from fewstep.caching.predictors import Affine, Hold, Predictor
from fewstep.caching.residual import RESIDUAL
from fewstep.errors import FewstepError


@dataclass
class Paths:
    """States and velocities of uncached trajectories, (steps, samples, ...) float32 on the host."""

    states: Tensor
    velocities: Tensor

    @property
    def residuals(self) -> Tensor:
        """v - x."""
        return self.velocities - self.states


def recorded(runs: Runs) -> Paths:
    """The trajectories of the network's own calls; both halves of guidance are samples of their own."""
    states: dict[int, list[Tensor]] = {}
    velocities: dict[int, list[Tensor]] = {}

    def observe(call: Any, out: Any) -> None:
        sample, velocity = call.scene.sample, tree_leaves(out)[0]
        states.setdefault(call.step, []).append(sample.float().cpu())
        velocities.setdefault(call.step, []).append(velocity[:, : sample.shape[1]].float().cpu())

    with applied(runs.pipe, Recording(at=("output",))) as controller:
        controller.caches[0].observers.append(observe)
        runs.latents()
    order = range(runs.positions)
    return Paths(*(torch.stack([torch.cat(kept[i]) for i in order]) for kept in (states, velocities)))


def computed_steps(paths: Paths, threshold: float) -> list[int]:
    """The steps that are not near enough to the last computed one; the first and the last always."""
    r, steps, keys = paths.residuals, len(paths.states), [0]
    for i in range(1, steps):
        change = float((r[keys[-1]] - r[i]).abs().mean() / r[i].abs().mean())
        if change >= threshold or i == steps - 1:
            keys.append(i)
    return keys


def affordable_steps(paths: Paths, most: int) -> list[int]:
    """The lowest threshold's computed steps that are no more than ``most``."""
    low, high = 0.0, 10.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if len(computed_steps(paths, middle)) > most else (low, middle)
    return computed_steps(paths, high)


def shortened(paths: Paths, keys: Sequence[int], sigmas: Sequence[float]) -> list[float]:
    """The grid with reused steps shortened; what they leave is spread over the later ones. The end stays.

    Args:
        paths: uncached trajectories.
        keys: computed steps.
        sigmas: (steps + 1,) the grid, its end included.

    Returns:
        (steps,) the new grid without its end.
    """
    lengths = -np.diff(np.asarray(sigmas, dtype=np.float64))
    at, grid, key = float(sigmas[0]), [float(sigmas[0])], 0
    for i in range(len(lengths) - 1):
        share = lengths[i] / lengths[i:].sum()
        factor = 1.0
        if i in keys:
            key = i
        else:
            guess = paths.states[i] + paths.residuals[key]
            off = (guess - paths.velocities[i]).abs().mean() / paths.velocities[i].abs().mean()
            factor = float((1 - off).clamp(0, 1))
        at -= share * (at - float(sigmas[-1])) * factor
        grid.append(at)
    return grid


def rectification(paths: Paths, keys: Sequence[int]) -> Predictor:
    """v^ = (1 - a) v~ - b per step, a and b of the least-squares line of v~ - v on v~."""
    steps, key = len(paths.states), 0
    scale, shift = torch.ones(steps, 1, 1), torch.zeros(steps, 1)
    for i in range(steps):
        if i in keys:
            key = i
            continue
        guess = (paths.states[i] + paths.residuals[key]).double()
        error = guess - paths.velocities[i].double()
        slope = ((guess - guess.mean()) * (error - error.mean())).mean() / guess.var(correction=0).clamp(min=1e-30)
        scale[i], shift[i] = 1 - slope, -(error.mean() - slope * guess.mean())
    return Affine({RESIDUAL: scale}, {RESIDUAL: shift})


def rectified(
    method: ERTACache, budget: Budget, train: Runs, test: Runs, tick: Callable[[str], None]
) -> tuple[CachePlan, Quality]:
    """The plan with its grid in ``provenance``, and its quality on the held-out samples.

    Raises:
        FewstepError: for a budget that is no share of the MACs; where steps are adjusted, for a model that is no flow, or a
            pipeline without ``sigmas``.
    """
    if budget.name != "macs":
        raise FewstepError(
            f"ERTACache is calibrated to a share of the MACs, not to {budget.name}; give Budget(macs=...)"
        )
    most = int(budget.value * train.positions + 1e-9)
    if most < 2:
        raise FewstepError(
            f"{budget.value:.0%} of {train.positions} steps is {most}; ERTACache computes at least the first and the last"
        )
    paths = recorded(train)
    tick("uncached runs")
    sigmas = _grid(train) if method.adjust else []
    keys = affordable_steps(paths, most)
    actions = np.full((train.positions, 1), Action.REUSE, dtype=np.int8)
    actions[keys] = Action.COMPUTE
    uncached, told = test.uncached(), dict[str, Any]()
    if method.adjust:
        grid = shortened(paths, keys, sigmas)
        told = {"sigmas": _given(train.pipe.scheduler, grid), "grid": grid}
    plan = CachePlan(
        (RESIDUAL,),
        actions,
        rectification(paths, keys) if method.rectify else Hold(),
        method=method.describe(),
        provenance=told,
    )
    tick("held-out runs")
    cached = replace(test, call={**test.call, "sigmas": told["sigmas"]}) if told else test
    return plan, measure(plan, cached, uncached, len(keys) / train.positions)


def _grid(runs: Runs) -> list[float]:
    """The noise levels of the scheduler after a run, the end included."""
    scheduler = runs.pipe.scheduler
    if "Flow" not in type(scheduler).__name__ and not getattr(scheduler.config, "use_flow_sigmas", False):
        raise FewstepError(
            f"ERTACache's steps are for flow models, the scheduler is {type(scheduler).__name__}; adjust=False leaves the grid"
        )
    sigmas = [float(s) for s in scheduler.sigmas]
    if len(sigmas) != runs.steps + 1:
        raise FewstepError(
            f"{type(scheduler).__name__} made {len(sigmas)} noise levels for {runs.steps} steps; Euler's has one more"
        )
    return sigmas


def _given(scheduler: Any, grid: Sequence[float]) -> list[float]:
    """What to hand to the pipeline such that the scheduler ends up with this grid: diffusers' shifts once more."""
    shifts = hasattr(type(scheduler), "shift")  # an entry of the configuration that others only carry along is none
    shift = scheduler.shift if shifts and not getattr(scheduler.config, "use_dynamic_shifting", False) else 1
    if shift == 1:
        return list(grid)
    return [s / (shift - (shift - 1) * s) for s in grid]
