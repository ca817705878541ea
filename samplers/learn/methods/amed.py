"""AMED averaged: one intermediate call a step, at a place and with a weight that are the same for every sample."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fewstep.errors import FewstepError
from fewstep.samplers.forms import Form, combine, plan_from_forms
from fewstep.samplers.grid import Grid
from fewstep.samplers.lagrange import Basis, lagrange_row
from fewstep.samplers.learn.fitting.levenberg import Iteration, levenberg
from fewstep.samplers.learn.fitting.runner import error
from fewstep.samplers.learn.methods.dynamic import gits
from fewstep.samplers.learn.teaching.problem import Problem
from fewstep.samplers.plan import SolverPlan
from fewstep.samplers.schedule import NoiseSchedule, f64


class AveragedAMED:
    """S steps of two calls: to x_m by a first-order step, then x' = x + c (x_m's slope) times the whole step.

    Three free numbers a step: where m lies (lambda_m = lambda + r h), c, and an offset of the time that the network is told
    there. AMED predicts them for every sample from the network's bottleneck; their mean over samples is a plan.
    """

    def __init__(self, schedule: NoiseSchedule, grid: Grid) -> None:
        self.schedule, self.outer = schedule, grid
        self._vector = torch.zeros(grid.steps, 3, dtype=torch.float64)
        clean = float(schedule.lam(f64(schedule.t_range[1])))
        lam = [v if math.isfinite(v) else clean for v in grid.lam.tolist()]
        if not math.isfinite(grid.lam[0]):
            lam[0] = lam[1] - 4.0  # where the first stage of a flow is looked for: from e^-4 of the second level on
        self._lam = f64(lam)

    def vector(self) -> Tensor:
        return self._vector.reshape(-1).clone()

    def set(self, vector: Tensor) -> None:
        self._vector = vector.reshape(-1, 3).clone()

    def frozen(self, provenance: Mapping[str, Any] | None = None) -> SolverPlan:
        """The plan of 2 S calls as it is now."""
        schedule, s = self.schedule, self.outer.steps
        share = torch.sigmoid(self._vector[:, 0])
        middle = self._lam[:-1] + share * self._lam.diff()
        lam = torch.stack([self.outer.lam[:-1], middle], 1).reshape(-1)
        grid = Grid.lambdas(schedule, torch.cat([lam, self.outer.lam[-1:]]), name="amed")
        told = schedule.model_time(
            schedule.t(middle + 0.5 * torch.tanh(self._vector[:, 2]) * (1 - share) * self._lam.diff())
        )
        times = grid.model_time.clone()
        times[1::2] = told
        grid = grid.with_model_time(times)
        basis: Basis = "velocity" if schedule.family == "flow" else "noise"
        variable: Any = "sigma" if basis == "velocity" else "rho"
        points, forms = grid.points(), list[Form]()
        for k in range(s):
            a, m, b = points[2 * k], points[2 * k + 1], points[2 * k + 2]
            stage, step = lagrange_row(basis, variable, [a], a, m), lagrange_row(basis, variable, [m], a, b)
            c = 1 + float(self._vector[k, 1])
            forms.append(combine([(stage.state, Form.state(2 * k)), (stage.outputs[0], Form.output(2 * k))]))
            forms.append(combine([(step.state, Form.state(2 * k)), (c * step.outputs[0], Form.output(2 * k + 1))]))
        bases: list[Basis] = [basis for _ in range(2 * s)]
        plan = plan_from_forms(schedule, grid, bases, forms, method="averaged AMED", order=1)
        return replace(plan, provenance=dict(provenance or {})).validate(strict=False)


def amed(
    problem: Problem,
    nfe: int,
    *,
    grid: Grid | None = None,
    iterations: int = 6,
    seconds: float = math.inf,
    report: Callable[[Iteration], bool | None] | None = None,
) -> SolverPlan:
    """AMED-Solver's numbers, one triple a step for all samples, fitted to the end of the teacher's trajectories.

    Args:
        nfe: even: every step takes two calls.
        grid: of nfe / 2 steps; GITS' if left out.

    Raises:
        FewstepError: an odd number of calls, or a model at whose first time alpha is 0 (other than a flow).

    Source: Fast ODE-based Sampling for Diffusion Models in Around 5 Steps, 2312.00094, section 3.3; the authors' predictor
    depends on the sample, a plan cannot.
    """
    if nfe < 2 or nfe % 2:
        raise FewstepError(f"averaged AMED takes two calls a step, so an even number of them; got {nfe}")
    train, held_out = problem.split(max(1, len(problem) // 4))
    parameters = AveragedAMED(problem.schedule, grid or gits(train, nfe // 2))
    before = float(error(parameters.frozen(), held_out).mean())
    history = levenberg(parameters, train, iterations=iterations, seconds=seconds, report=report)
    made = {
        **problem.about, "method": "amed", "loss": [h.loss for h in history], "error_before": before,
        "error_after": float(error(parameters.frozen(), held_out).mean()),
    }  # fmt: skip
    return parameters.frozen(made)
