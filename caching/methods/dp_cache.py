"""DPCache: the schedule that costs least by what was measured, with a fitted correction; made by calibration."""

from __future__ import annotations

from dataclasses import dataclass

from fewstep.caching.families import Family
from fewstep.caching.families.family import OUTPUT
from fewstep.caching.families.transformer import TransformerFamily
from fewstep.caching.families.unet import ENCODER, UNetFamily
from fewstep.caching.method import Method
from fewstep.errors import FewstepError


@dataclass(frozen=True)
class DPCache(Method):
    """What ``caching.calibrate`` turns into a plan: one site, computed at the steps that dynamic programming picks.

    CacheQuant's schedule and decoupled error correction (arXiv 2503.01323), with these differences: what a reused step costs
    is how far it moves the final latents, measured; the schedule that costs least is the start of a local search in which
    these moves are added as vectors; a prediction may read the last three computed values; beside the per-channel affine
    correction weights are fitted to the final latents themselves; and plain methods at the same budget are tried too.
    Held-out samples choose.

    Attributes:
        budget: share of the MACs of computing everything.
        at: sites to choose from; those that the model's family offers where left out. Where given, plain methods of other
            sites are not tried.
        depth: computed values that a prediction reads, 1 to 3.
        refine: schedules that are measured, of those that the search ranks first.
        polish: most iterations of the fit of weights to the final latents, each of about (depth - 1) runs for every step
            that is reused; 0 for none.
    """

    budget: float | None = 0.5
    at: tuple[str, ...] | None = None
    depth: int = 3
    refine: int = 12
    polish: int = 3

    def __post_init__(self) -> None:
        if self.budget is not None and not 0 < self.budget <= 1:
            raise FewstepError(f"budget is {self.budget}; give a share of the MACs above 0, at most 1")
        if self.at is not None and (isinstance(self.at, str) or not self.at):
            raise FewstepError(f"at is {self.at!r}; give a tuple of sites, or None for those of the family")
        if self.depth not in (1, 2, 3):
            raise FewstepError(f"depth is {self.depth}; give 1 to 3 computed values")
        for name in ("refine", "polish"):
            if getattr(self, name) < 0:
                raise FewstepError(f"{name} is {getattr(self, name)}; give a whole number, 0 for none")

    def sites(self, family: Family) -> list[str]:
        raise FewstepError(
            "DPCache is a way to make a plan: plan = caching.calibrate(pipe, DPCache(...), prompts, ...)"
        )

    def candidates(self, family: Family) -> list[str]:
        """The sites to choose from."""
        if self.at is not None:
            return [family.site(name).name for name in self.at]
        inside: list[str] = []
        if isinstance(family, UNetFamily):
            inside = [*(f"branch.{b}" for b in range(min(3, family.branch_count))), ENCODER]
        if isinstance(family, TransformerFamily):
            count = len(family.paths)
            inside = ["blocks", *([f"blocks[1:{count}]"] if count > 2 else [])]
        return [*inside, OUTPUT]  # a flow's output alone may extrapolate better than what is inside
