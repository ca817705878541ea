"""DC-Solver's compensation ratios, searched on a few trajectories: each by itself, or along a curve."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize, minimize_scalar
from torch import Tensor

from fewstep.errors import FewstepError
from fewstep.samplers.grid import Grid
from fewstep.samplers.learn.fitting.runner import Trace, error, rms, run
from fewstep.samplers.learn.teaching.problem import Problem
from fewstep.samplers.solver import Multistep
from fewstep.samplers.solvers.dc_solver import DCSolver
from fewstep.samplers.solvers.unipc import UniPC

BOUND = 0.5
"""How far a ratio may be from 1; beyond, it fits its ten trajectories and no others."""
SHRINK = 0.03
"""What a ratio at the bound has to gain, as a share of the error: where little depends on it, it stays near 1, and ratios of
neighbouring settings are alike, without which nothing could be predicted from them."""

STRAIGHT = 0.3
"""The same of a curve: log(error) that all its ratios at the bound have to gain."""


def dc_search(
    problem: Problem,
    grid: Grid,
    *,
    base: Multistep | None = None,
    samples: int = 10,
    evaluations: int = 12,
) -> tuple[float, ...]:
    """Compensation ratios r_0, ..., r_{N-1} for :class:`~fewstep.samplers.DCSolver` on ``grid``, found one after the other.

    r_i is the number in [1 - BOUND, 1 + BOUND] for which the state after the next corrector is nearest to the teacher's,
    by Brent's bounded search in place of the authors' 40 steps of Adam; one network call an evaluation. The state that
    shows it is X_{i+2}, into which the corrector of the interval that r_i predicts has gone; for the last steps it is the
    end.

    Args:
        samples: trajectories to use; the paper has ten.

    Source: DC-Solver, 2409.03755, section 3.2.
    """
    base = base or UniPC()
    some, n = problem.take(slice(0, samples)), grid.steps
    ratios = [1.0] * n
    solver = DCSolver(base, tuple(ratios))
    trace: Trace | None = None
    for i in range(solver.compensation_order, n):
        begin: Trace = run(solver.compile(problem.schedule, grid), some, begin=trace, rows=i).until(i)
        last = min(i + 2, n)
        goal = some.state_at(float(grid.lam[last]))

        def miss(r: float, i: int = i, begin: Trace = begin, last: int = last, goal: Tensor = goal) -> float:
            tried = DCSolver(base, (*ratios[:i], float(r), *ratios[i + 1 :]))
            end = run(tried.compile(problem.schedule, grid), some, begin=begin, rows=last).end
            return float(rms(end, goal).mean()) * (1 + SHRINK * ((r - 1) / BOUND) ** 2)

        found: Any = minimize_scalar(
            miss, bounds=(1 - BOUND, 1 + BOUND), method="bounded", options={"maxiter": evaluations}
        )
        if found.fun < miss(1.0):
            ratios[i] = float(found.x)
        trace, solver = begin, DCSolver(base, tuple(ratios))
    return tuple(ratios)


def dc_curve(
    problem: Problem,
    grid: Grid,
    *,
    base: Multistep | None = None,
    samples: int = 10,
    degree: int = 3,
    start: Sequence[float] | None = None,
    evaluations: int = 80,
) -> tuple[float, ...]:
    """Ratios r_i = 1 + p(i / N), p the polynomial of this degree for which the samples end nearest to the teacher's.

    Few numbers, judged by the end alone: less free than :func:`dc_search`, so ratios of many steps fit their ten
    trajectories less and others more; and neighbouring settings have neighbouring curves, which is what
    :class:`Cascade` needs. By Nelder and Mead's method on log(error).

    Args:
        start: ratios of a neighbouring setting, of any number of calls, to begin near; 1 if left out. The error has several
            minima, and those found from one another belong together.

    Raises:
        FewstepError: a degree below 0, or ratios to start from that are fewer than three.

    Source: after DC-Solver, 2409.03755, sections 3.2 and 3.3 (ratios are predicted by cubics there, and searched freely).
    """
    if degree < 0:
        raise FewstepError(f"the degree of the curve of ratios is at least 0, got {degree}")
    base = base or UniPC()
    some, n = problem.take(slice(0, samples)), grid.steps
    first = DCSolver(base, (1.0,) * n).compensation_order

    def miss(coefficients: npt.NDArray[np.float64]) -> float:
        ratios = _along(coefficients, n, first)
        found = float(error(DCSolver(base, ratios).compile(problem.schedule, grid), some).mean())
        far = np.mean((np.asarray(ratios) - 1) ** 2) / BOUND**2
        return math.log(found) + STRAIGHT * float(far) if 0 < found < math.inf else math.inf

    begin = np.zeros(degree + 1) if start is None else _curve_of(start, degree, first)
    simplex = np.vstack([begin, begin + 0.1 * np.eye(degree + 1)])
    options = {"maxfev": evaluations, "initial_simplex": simplex}
    return _along(minimize(miss, begin, method="Nelder-Mead", options=options).x, n, first)


def _along(coefficients: npt.NDArray[np.float64], n: int, first: int) -> tuple[float, ...]:
    place = np.arange(n) / n
    curve = 1 + np.polynomial.polynomial.polyval(place, coefficients)
    curve[:first] = 1
    return tuple(np.clip(curve, 1 - BOUND, 1 + BOUND).tolist())


def _curve_of(ratios: Sequence[float], degree: int, first: int) -> npt.NDArray[np.float64]:
    inner = len(ratios) - first
    if inner < 1:
        raise FewstepError(f"{len(ratios)} ratios to start from hold no compensated step; give more than {first}")
    place = np.arange(first, len(ratios)) / len(ratios)
    found = np.polynomial.polynomial.polyfit(place, np.asarray(ratios[first:]) - 1, min(degree, inner - 1))
    padded: npt.NDArray[np.float64] = np.zeros(degree + 1)
    padded[: len(found)] = found
    return padded
