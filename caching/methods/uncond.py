"""Guidance made cheaper: the unconditional half reused from step to step, or left out outside a window."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from fewstep.caching.actions import Action
from fewstep.caching.families import Family
from fewstep.caching.method import Method, check_interval
from fewstep.caching.methods.interval import every
from fewstep.caching.plan import Actions, CachePlan
from fewstep.caching.predictors import Hold, Predictor
from fewstep.caching.spectral import FasterCacheDelta, FrequencyDelta
from fewstep.errors import FewstepError, unknown

Half = Literal["first", "second"]


@dataclass(frozen=True)
class GuidanceWindow(Method):
    """Guidance in a share of the steps only: outside the conditional half runs alone, and its output stands for both.

    Then uncond + s (cond - uncond) = cond for every scale s. The published reason is quality as much as cost: guidance
    harms at high noise levels and does nothing at low ones. Applying Guidance in a Limited Interval Improves Sample and
    Distribution Quality in Diffusion Models, arXiv 2404.07724.

    Attributes:
        start, stop: shares of the trajectory, 0 the first step and 1 the end: steps i with start <= i / steps < stop are
            guided.
        uncond: which half of the batch is the unconditional one, ``first`` (diffusers' usual order) or ``second``; by
            default what the model's pipeline does.
    """

    start: float = 0.0
    stop: float = 1.0
    uncond: Half | None = None

    def __post_init__(self) -> None:
        _check_half(self.uncond)
        if not 0 <= self.start < self.stop <= 1:
            raise FewstepError(f"the window is {self.start} to {self.stop}; give shares with 0 <= start < stop <= 1")

    def sites(self, family: Family) -> list[str]:
        return [family.site(f"uncond.{self.uncond}" if self.uncond else "uncond").name]

    def table(self, steps: int, sites: Sequence[str]) -> Actions:
        where = np.arange(steps) / steps
        guided = (self.start <= where) & (where < self.stop)
        return np.where(guided, self._inside(steps, int(np.argmax(guided))), Action.SKIP).astype(np.int8)[:, None]

    def _inside(self, steps: int, begin: int) -> Actions:
        """(steps,) what is done in the window, which begins at a step."""
        return np.zeros(steps, dtype=np.int8)


@dataclass(frozen=True)
class UncondReuse(GuidanceWindow):
    """The unconditional half is computed every ``interval`` steps; in between it is cond - d, d = cond - uncond of before.

    With guidance scale s the guided output is then cond + (s - 1) d: with ``Hold`` the plainest form, one tensor kept;
    with ``Affine`` and tables of the site ``uncond`` d is scaled and shifted by channel; any other predictor serves too.

    Attributes:
        interval: steps from one unconditional evaluation to the next.
        warmup: steps at the start of the window that are all computed, at least 1.
        cooldown: steps at the end of the trajectory that are all computed.
        predict: makes d.
    """

    knob: ClassVar[str | None] = "interval"
    interval: int = 2
    warmup: int = 1
    cooldown: int = 0
    predict: Predictor = Hold()  # noqa: RUF009  (a frozen value)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_interval(self.interval)

    @property
    def predictor(self) -> Predictor:
        return self.predict

    def _inside(self, steps: int, begin: int) -> Actions:
        computed = [False] * begin + every(steps - begin, self.interval, self.warmup, self.cooldown)
        return np.where(computed, Action.COMPUTE, Action.REUSE).astype(np.int8)


@dataclass(frozen=True)
class CFGCache(Method):
    """The unconditional half is the conditional one and a difference whose low and high frequencies are weighted apart.

    Low frequencies of the difference are raised early, high ones late. FasterCache: Training-Free Video Diffusion Model
    Acceleration with High Quality, arXiv 2410.19355, sec. 3.3, with each weight applied once;
    :class:`FasterCacheCFG` is what its code does. The defaults are the code's of 50 steps as shares.

    Attributes:
        interval: steps from one unconditional evaluation to the next.
        start: share of the steps that are all computed first.
        low, high: weights of the frequencies within and outside of the radius min(H, W) // 5.
        low_until, high_from: shares of the steps up to which, and from which, the weights hold.
        uncond: as in :class:`GuidanceWindow`.
    """

    knob: ClassVar[str | None] = "interval"
    interval: int = 5
    start: float = 0.36
    low: float = 1.1
    high: float = 1.1
    low_until: float = 0.8
    high_from: float = 0.6
    uncond: Half | None = None
    delta: ClassVar[type[FrequencyDelta]] = FrequencyDelta

    def __post_init__(self) -> None:
        _check_half(self.uncond)
        check_interval(self.interval)
        for name in ("start", "low_until", "high_from"):
            if not 0 <= getattr(self, name) <= 1:
                raise FewstepError(f"{name} is {getattr(self, name)}; give a share of the steps from 0 to 1")

    def sites(self, family: Family) -> list[str]:
        return GuidanceWindow(uncond=self.uncond).sites(family)

    def table(self, steps: int, sites: Sequence[str]) -> Actions:
        return UncondReuse(interval=self.interval, warmup=max(1, round(self.start * steps))).table(steps, sites)

    def compile(self, family: Family, steps: int) -> CachePlan:
        sites = tuple(self.sites(family))
        predictor = self.delta(self.low, self.high, round(self.low_until * steps), round(self.high_from * steps))
        return CachePlan(sites, self.table(steps, sites), predictor, {"class": family.name}, method=self.describe())


@dataclass(frozen=True)
class FasterCacheCFG(CFGCache):
    """:class:`CFGCache` as FasterCache's code does it: weights are applied in place, so that they compound.

    At the n-th reuse since the last unconditional evaluation a weight is w^n: 1.1 ends as 1.46 with an interval of 5.
    """

    delta: ClassVar[type[FrequencyDelta]] = FasterCacheDelta


def _check_half(uncond: str | None) -> None:
    if uncond not in (None, "first", "second"):
        raise FewstepError(unknown("half", uncond, ("first", "second")))
