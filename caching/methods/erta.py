"""ERTACache: an offline schedule for the output's residual, smaller steps where it is reused, and a correction."""

from __future__ import annotations

from dataclasses import dataclass

from fewstep.caching.families import Family
from fewstep.caching.method import Method
from fewstep.errors import FewstepError


@dataclass(frozen=True)
class ERTACache(Method):
    """What ``caching.calibrate`` turns into a plan and a grid, for flow models sampled by Euler's method.

        reused:    v~_i = x_i + r_c,  r_c = v(x_c, t_c) - x_c of the last computed step c
        schedule:  reuse at i where |r_c - r_i|_1 / |r_i|_1 < threshold, on uncached trajectories
        steps:     a reused step is shortened by phi_i = clip(1 - |v~_i - v_i|_1 / |v_i|_1, 0, 1), what is left over is
                   spread over the steps that remain, in proportion to their length
        rectified: v^_i = v~_i - (a_i v~_i + b_i), least squares over the calibration set

    The plan's ``provenance["sigmas"]`` is the corrected grid: ``pipe(..., sigmas=plan.provenance["sigmas"])``.
    ERTACache: Error Rectification and Timesteps Adjustment for Efficient Diffusion, arXiv 2508.21091. The authors' code
    could not be consulted; where descriptions of the paper differ, the form above was chosen.

    Attributes:
        budget: share of the MACs; the threshold follows from it.
        adjust: whether steps are shortened; without, it serves any model whose output lies on the sample's grid.
        rectify: whether reused outputs are corrected.
    """

    budget: float | None = 0.5
    adjust: bool = True
    rectify: bool = True

    def __post_init__(self) -> None:
        if self.budget is not None and not 0 < self.budget <= 1:
            raise FewstepError(f"budget is {self.budget}; give a share of the MACs above 0, at most 1")

    def sites(self, family: Family) -> list[str]:
        raise FewstepError(
            "ERTACache is a way to make a plan: plan = caching.calibrate(pipe, ERTACache(...), prompts, ...)"
        )
