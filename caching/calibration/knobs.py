"""Turn the one knob of a method until a budget is kept: an interval, or a threshold that is then profiled into a plan."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor, nn

from fewstep.caching.actions import Action
from fewstep.caching.calibration.budget import Budget
from fewstep.caching.calibration.quality import Quality, measure
from fewstep.caching.calibration.runs import Runs
from fewstep.caching.cost import row_macs
from fewstep.caching.families import family_of
from fewstep.caching.method import Method
from fewstep.caching.plan import CachePlan
from fewstep.errors import FewstepError

HALVINGS = 10
"""Bisections of a threshold: its last digit then matters less than the prompts."""


def turn(
    method: Method,
    budget: Budget,
    test: Runs,
    tick: Callable[[str], None],
    uncached: Tensor | None = None,
    meter: Meter | None = None,
    train: Runs | None = None,
) -> tuple[CachePlan, Quality]:
    """The plan of the method with its knob as far open as the budget allows, and its held-out quality.

    With a bound on the MACs that is the least reuse which keeps it, with a bound on quality the most.

    Args:
        method: has a knob.
        budget: the bound.
        test: samples that judge.
        tick: is told of progress.
        uncached: their latents, if they are known.
        meter: knows what other methods' plans cost on the same model.
        train: samples whose decisions an online method's plan is made of; those that judge where left out.

    Raises:
        FewstepError: for a method without a knob, or a budget that it cannot keep.
    """
    from fewstep.eval.costs.calls import denoisers

    model = denoisers(test.pipe)[0]
    family, meter = family_of(model), meter or Meter(model)
    reference = test.uncached() if uncached is None else uncached

    def made(value: Any) -> tuple[CachePlan, Quality]:
        turned = replace(method, **{_knob(method): value})
        if turned.online:
            from fewstep.caching.profiling import profiled

            plan = profiled(test if train is None else train, turned)
        else:
            plan = turned.compile(family, test.positions)
        share = meter.share(plan, test.first)
        if budget.name == "macs" and share > budget.value:
            return plan, Quality(np.array([np.inf]), share)  # need not be drawn
        quality = measure(plan, test, reference, share, budget.name)
        tick(f"{type(method).__name__}, {_knob(method)} {value:g}")
        return plan, quality

    tried = list(_search(method, budget, test.positions, made))
    kept = [found for found in tried if budget.met(found[1].values(budget.name))]
    if not kept:
        least = min(found[1].macs_share for found in tried)
        raise FewstepError(
            f"{type(method).__name__} cannot keep {budget.name} {budget.value:g} in {test.steps} steps; the least that it "
            f"takes is {least:.1%} of the MACs"
        )
    return min(kept, key=lambda f: f[1].latent_rms if budget.name == "macs" else f[1].macs_share)


class Meter:
    """Counts the MACs of plans for one model, every row of actions once."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._known: dict[Any, int] = {}

    def share(self, plan: CachePlan, first: int = 0) -> float:
        """The plan's MACs as a share of computing everything, from a position on, at which there is nothing to reuse yet."""

        def key(row: Any) -> Any:
            return plan.sites, row.tobytes()

        full = np.full((1, len(plan.sites)), Action.COMPUTE, dtype=np.int8)
        actions = plan.actions[first:].copy()
        actions[0, actions[0] == Action.REUSE] = Action.COMPUTE
        rows = np.unique(np.concatenate([full, actions]), axis=0)
        if new := [row for row in rows if key(row) not in self._known]:
            self._known |= dict(zip(map(key, new), row_macs(plan, self.model, np.stack(new))[1:], strict=True))
        return sum(self._known[key(row)] for row in actions) / (self._known[key(full[0])] * len(actions))


def _search(
    method: Method, budget: Budget, steps: int, made: Callable[[Any], tuple[CachePlan, Quality]]
) -> Iterator[tuple[CachePlan, Quality]]:
    if isinstance(getattr(method, _knob(method)), float):
        yield from _bisected(budget, made)
        return
    for value in range(1, steps + 1):
        found = made(value)
        yield found
        if budget.met(found[1].values(budget.name)) == (budget.name == "macs"):
            return  # the first that keeps a bound on the work, or no longer keeps one on quality


def _bisected(budget: Budget, made: Callable[[Any], tuple[CachePlan, Quality]]) -> Iterator[tuple[CachePlan, Quality]]:
    """Thresholds by halving their logarithm; more threshold is more reuse."""
    low, high = 1e-4, 10.0
    for _ in range(HALVINGS):
        middle = (low * high) ** 0.5
        found = made(middle)
        yield found
        if budget.met(found[1].values(budget.name)) == (budget.name == "macs"):
            high = middle  # enough reuse, or already too much error
        else:
            low = middle


def _knob(method: Method) -> str:
    if method.knob is None:
        raise FewstepError(f"{type(method).__name__} has no knob to calibrate; DPCache is calibrated to any budget")
    return method.knob
