"""The search behind :class:`~fewstep.caching.DPCache`: a site, the steps to compute, and the predictions in between."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from torch import Tensor, nn

from fewstep.caching.actions import Action
from fewstep.caching.calibration.budget import Budget
from fewstep.caching.calibration.fitting import fit
from fewstep.caching.calibration.keys import Keys, searched
from fewstep.caching.calibration.plain import of_all_sites, of_site, plain_plans
from fewstep.caching.calibration.polishing import Weighted, polished
from fewstep.caching.calibration.quality import Quality, measure, worst
from fewstep.caching.calibration.responses import Responses
from fewstep.caching.calibration.runs import Runs
from fewstep.caching.calibration.schedule import affordable, even_keys, even_with_last
from fewstep.caching.controller import applied
from fewstep.caching.cost import row_macs
from fewstep.caching.families import family_of
from fewstep.caching.methods.dp_cache import DPCache
from fewstep.caching.plan import Actions, CachePlan
from fewstep.caching.predictors import Extrapolate
from fewstep.errors import FewstepError

Tick = Callable[[str], None]
Judged = tuple[CachePlan, Quality]
NEAR = 2.0
"""Sites are searched whose even schedules are at most so many times as far off, or as dear, as those of the best site."""


@dataclass
class Setting:
    """What the search works on.

    Attributes:
        method: its options.
        budget: the bound.
        train, test: samples to fit to, and samples to judge by.
        tick: is told of progress.
    """

    method: DPCache
    budget: Budget
    train: Runs
    test: Runs
    tick: Tick

    @property
    def model(self) -> nn.Module:
        from fewstep.eval.costs.calls import denoisers

        return denoisers(self.train.pipe)[0]

    @cached_property
    def uncached(self) -> Tensor:
        """Latents of the training samples."""
        return self.train.uncached()

    @cached_property
    def uncached_test(self) -> Tensor:
        """Latents of the samples held out."""
        return self.test.uncached()

    def judged(self, plan: CachePlan, share: float) -> Judged:
        """The plan with its quality on the samples held out."""
        return plan, measure(plan, self.test, self.uncached_test, share, self.budget.name)

    def best(self, found: Sequence[Judged]) -> Judged:
        """The least error where the work is bounded, the least work where the error is."""
        if self.budget.name == "macs":
            return min(found, key=lambda judged: judged[1].latent_rms)
        kept = [judged for judged in found if self.budget.met(judged[1].values(self.budget.name))]
        return min(kept, key=lambda judged: (judged[1].macs_share, judged[1].latent_rms))

    def near(self, judged: Judged, best: Judged) -> bool:
        """Whether a site's regular schedule is near enough to the best site's for a search to change their order."""
        if self.budget.name == "macs":
            return judged[1].latent_rms <= NEAR * best[1].latent_rms
        return judged[1].macs_share <= NEAR * best[1].macs_share


def search(method: DPCache, budget: Budget, train: Runs, test: Runs, tick: Tick) -> Judged:
    """The best plan that keeps the budget, among those of the search and those of plain methods.

    Raises:
        FewstepError: where none keeps it.
    """
    setting = Setting(method, budget, train, test, tick)
    sites = [SiteSearch.at(name, setting) for name in method.candidates(family_of(setting.model))]
    first = [(found, site) for site in sites if (found := site.regular()) is not None]
    if not first:
        raise FewstepError(_cannot(budget, min(site.least for site in sites)))
    chosen = setting.best([judged for judged, _ in first])
    own = [chosen]
    others = [] if method.at is not None else of_all_sites(method.depth)
    for regular, site in first:
        if setting.near(regular, chosen):
            own += site.searched(regular)
            others += of_site(site.site, method.depth)
    plain = dict(plain_plans(setting.test, budget, setting.uncached_test, others, tick))
    plan, quality = setting.best([*own, *plain.values()])
    name = next((name for name, judged in plain.items() if judged[0] is plan), None)
    told: dict[str, Any] = {"plain": {name: round(judged[1].latent_rms, 6) for name, judged in plain.items()}}
    return replace(
        plan, method=method.describe() if name is None else name, provenance={**plan.provenance, **told}
    ), quality


@dataclass
class SiteSearch:
    """The search at one site.

    Attributes:
        site: its name.
        reused: share of a full call's MACs that a step takes at which it is reused.
        setting: what is searched for.
    """

    site: str
    reused: float
    setting: Setting

    @classmethod
    def at(cls, site: str, setting: Setting) -> SiteSearch:
        plan = CachePlan((site,), np.zeros((1, 1), dtype=np.int8))
        full, reused = row_macs(plan, setting.model, np.ones((1, 1), dtype=np.int8))
        return cls(site, reused / full, setting)

    @property
    def steps(self) -> int:
        return self.setting.train.positions

    @property
    def least(self) -> float:
        """The least share of the MACs: one step is computed."""
        return self.share(1)

    def share(self, count: int) -> float:
        """Of computing the site at so many steps."""
        return (count + self.reused * (self.steps - count)) / self.steps

    @cached_property
    def responses(self) -> Responses:
        return Responses.measured(
            self.setting.train, (self.site,), lambda: self.setting.tick(f"{self.site}: responses")
        )

    # -- by the number of computed steps ------------------------------------------------------------------------------
    def regular(self) -> Judged | None:
        """The best regular schedule that keeps the budget; None where none does."""
        return self._for_budget(self._regular)

    def searched(self, regular: Judged) -> Iterator[Judged]:
        """Plans of searched schedules that keep the budget."""
        if self.setting.budget.name == "macs":
            count = affordable(self.setting.budget.value, self.reused, self.steps)
            if count < self.steps:  # else everything is computed, and nothing is there to be searched
                yield from self._searched(count)
            return
        count = int((regular[0].actions == Action.COMPUTE).sum())
        while count > 1:  # fewer and fewer steps, while the bound on quality is kept
            count -= 1
            kept = [j for j in self._searched(count) if self.setting.budget.met(j[1].values(self.setting.budget.name))]
            if not kept:
                return
            yield from kept

    def _for_budget(self, judge: Callable[[int], Judged]) -> Judged | None:
        budget = self.setting.budget
        if budget.name == "macs":
            count = affordable(budget.value, self.reused, self.steps)
            return judge(count) if count >= 1 else None
        low, high, found = 0, self.steps, None
        while high - low > 1:
            count = (low + high) // 2
            made = judge(count)
            if budget.met(made[1].values(budget.name)):
                high, found = count, made
            else:
                low = count
        return found

    def _regular(self, count: int) -> Judged:
        """Even schedules with plain extrapolation."""
        found = []
        for keys in dict.fromkeys((even_keys(self.steps, count), even_with_last(self.steps, count))):
            for order in self.orders:
                plan = CachePlan((self.site,), self._actions(keys), Extrapolate(order))
                found.append(self.setting.judged(plan, self.share(count)))
                self.setting.tick(f"{self.site}: {count} of {self.steps} steps")
        return min(found, key=lambda judged: judged[1].latent_rms)

    @property
    def orders(self) -> range:
        """Degrees of the polynomials that are tried."""
        return range(min(1, self.setting.method.depth - 1), self.setting.method.depth)

    # -- schedules ----------------------------------------------------------------------------------------------------
    def _searched(self, count: int) -> Iterator[Judged]:
        """The schedule of so many steps that errs least where it was fitted, with several kinds of prediction."""
        method, share = self.setting.method, self.share(count)
        order, keys = searched(self.responses, count, self.orders, method.refine, self._error)
        actions = self._actions(keys)
        plan = CachePlan((self.site,), actions, Extrapolate(order))
        predicted = {"predicted_latent_rms": round(self.responses.error(keys, order) ** 0.5, 6)}
        yield self.setting.judged(replace(plan, provenance=predicted), share)
        affine = fit(self.setting.train, (self.site,), actions, min(method.depth, 2))[0]
        yield self.setting.judged(CachePlan((self.site,), actions, affine), share)
        self.setting.tick(f"{self.site}: corrections")
        if method.polish:
            start = Weighted.polynomial(self.site, actions, method.depth, order)
            for made in polished(
                start, self.setting.train, self.setting.uncached, method.polish,
                lambda: self.setting.tick(f"{self.site}: weights"),
            ):  # fmt: skip
                yield self.setting.judged(made.plan, share)

    def _actions(self, keys: Keys) -> Actions:
        actions = np.full((self.steps, 1), Action.REUSE, dtype=np.int8)
        actions[list(keys)] = Action.COMPUTE
        return actions

    def _error(self, order: int, keys: Keys) -> float:
        """On the samples of the fit."""
        with applied(self.setting.train.pipe, CachePlan((self.site,), self._actions(keys), Extrapolate(order))):
            latents = self.setting.train.latents()
        self.setting.tick(f"{self.site}: schedules")
        return worst(float((latents - self.setting.uncached).double().flatten(1).square().mean(1).sqrt().mean()))


def _cannot(budget: Budget, best_possible: float) -> str:
    if budget.name == "macs":
        return (
            f"{budget.value:.0%} of the MACs cannot be kept: with one step computed in full it is {best_possible:.1%}; "
            "give at least that, or take fewer steps"
        )
    return f"no plan keeps {budget.name} {budget.value:g} without computing nearly every step; give a looser bound"
