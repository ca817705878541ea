"""GHVB: momentum on the outputs, with weights that keep the order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from fewstep.errors import FewstepError, unknown
from fewstep.samplers.forms import Form, combine, direction, filtered
from fewstep.samplers.grid import Point
from fewstep.samplers.lagrange import VARIABLES, Basis, Row, Variable, lagrange_row, linear_part
from fewstep.samplers.scalar import Scalar, solve, value
from fewstep.samplers.solver import Multistep
from fewstep.samplers.solvers.momentum import check_beta


def published_weights(order: int, beta: float) -> list[float]:
    """c_j(beta) / beta of orders 1 to 4 for equal steps, newest first; they sum to 1, and beta = 1 is Adams-Bashforth."""
    b = beta
    c: dict[int, tuple[list[float], int]] = {
        1: ([b], 1),
        2: ([2 + b, -(2 - b)], 2),
        3: ([18 + 5 * b, -(24 - 8 * b), 6 - b], 12),
        4: ([46 + 9 * b, -(78 - 19 * b), 42 - 5 * b, -(10 - b)], 24),
    }
    numerators, denominator = c[order]
    return [x / denominator / b for x in numerators]


@dataclass(frozen=True)
class GHVB(Multistep):
    """Generalised Heavy Ball: the outputs are filtered, v_i = (1 - beta) v_{i-1} + beta m_i, and the row reads the last v.

        x_t = (alpha_t/alpha_s) x_s + alpha_t (rho_t - rho_s) sum_j w_j v_{i-j},    v = m at the first step

    ``weights``:

        variable    those for which the row, written over the outputs, is exact for polynomials of degree < order in
                    ``variable``, as the method without momentum is: the order is kept on every grid
        equal       w_j = c_j(beta) / beta of the paper, their limit for equal steps in rho far from the start: the order
                    is kept there, is 2 at most where steps change smoothly, and else 1

    The paper writes order and momentum as one number: 3.7 is order 4 with beta = 0.7 (:meth:`of`). Smaller betas give a
    larger region of stability and a larger error constant.

    Source: Diffusion Sampling with Momentum for Mitigating Divergence Artifacts, 2307.11118, section 4.2 and appendix.
    """

    order: int = 4
    basis: Basis = "noise"
    beta: float = 0.8
    variable: Variable = "rho"
    weights: Literal["variable", "equal"] = "variable"
    max_order: ClassVar[int] = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_beta(self.beta)
        if self.weights not in ("variable", "equal"):
            raise FewstepError(unknown("weights of GHVB", self.weights, ("variable", "equal")))
        if self.variable not in VARIABLES[self.basis]:
            raise FewstepError(
                unknown(f"variable of GHVB in the {self.basis} basis", self.variable, VARIABLES[self.basis])
            )
        if self.weights == "equal" and self.variable != "rho":
            raise FewstepError(f"GHVB's weights of equal steps are for the variable 'rho', got {self.variable!r}")

    @staticmethod
    def of(order: float) -> GHVB:
        """The paper's notation: ``GHVB.of(3.7)`` has order 4 and beta 0.7, ``GHVB.of(4)`` no momentum."""
        whole = math.ceil(order)
        return GHVB(order=whole, beta=round(order - whole + 1, 12))

    @property
    def convergence_order(self) -> int:
        """On grids whose steps change smoothly; weights of equal steps have the full order on grids that are even in rho."""
        return self.order if self.weights == "variable" else min(self.order, 2)

    @property
    def in_lambda(self) -> bool:
        return self.variable == "lambda"

    def _at(self, node: Point) -> Scalar:
        return node.rho if self.variable == "rho" else node.lam

    def row(self, s: Point, t: Point, past: Sequence[Point]) -> Row:
        """The row without momentum."""
        return lagrange_row(self.basis, self.variable, past, s, t)

    def rows(self, points: Sequence[Point], orders: Sequence[int]) -> list[Row]:
        # an output at lambda = -inf carries no weight, so the filter begins behind it
        begin = int(points[0].pure_noise)
        slots = [Form()] * begin + filtered([Form.output(i) for i in range(begin, len(orders))], self.beta)
        rows = super().rows(points, [*orders[:begin], *[1] * (len(orders) - begin)])
        for i in range(begin, len(orders)):
            s, t = points[i], points[i + 1]
            if t.clean:
                continue  # the last step, of first order: nothing would make up for the lag
            p = min(orders[i], i + 1 - begin)
            if self.weights == "equal":
                scale = t.alpha * (t.rho - s.rho)
                weights: list[Scalar] = [scale * w for w in published_weights(p, self.beta)]
            else:
                weights = self._exact(points, slots, i, p)
            form = direction(Row(1.0, weights), slots[i::-1])
            rows[i] = Row(linear_part(self.basis, s, t), [form.outputs.get(j, 0.0) for j in range(i, -1, -1)])
        return rows

    def _exact(self, points: Sequence[Point], slots: Sequence[Form], i: int, p: int) -> list[Scalar]:
        """Weights of the last p slots that treat polynomials of degree < p as the row without momentum does."""
        s, t = points[i], points[i + 1]
        plain = self.row(s, t, points[i : i - p if i >= p else None : -1])
        # filtered outputs reach back to the first; one that has no place has no weight either
        step = self._at(t) - self._at(s)
        place = [
            (self._at(node) - self._at(s)) / step if math.isfinite(value(node.lam)) else 0.0 for node in points[: i + 1]
        ]

        def moment(form: Form, k: int) -> Scalar:
            return sum((w * place[j] ** k for j, w in form.outputs.items()), 0.0)

        target = combine(zip(plain.outputs, map(Form.output, range(i, -1, -1)), strict=False))
        recent = slots[i : i - p if i >= p else None : -1]
        return solve([[moment(slot, k) for slot in recent] for k in range(p)], [moment(target, k) for k in range(p)])
