"""iPNDM: Adams-Bashforth on the noise prediction, with weights of equal steps or of the steps as they are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal

from fewstep.errors import FewstepError, unknown
from fewstep.samplers.grid import Point
from fewstep.samplers.lagrange import Basis, Row, lagrange_row, linear_part
from fewstep.samplers.scalar import Scalar, value
from fewstep.samplers.solver import Multistep

EQUAL_STEPS: dict[int, tuple[float, ...]] = {
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}
"""The weights of Adams and Bashforth, newest first."""


@dataclass(frozen=True)
class IPNDM(Multistep):
    """x_t = (alpha_t/alpha_s) x_s + alpha_t (rho_t - rho_s) sum_j w_j eps_j.

    ``weights`` says which steps the weights are those of:

        equal         Adams and Bashforth's fixed weights, as published. Of the full order on grids that are even in rho, of
                      order 2 at most where steps change smoothly, else of order 1.
        variable      the weights of the steps as they are: DEIS rho-AB, LMS
        diff_sampler  what zju-pi/diff-sampler's ``ipndm_v`` computes. From order 3 on its corrections for past steps are
                      misplaced, which leaves order 2; of order 4 the weights do not even sum to 1 where steps change,
                      which leaves no convergence and a plan that :meth:`SolverPlan.problems` objects to.

    No step is lowered at the end. Sources: Fast Sampling of Diffusion Models with Exponential Integrator, 2204.13902,
    appendix; PNDM, 2202.09778, eq. 9.
    """

    order: int = 4
    weights: Literal["equal", "variable", "diff_sampler"] = "equal"
    lower_order_final: bool = False
    basis: Basis = "noise"
    max_order: ClassVar[int] = 4
    bases: ClassVar[tuple[Basis, ...]] = ("noise",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weights not in ("equal", "variable", "diff_sampler"):
            raise FewstepError(unknown("weights of iPNDM", self.weights, ("equal", "variable", "diff_sampler")))

    @property
    def in_lambda(self) -> bool:
        return False

    @property
    def convergence_order(self) -> int:
        """On grids whose steps change smoothly."""
        most = {"variable": 4, "equal": 2, "diff_sampler": 2 if self.order < 4 else 0}
        return min(self.order, most[self.weights])

    @property
    def consistent(self) -> bool:
        return not (self.weights == "diff_sampler" and self.order == 4)

    def row(self, s: Point, t: Point, past: Sequence[Point]) -> Row:
        if self.weights == "variable":
            return lagrange_row("noise", "rho", past, s, t)
        usable = [p for p in past if math.isfinite(value(p.lam))]  # at alpha = 0 there was no noise prediction to keep
        weights: Sequence[Scalar] = EQUAL_STEPS[len(usable)]
        if self.weights == "diff_sampler":
            weights = _diff_sampler([t.rho, *(p.rho for p in usable)])
        scale = t.alpha * (t.rho - s.rho)
        return Row(linear_part("noise", s, t), [*(scale * w for w in weights), *[0.0] * (len(past) - len(usable))])


def _diff_sampler(rho: Sequence[Scalar]) -> list[Scalar]:
    """``ipndm_v``'s weights for outputs at rho[1], rho[2], ..., relative to the step from rho[1] to rho[0]."""
    h = [a - b for a, b in pairwise(rho)]
    if len(h) == 1:
        return [1.0]
    half = h[0] / h[1] / 2
    w: list[Scalar] = [1 + half, -half]
    if len(h) == 2:
        return w
    near = h[0] + h[1]
    # both corrections miss parentheses: 1 - (a * b) where (1 - a) * b is meant
    third = (1 - h[0] / (3 * near) * (h[0] * near) / (h[1] * (h[1] + h[2]))) / 2
    back = h[1] / h[2]
    w = [w[0] + third, w[1] - (1 + back) * third, third * back]
    if len(h) == 3:
        return w
    far = near + h[2]
    share = (h[0] * near * far) / (h[1] * (h[1] + h[2]) * (h[1] + h[2] + h[3]))
    fourth = ((1 - h[0] / (3 * near)) / 2 + (1 - h[0] / (2 * near)) * h[0] / (6 * far)) * share
    twice = h[1] * (h[1] + h[2]) / (h[2] * (h[2] + h[3]))
    return [
        w[0] + fourth,
        w[1] - (1 + back + twice) * fourth,
        w[2] + (back + twice * (1 + h[2] / h[3])) * fourth,
        -fourth * twice * back,
    ]
