"""Compute every n-th step: the plainest rule, for any site; FORA and Delta-DiT are cases of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fewstep.caching.families import Family
from fewstep.caching.method import Method, check_interval, steps_table
from fewstep.caching.plan import Actions
from fewstep.caching.predictors import Hold, Predictor
from fewstep.errors import FewstepError


def every(steps: int, interval: int, warmup: int = 1, cooldown: int = 0) -> list[bool]:
    """Which steps are computed: the first ``warmup``, every ``interval``-th from the last of these, the last ``cooldown``."""
    start = max(warmup, 1) - 1
    return [i <= start or (i - start) % interval == 0 or i >= steps - cooldown for i in range(steps)]


@dataclass(frozen=True)
class Interval(Method):
    """Named sites, computed every ``interval`` steps and predicted in between.

    Attributes:
        interval: 1 computes always.
        at: names of sites.
        warmup: steps computed at the start, at least 1.
        cooldown: steps computed at the end.
        predict: what stands for a value that is not computed.
    """

    knob = "interval"
    interval: int = 2
    at: tuple[str, ...] = ("output",)
    warmup: int = 1
    cooldown: int = 0
    predict: Predictor = Hold()  # noqa: RUF009  (a frozen value)

    def __post_init__(self) -> None:
        check_interval(self.interval)
        if isinstance(self.at, str) or not self.at:
            raise FewstepError(f"at is {self.at!r}; give a tuple of names of sites")
        object.__setattr__(self, "at", tuple(self.at))

    @property
    def predictor(self) -> Predictor:
        return self.predict

    def sites(self, family: Family) -> list[str]:
        return [family.site(name).name for name in self.at]

    def table(self, steps: int, sites: Sequence[str]) -> Actions:
        return steps_table(every(steps, self.interval, self.warmup, self.cooldown), len(sites))


@dataclass(frozen=True)
class FORA(Method):
    """All attention and feed-forward outputs, computed every ``interval`` steps.

    FORA: Fast-Forward Caching in Diffusion Transformer Acceleration, arXiv 2407.01425.
    """

    knob = "interval"
    interval: int = 3

    def __post_init__(self) -> None:
        check_interval(self.interval)

    def sites(self, family: Family) -> list[str]:
        return all_branches(family, type(self).__name__)

    def table(self, steps: int, sites: Sequence[str]) -> Actions:
        return steps_table(every(steps, self.interval), len(sites))


def all_branches(family: Family, method: str) -> list[str]:
    """Every attention and feed-forward branch of a model.

    Raises:
        FewstepError: where it has none.
    """
    kinds = ("attention", "cross_attention", "feed_forward", "fused")
    found = [name for kind in kinds for name in family.branches(kind)]
    if not found:
        raise FewstepError(
            f"{method} reuses attention and feed-forward outputs, and {family.name} has no blocks with these"
        )
    return found


@dataclass(frozen=True)
class DeltaDiT(Method):
    """The deviation of a range of blocks: the rear ones early in the trajectory, the front ones late.

    Outlines are fixed early, by the front blocks, details late, by the rear ones; each is computed while it matters. Of the
    two ranges one is reused at a time, on the steps that the interval leaves out.
    Delta-DiT: A Training-Free Acceleration Method Tailored for Diffusion Transformers, arXiv 2406.01125, sec. 4.

    Attributes:
        interval: steps from one computed in full to the next.
        blocks: number of blocks whose deviation is reused; half of them where left out.
        boundary: share of the steps that count as early.
    """

    knob = "interval"
    interval: int = 2
    blocks: int | None = None
    boundary: float = 0.5

    def __post_init__(self) -> None:
        check_interval(self.interval)
        if not 0 <= self.boundary <= 1:
            raise FewstepError(f"boundary is {self.boundary}; give a share of the steps from 0 to 1")

    def sites(self, family: Family) -> list[str]:
        paths = getattr(family, "paths", [])
        count = len(paths) // 2 if self.blocks is None else self.blocks
        if not 0 < count <= len(paths) // 2:
            raise FewstepError(
                f"blocks is {count}; the two ranges of {family.name} have 1 to {len(paths) // 2} blocks each"
            )
        return [family.site(f"blocks[{a}:{b}]").name for a, b in ((0, count), (len(paths) - count, len(paths)))]

    def table(self, steps: int, sites: Sequence[str]) -> Actions:
        full = np.array(every(steps, self.interval))
        early = np.arange(steps) < self.boundary * steps
        return np.stack([~full & ~early, ~full & early], 1).astype(np.int8)
