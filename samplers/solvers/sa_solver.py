"""SA-Solver: stochastic Adams, a predictor and a corrector for the reverse SDE that share their noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from fewstep.errors import FewstepError
from fewstep.samplers.grid import Point
from fewstep.samplers.lagrange import Basis, Row, lagrange_row
from fewstep.samplers.scalar import Scalar, value
from fewstep.samplers.solver import Multistep
from fewstep.samplers.solvers.dpm_solver import secant_row
from fewstep.samplers.solvers.unipc import uncorrected

_ROUNDING = 1e-9
"""Relative slack of the window's ends: an end that was made from a time of the grid is inside."""


@dataclass(frozen=True)
class SASolver(Multistep):
    """The reverse SDE with noise tau, its data prediction replaced by polynomials through past outputs.

        x_t = (sigma_t/sigma_s) e^{-tau^2 h} x_s + alpha_t (1 + tau^2) sum_j m_j int_0^h e^{(1 + tau^2)(u - h)} l_j(u) du
              + sigma_t sqrt(1 - e^{-2 tau^2 h}) z

    The predictor has the nodes {s0, ..., s_{p-1}}; the corrector does the interval again with {t, s0, ...}, the same z and
    the output at the predicted point, which costs no call. Since state and noise are the same in both, the corrected state
    is eliminated as in :class:`UniPC`. tau = 0, ``simplified`` and a corrector of order + 1 nodes are UniPC with bh1.

    The step from s is stochastic where ``low`` <= sigma_s/alpha_s <= ``high``, deterministic elsewhere.

    Source: SA-Solver: Stochastic Adams Solver for Fast Sampling of Diffusion Models, 2309.05019, eq. 13 to 17, algorithm 1.

    Attributes:
        tau: 0 for the ODE, 1 for the reverse SDE of the forward process.
        corrector_order: nodes of the corrector, t among them; 0 for no corrector.
        low, high: the noise levels between which there is noise.
        simplified: whether rows of two nodes take h^2/2 for the first moment, as the authors' code does; exact otherwise.
            Both are of order 2, but the former's weights grow with h without bound, and few guided steps diverge.
        disable_corrector: intervals whose end is not corrected. None: all of them on grids of fewer than 15 steps, where
            strong guidance and noise together make corrections diverge.
    """

    lower_order_below: int | None = None
    tau: float = 1.0
    corrector_order: int = 2
    low: float = 0.0
    high: float = math.inf
    simplified: bool = False
    disable_corrector: tuple[int, ...] | None = ()
    max_order: ClassVar[int] = 4
    bases: ClassVar[tuple[Basis, ...]] = ("data",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.tau < math.inf:
            raise FewstepError(f"tau is {self.tau}; give a number of at least 0")
        if not isinstance(self.corrector_order, int) or not 0 <= self.corrector_order <= self.max_order:
            raise FewstepError(f"corrector_order is {self.corrector_order!r}; give 0 (none) to {self.max_order}")
        if not 0 <= self.low <= self.high:
            raise FewstepError(f"noise between {self.low} and {self.high}: 0 <= low <= high is needed")

    @property
    def convergence_order(self) -> int:
        """Of the ODE. With noise the law of a sample is of order 1 or 2, whatever the order of the deterministic part."""
        return self.order if self.disable_corrector else max(self.order, self.corrector_order)

    def _eta(self, s: Point) -> float:
        level = value(s.rho)
        inside = self.low * (1 - _ROUNDING) <= level <= self.high * (1 + _ROUNDING)
        return self.tau**2 if inside else 0.0

    def _half(self, s: Point, t: Point) -> Scalar:
        """The weight of a slope over the whole step when its moment is taken to be h^2/2: half of bh1's first-order weight."""
        return 0.5 * (1 + self._eta(s)) * t.alpha * (t.lam - s.lam)

    def row(self, s: Point, t: Point, past: Sequence[Point]) -> Row:
        """The predictor."""
        eta = self._eta(s)
        if len(past) != 2 or not self.simplified:
            return lagrange_row("data", "lambda", past, s, t, eta=eta)
        first = lagrange_row("data", "lambda", [s], s, t, eta=eta)
        return secant_row(first, self._half(s, t), s, t, past[1])

    def corrector(self, s: Point, t: Point, past: Sequence[Point]) -> Row:
        """The weights of {m_t, m at ``past``}."""
        eta = self._eta(s)
        if len(past) != 1 or not self.simplified:
            return lagrange_row("data", "lambda", [t, *past], s, t, eta=eta)
        first = lagrange_row("data", "lambda", [s], s, t, eta=eta)
        half = self._half(s, t)
        return Row(first.state, [half, first.outputs[0] - half], first.noise)

    def correctors(self, points: Sequence[Point], orders: Sequence[int]) -> list[Row | None]:
        n, rows = len(orders), list[Row | None]([None])
        lowering = self.lower_order_final and (self.lower_order_below is None or n < self.lower_order_below)
        left_out = uncorrected(self.disable_corrector, n, n)
        for i in range(1, n):
            s, t = points[i - 1], points[i]
            nodes = min(self.corrector_order, i + 1, n - i + 2 if lowering else n)
            # from lambda = -inf no node but t has a weight
            skipped = nodes == 0 or i - 1 in left_out or (s.pure_noise and nodes != 1)
            rows.append(None if skipped else self.corrector(s, t, [points[i - 1 - k] for k in range(nodes - 1)]))
        return rows
