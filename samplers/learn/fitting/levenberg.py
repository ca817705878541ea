"""Levenberg and Marquardt's method on a plan's free numbers: few parameters, many residuals, no gradients of the network.

A plan has tens of free numbers and a problem thousands of residuals, which is what Gauss and Newton's method is for. Derivatives
are differences of two runs. A number that first acts in row i leaves everything before that row as it was, so the run
begins there; and what only the last row reads costs no network call at all.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.errors import FewstepError
from fewstep.samplers.learn.fitting.parameters import Parameters
from fewstep.samplers.learn.teaching.problem import Problem
from fewstep.samplers.learn.fitting.runner import Trace, rms, run
from fewstep.samplers.plan import SolverPlan

DIFFERENCE = 2e-3
"""Step of the differences: float32 networks leave about four digits of them, and curvature costs about as much."""


@dataclass(frozen=True)
class Iteration:
    """One accepted step."""

    loss: float
    """Mean RMS error over the problem's samples."""
    seconds: float
    calls: int
    """Network calls of the whole batch so far."""


def levenberg(
    parameters: Parameters,
    problem: Problem,
    *,
    iterations: int = 8,
    seconds: float = float("inf"),
    report: Callable[[Iteration], None] | None = None,
) -> list[Iteration]:
    """Minimise the mean RMS error of ``parameters.plan()``, which is left at the best numbers found.

    Samples are weighted by 1 / RMS in every iteration, so that what decreases is the mean of the errors and not of their
    squares (iteratively reweighted least squares).

    Args:
        iterations: at most.
        seconds: no iteration begins after this, and one that runs stops at the next derivative.
    """
    return list(steps(parameters, problem, iterations=iterations, seconds=seconds, report=report))


def steps(
    parameters: Parameters,
    problem: Problem,
    *,
    iterations: int,
    seconds: float,
    report: Callable[[Iteration], None] | None = None,
) -> Iterator[Iteration]:
    """:func:`levenberg`, one iteration at a time."""
    began, damping = time.monotonic(), 1e-2
    with torch.no_grad():
        jacobian = _Differences(parameters, problem)
        best = jacobian.residual
        _finite(best)
        for _ in range(iterations):
            normal, slope = jacobian.equations(began + seconds)
            if normal is None or slope is None:
                return
            vector, loss = parameters.vector(), jacobian.loss
            accepted = False
            while damping < 1e6 and time.monotonic() - began < seconds:
                ridge = torch.diag(normal.diagonal() + 1e-6 * normal.diagonal().max())
                parameters.set(vector - torch.linalg.solve(normal + damping * ridge, slope))
                try:
                    tried = _Differences(parameters, problem)
                except FewstepError:  # a grid whose points fell together: too long a step
                    tried = None
                if tried is not None and tried.loss < loss:
                    accepted, damping = True, damping / 5
                    break
                damping *= 5
            if not accepted or tried is None:
                parameters.set(vector)
                return
            calls = jacobian.calls + tried.calls
            jacobian, tried.calls = tried, calls
            iteration = Iteration(jacobian.loss, time.monotonic() - began, jacobian.calls)
            if report is not None:
                report(iteration)
            yield iteration
            if iteration.loss > 0.998 * loss:
                return


class _Differences:
    """The plan at the present numbers, its run, and the derivatives of its end."""

    def __init__(self, parameters: Parameters, problem: Problem) -> None:
        self.parameters, self.problem = parameters, problem
        self.plan = parameters.frozen()
        self.trace = run(self.plan, problem)
        self.calls = self.plan.steps
        self.residual = (self.trace.end - problem.targets).flatten(1).double()
        errors = rms(self.trace.end, problem.targets).double()
        self.loss = float(errors.mean())
        self.weight = (1 / errors.clamp(min=1e-3 * self.loss))[:, None]

    def equations(self, deadline: float) -> tuple[Tensor | None, Tensor | None]:
        """(J' W J, J' W r), or nothing where there is no time left."""
        vector, columns = self.parameters.vector(), []
        for j in range(len(vector)):
            if time.monotonic() > deadline:
                self.parameters.set(vector)
                return None, None
            moved = vector.clone()
            moved[j] += DIFFERENCE
            self.parameters.set(moved)
            plan = self.parameters.frozen()
            row = first_difference(self.plan, plan)
            if row is None:
                columns.append(torch.zeros_like(self.residual))
                continue
            end = self._run_from(plan, row).end
            columns.append((end - self.trace.end).flatten(1).double() / DIFFERENCE)
        self.parameters.set(vector)
        J = torch.stack([(c * self.weight.sqrt()).reshape(-1) for c in columns], 1)
        return J.T @ J, J.T @ (self.residual * self.weight.sqrt()).reshape(-1)

    def _run_from(self, plan: SolverPlan, place: tuple[int, bool]) -> Trace:
        row, called = place
        if not called:  # the network sees what it saw: only the sum of this row differs
            seen = Trace(self.trace.states[: row + 1], self.trace.outputs[: row + 1])
            return run(plan, self.problem, begin=seen.summed(plan))
        self.calls += plan.steps - row
        return run(plan, self.problem, begin=self.trace.until(row))


def first_difference(a: SolverPlan, b: SolverPlan) -> tuple[int, bool] | None:
    """(the first row in which two plans of one kind differ, whether its network call does); None where they are equal."""
    steps = a.steps
    heard = (a.model_time != b.model_time) | (a.alpha[:-1] != b.alpha[:-1]) | (a.sigma[:-1] != b.sigma[:-1])
    heard = heard | (a.in_scale != b.in_scale)
    added = (a.state != b.state).any(1) | (a.output != b.output).any(1)
    for i in range(steps):
        if bool(heard[i]):
            return i, True
        if bool(added[i]):
            return i, False
    return None


def _finite(values: Tensor) -> None:
    if not bool(values.isfinite().all()):
        raise FewstepError("the plan to start from gives NaN or infinite samples on this model; start from another")
