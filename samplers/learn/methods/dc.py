"""DC-Solver's compensation ratios: searched on a few trajectories, and predicted for calls and guidance that were not."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize_scalar
from torch import Tensor

from fewstep.artifact import read_json, write_json
from fewstep.errors import FewstepError
from fewstep.samplers.grid import Grid
from fewstep.samplers.learn.fitting.runner import Trace, rms, run
from fewstep.samplers.learn.teaching.problem import Problem
from fewstep.samplers.solver import Multistep
from fewstep.samplers.solvers.dc_solver import DCSolver
from fewstep.samplers.solvers.unipc import UniPC

BOUND = 0.5
"""How far a ratio may be from 1; beyond, it fits its ten trajectories and no others."""
SHRINK = 0.03
"""What a ratio at the bound has to gain, as a share of the error: where little depends on it, it stays near 1, and ratios of
neighbouring settings are alike, without which nothing could be predicted from them."""


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


@dataclass(frozen=True)
class Cascade:
    """Ratios as a cubic in i / N, whose coefficients are quadratics in guidance, theirs quadratics in N.

    Degrees are lower where fewer values were searched. Cubics of ratios are meaningless outside the searched box, so
    nothing is predicted there.

    Source: DC-Solver, 2409.03755, section 3.3 (cascade polynomial regression).
    """

    coefficients: tuple[tuple[tuple[float, ...], ...], ...]
    """[power of N / 50][power of guidance / 12][power of i / N]"""
    nfe: tuple[int, int]
    guidance: tuple[float, float]
    first: int = 2
    """Steps before this one are never compensated."""
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def fit(table: Mapping[tuple[int, float], Sequence[float]], *, first: int = 2) -> Cascade:
        """The least-squares fit to searched ratios, by (number of calls, guidance).

        Raises:
            FewstepError: an empty table, or ratios that are not as many as the calls.
        """
        rows: list[npt.NDArray[np.float64]] = []
        right: list[float] = []
        for (n, _), ratios in table.items():
            if len(ratios) != n:
                raise FewstepError(f"{len(ratios)} ratios are given for {n} calls; one a call is needed")
        calls, scales = sorted({n for n, _ in table}), sorted({g for _, g in table})
        inner = max((n - first for n in calls), default=0)
        if inner < 1:
            raise FewstepError(f"no step is compensated in {calls} calls; search ratios of more than {first} calls")
        degrees = (min(2, len(calls) - 1), min(2, len(scales) - 1), min(3, inner - 1))
        for (n, g), ratios in table.items():
            for i in range(first, n):
                rows.append(_features(n, g, i, degrees))
                right.append(ratios[i] - 1)
        solved = np.linalg.lstsq(np.stack(rows), np.asarray(right), rcond=1e-10)[0]
        shape = tuple(d + 1 for d in degrees)
        nested = tuple(tuple(tuple(float(c) for c in line) for line in plane) for plane in solved.reshape(shape))
        return Cascade(nested, (calls[0], calls[-1]), (scales[0], scales[-1]), first)

    def predict(self, nfe: int, guidance: float) -> tuple[float, ...]:
        """Ratios for so many calls at this guidance.

        Raises:
            FewstepError: outside the box that was searched.
        """
        inside = self.nfe[0] <= nfe <= self.nfe[1] and self.guidance[0] <= guidance <= self.guidance[1]
        if not inside:
            raise FewstepError(
                f"ratios were searched for {self.nfe[0]} to {self.nfe[1]} calls and guidance {self.guidance[0]:g} to "
                f"{self.guidance[1]:g}; {nfe} calls at guidance {guidance:g} lie outside, and cubics do not extrapolate"
            )
        flat = np.asarray(self.coefficients)
        degrees = (flat.shape[0] - 1, flat.shape[1] - 1, flat.shape[2] - 1)
        found = [1.0 + float(_features(nfe, guidance, i, degrees) @ flat.reshape(-1)) for i in range(self.first, nfe)]
        bounded = [min(max(r, 1 - BOUND), 1 + BOUND) for r in found]
        return (*[1.0] * min(self.first, nfe), *bounded)

    def save(self, path: str | Path) -> None:
        """Write the coefficients as JSON."""
        body = {
            "coefficients": self.coefficients, "nfe": self.nfe, "guidance": self.guidance, "first": self.first,
            "provenance": dict(self.provenance),
        }  # fmt: skip
        write_json(path, "CompensationCascade", body)

    @staticmethod
    def load(path: str | Path) -> Cascade:
        """Read what :meth:`save` wrote; raises :class:`~fewstep.errors.ArtifactError` for anything else."""
        body = read_json(path, "CompensationCascade", ("coefficients", "nfe", "guidance", "first", "provenance"))
        nested = tuple(tuple(tuple(line) for line in plane) for plane in body["coefficients"])
        (low, high), (weak, strong) = body["nfe"], body["guidance"]
        return Cascade(nested, (low, high), (weak, strong), int(body["first"]), body["provenance"])


def _features(n: int, guidance: float, i: int, degrees: tuple[int, int, int]) -> npt.NDArray[np.float64]:
    values = (n / 50, guidance / 12, i / n)
    powers = itertools.product(*(range(d + 1) for d in degrees))
    return np.asarray([values[0] ** a * values[1] ** b * values[2] ** c for a, b, c in powers])
