"""DPCache: the schedule that costs least by what was measured, with a fitted correction; made by calibration."""

from __future__ import annotations

from dataclasses import dataclass

from fewstep.caching.families import Family
from fewstep.caching.families.transformer import TransformerFamily
from fewstep.caching.families.unet import ENCODER, UNetFamily
from fewstep.caching.method import Method
from fewstep.errors import FewstepError


@dataclass(frozen=True)
class DPCache(Method):
    """What ``caching.calibrate`` turns into a plan: one site, computed at the steps that dynamic programming picks.

    CacheQuant's schedule and decoupled error correction (arXiv 2503.01323), with these differences: what a reused step costs
    is what the best affine prediction leaves, times how much an error there moves the final latents; a prediction may read
    the last two computed values; an even schedule and plain extrapolation are tried too, and held-out samples choose; and
    the schedule is refined by measuring.

    Attributes:
        budget: share of the MACs of computing everything.
        at: sites to choose from; those that the model's family offers where left out.
        depth: computed values that a prediction reads, 1 or 2.
        refine: schedules tried in the neighbourhood of the best.
    """

    budget: float | None = 0.5
    at: tuple[str, ...] | None = None
    depth: int = 2
    refine: int = 24

    def __post_init__(self) -> None:
        if self.budget is not None and not 0 < self.budget <= 1:
            raise FewstepError(f"budget is {self.budget}; give a share of the MACs above 0, at most 1")
        if self.depth not in (1, 2):
            raise FewstepError(f"depth is {self.depth}; give 1 or 2 computed values")
        if self.refine < 0:
            raise FewstepError(f"refine is {self.refine}; give 0 or more schedules to try")

    def sites(self, family: Family) -> list[str]:
        raise FewstepError(
            "DPCache is a way to make a plan: plan = caching.calibrate(pipe, DPCache(...), prompts, ...)"
        )

    def candidates(self, family: Family) -> list[str]:
        """The sites to choose from."""
        if self.at is not None:
            return [family.site(name).name for name in self.at]
        if isinstance(family, UNetFamily):
            return [*(f"branch.{b}" for b in range(min(3, family.branch_count))), ENCODER]
        if isinstance(family, TransformerFamily):
            count = len(family.paths)
            tail = [f"blocks[1:{count}]"] if count > 2 else []
            return ["blocks", *tail]
        return ["output"]
