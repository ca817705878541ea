"""UniPC: a predictor and a corrector that share their network calls, compiled to explicit rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from fewstep.errors import FewstepError, unknown
from fewstep.samplers.grid import Point
from fewstep.samplers.lagrange import Row, lagrange_row
from fewstep.samplers.scalar import Scalar
from fewstep.samplers.solver import Multistep
from fewstep.samplers.solvers.dpm_solver import secant_row


@dataclass(frozen=True)
class UniPC(Multistep):
    """UniPC-p: predictor UniP-p, then corrector UniC-p with the output at the predicted point, which costs no call.

    When the p x p system is really solved, B(h) cancels and UniP-p, UniC-p are the Lagrange rows through
    {s0, ..., s_{p-1}} and {t, s0, ..., s_{p-1}} in lambda. Only UniP-2 and UniC-1 fix rho = 1/2 instead and depend on it:

        half = 1/2 M_0 (bh2, M_0 the first-order weight)  or  alpha_t h / 2 (bh1, data), -sigma_t h / 2 (bh1, noise)
        UniP-2:  M_0 m0 + half (m0 - m1) h/h0            UniC-1:  M_0 m0 + half (m_t - m0)

    Predictor and corrector of an interval start from the same corrected state with the same ratio, so the corrected
    state can be eliminated. With b^P_i, b^C_i their weights for the interval that ends at i+1 and i:

        X_{i+1} = a_i X_i + sum_j [b^P_{i,j} + a_i (b^C_{i,j} - b^P_{i-1,j})] m_j

    an explicit (p+1)-step method on what the pipeline holds: it keeps no sample of its own, so an edit of the latents
    between steps (inpainting) reaches the corrected state, which a restart from a stored sample ignores.

    Source: UniPC, 2302.04867, theorem 3.1 and algorithms 1 and 2.
    """

    lower_order_below: int | None = None
    solver_type: Literal["bh1", "bh2"] = "bh2"
    disable_corrector: tuple[int, ...] | None = ()
    """Intervals whose end is not corrected. None: the first two on grids of fewer than 15 steps, see :func:`uncorrected`."""
    max_order: ClassVar[int] = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.solver_type not in ("bh1", "bh2"):
            raise FewstepError(unknown("solver_type", self.solver_type, ("bh1", "bh2")))

    @property
    def convergence_order(self) -> int:
        """p + 1, or what the predictor alone has where any interval goes without a corrector."""
        return self.order if self.disable_corrector else self.order + 1

    def _half(self, first: Row, s: Point, t: Point) -> Scalar:
        if self.solver_type == "bh2":
            return 0.5 * first.outputs[0]
        h = t.lam - s.lam
        return 0.5 * t.alpha * h if self.basis == "data" else -0.5 * t.sigma * h

    def row(self, s: Point, t: Point, past: Sequence[Point]) -> Row:
        """UniP."""
        if len(past) != 2:
            return lagrange_row(self.basis, "lambda", past, s, t)
        first = lagrange_row(self.basis, "lambda", [s], s, t)
        return secant_row(first, self._half(first, s, t), s, t, past[1])

    def corrector(self, s: Point, t: Point, past: Sequence[Point]) -> Row:
        """UniC: the weights of {m_t, m at ``past``}."""
        if len(past) > 1:
            return lagrange_row(self.basis, "lambda", [t, *past], s, t)
        first = lagrange_row(self.basis, "lambda", [s], s, t)
        half = self._half(first, s, t)
        return Row(first.state, [half, first.outputs[0] - half])

    def correctors(self, points: Sequence[Point], orders: Sequence[int]) -> list[Row | None]:
        left_out = uncorrected(self.disable_corrector, len(orders), 2)
        rows: list[Row | None] = [None]
        for i in range(1, len(orders)):
            s, t = points[i - 1], points[i]
            # from lambda = -inf B(h) = h is infinite, and in the noise basis so is the state's ratio
            unbounded = s.pure_noise and (self.solver_type == "bh1" or self.basis == "noise")
            skipped = i - 1 in left_out or unbounded
            rows.append(None if skipped else self.corrector(s, t, [points[i - 1 - k] for k in range(orders[i - 1])]))
        return rows


def uncorrected(chosen: tuple[int, ...] | None, steps: int, early: int) -> tuple[int, ...]:
    """``chosen``; for None the first ``early`` intervals on grids of fewer than 15 steps, and none on longer ones.

    A correction between the first long steps takes a secant for a derivative. Under strong guidance that can throw a state
    far off, which no later step makes up for.
    """
    return chosen if chosen is not None else tuple(range(early)) if steps < 15 else ()
