"""Learned routers: which attention and feed-forward outputs of which steps are computed, trained along trajectories."""

from __future__ import annotations

from dataclasses import dataclass

from fewstep.caching.families import Family
from fewstep.caching.method import Method
from fewstep.caching.methods.interval import all_branches
from fewstep.errors import FewstepError, unknown

SCHEMES = ("harmonica", "l2c")
PROXIES = ("sensitivity", "image")


@dataclass(frozen=True)
class Router(Method):
    """What ``caching.calibrate`` trains into a plan: a gate for every step and branch; the network's weights stay.

    While training a branch gives w F + (1 - w) F_kept, w = 1 for an open gate and 0 for a shut one, with the derivative of a
    logit's sigmoid: what it sees are the states that the plan leads to.

    ``harmonica``: all steps but the first are gated, along the trajectory that the gated network itself takes, and a step's
    loss is weighted by what switching its gates on does to the final latents (HarmoniCa: Harmonizing Training and Inference
    for Better Feature Caching in Diffusion Transformer Acceleration, arXiv 2410.01723). ``l2c``: every other step is
    computed in full, and the trajectory is that of the ungated network (Learning-to-Cache: Accelerating Diffusion
    Transformer via Layer Caching, arXiv 2406.01733, which draws its states by noising training images instead).

    What differs from what is published: gates begin as the best schedule of whole steps that a search finds (``l2c``: as a
    uniform interval) and stay hard; where logits ask for it an open gate is exchanged for a shut one, and the exchange stays
    if the measured error of the final latents falls. If on held-out samples the result errs more than the schedule that it
    began as, or than the uniform interval, these are what one gets: ``provenance`` says which. The weight of the gates' sum is
    steered to the budget (dual ascent). And a step's loss is weighted by how much the final latents move for an error of
    that size there; HarmoniCa's image error proxy (``proxy="image"``) takes how much they move, whatever the size of the
    error.

    Attributes:
        budget: share of the MACs of computing everything.
        scheme: ``harmonica`` or ``l2c``.
        iterations: most trajectories to train on, one batch each; fewer where nothing is gained any more.
        rate: step of a logit whose gradient is of the usual size.
        proxy: weights of the steps' losses, ``sensitivity`` or ``image``.
        depth: computed values that a fitted affine correction of the finished plan reads, 1 or 2; 0 holds, as published.
        at: names of sites; all branches where left out.
    """

    budget: float | None = 0.5
    scheme: str = "harmonica"
    iterations: int = 40
    rate: float = 0.05
    proxy: str = "sensitivity"
    depth: int = 0
    at: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.scheme not in SCHEMES:
            raise FewstepError(unknown("scheme", self.scheme, SCHEMES))
        if self.proxy not in PROXIES:
            raise FewstepError(unknown("proxy", self.proxy, PROXIES))
        if self.depth not in (0, 1, 2):
            raise FewstepError(f"depth is {self.depth}; give 0 to hold, or 1 or 2 computed values")
        if self.iterations < 1:
            raise FewstepError(f"iterations is {self.iterations}; give at least 1")
        if self.budget is not None and not 0 < self.budget <= 1:
            raise FewstepError(f"budget is {self.budget}; give a share of the MACs above 0, at most 1")

    def sites(self, family: Family) -> list[str]:
        raise FewstepError("Router is a way to make a plan: plan = caching.calibrate(pipe, Router(...), prompts, ...)")

    def gates(self, family: Family) -> list[str]:
        """The branches that have gates."""
        if self.at is not None:
            return [family.site(name).name for name in self.at]
        return all_branches(family, type(self).__name__)
