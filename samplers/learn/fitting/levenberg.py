"""Levenberg and Marquardt's method on a plan's free numbers: few parameters, many residuals, no gradients of the network.

A plan has tens of free numbers and a problem thousands of residuals, which is what Gauss and Newton's method is for. Derivatives
are differences of two runs. A number that first acts in row i leaves everything before that row as it was, so the run
begins there; and what only the last row reads costs no network call at all. Between two sets of differences Broyden's
secant update keeps the derivatives up to date, for the price of the run that a step makes anyway.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fewstep.errors import FewstepError
from fewstep.samplers.learn.fitting.runner import Trace, rms, run
from fewstep.samplers.learn.teaching.problem import Problem
from fewstep.samplers.plan import SolverPlan

DIFFERENCE = 2e-3
"""Step of the differences: float32 networks leave about four digits of them, and curvature costs about as much."""
SECANTS = 3
"""Steps between two sets of differences."""
ENOUGH = 0.998
"""Share of the loss that a round of steps has to leave behind to be followed by another."""


class Fittable(Protocol):
    """A plan as a function of free numbers."""

    def vector(self) -> Tensor: ...
    def set(self, vector: Tensor) -> None: ...
    def frozen(self) -> SolverPlan: ...


@dataclass(frozen=True)
class Iteration:
    """One accepted step."""

    loss: float
    """Mean RMS error over the problem's samples."""
    seconds: float
    calls: int
    """Network calls of the whole batch so far."""


def levenberg(
    parameters: Fittable,
    problem: Problem,
    *,
    iterations: int = 8,
    seconds: float = float("inf"),
    report: Callable[[Iteration], bool | None] | None = None,
) -> list[Iteration]:
    """Minimise the mean RMS error of the plan of ``parameters``, which are left at the best numbers found.

    Samples are weighted by 1 / RMS in every step, so that what decreases is the mean of the errors and not of their squares
    (iteratively reweighted least squares).

    Args:
        iterations: sets of differences, at most; each is followed by up to 1 + :data:`SECANTS` steps.
        seconds: no set of differences begins after this, and one that runs is given up.
        report: called after every step with what it reached; ``parameters`` are there then. False ends the search.

    Raises:
        FewstepError: the plan to start from gives NaN on this model.
    """
    began, damping, done = time.monotonic(), 1e-2, list[Iteration]()
    with torch.no_grad():
        here = _Point(parameters, problem)
        if not here.loss < float("inf"):
            raise FewstepError("the plan to start from gives NaN or infinite samples on this model; start from another")
        calls = here.plan.steps
        for _ in range(iterations):
            derived = _differences(here, parameters, problem, began + seconds)
            if derived is None:
                break
            jacobian, cost = derived
            calls, before = calls + cost, here.loss
            for secant in range(1 + SECANTS):
                step = _step(here, jacobian, parameters, problem, damping, patience=6 if secant == 0 else 1)
                if step is None:
                    break
                there, damping, tries = step
                calls += tries * here.plan.steps
                moved = there.vector - here.vector
                missed = (there.residual - here.residual) - (jacobian @ moved.to(jacobian)).reshape(here.residual.shape)
                jacobian += missed.reshape(-1, 1).to(jacobian) * (moved / moved.square().sum()).to(jacobian)[None]
                gained, here = there.loss < 0.99 * here.loss, there
                done.append(Iteration(here.loss, time.monotonic() - began, calls))
                if report is not None and report(done[-1]) is False:
                    return done
                if not gained:
                    break
            if here.loss > ENOUGH * before:
                break
    return done


class _Point:
    """The plan at the present numbers, its run, and how far it ends from the teacher."""

    def __init__(self, parameters: Fittable, problem: Problem) -> None:
        self.vector, self.plan = parameters.vector(), parameters.frozen()
        self.trace = run(self.plan, problem)
        self.residual = (self.trace.end - problem.targets).flatten(1).double()
        errors = rms(self.trace.end, problem.targets).double()
        self.loss = float(errors.mean()) if bool(errors.isfinite().all()) else float("inf")
        self.weight = 1 / errors.clamp(min=1e-3 * self.loss)


def _step(
    here: _Point, jacobian: Tensor, parameters: Fittable, problem: Problem, damping: float, *, patience: int
) -> tuple[_Point, float, int] | None:
    """(a better point, the damping that goes with it, tries), or None; ``parameters`` are left at the better of the two."""
    weight = here.weight.sqrt()[:, None].expand_as(here.residual).reshape(-1, 1)
    a = jacobian.double() * weight
    normal, slope = a.T @ a, a.T @ (here.residual.reshape(-1, 1) * weight)[:, 0]
    if not float(normal.diagonal().max()) > 0:  # no number moves the end, or one of them makes it NaN
        return None
    ridge = torch.diag(normal.diagonal() + 1e-6 * normal.diagonal().max())
    for tries in range(1, 1 + patience):
        parameters.set(here.vector - torch.linalg.solve(normal + damping * ridge, slope))
        try:
            there = _Point(parameters, problem)
        except FewstepError:  # grid points that fell together: too long a step
            there = None
        if there is not None and there.loss < here.loss:
            return there, damping / 4, tries
        damping *= 6
    parameters.set(here.vector)
    return None


def _differences(here: _Point, parameters: Fittable, problem: Problem, deadline: float) -> tuple[Tensor, int] | None:
    """(derivatives of the ends (n d, parameters) float32, network calls), or None where there is no time left."""
    columns, calls = [], 0
    for j in range(len(here.vector)):
        if time.monotonic() > deadline:
            parameters.set(here.vector)
            return None
        moved = here.vector.clone()
        moved[j] += DIFFERENCE
        parameters.set(moved)
        plan = parameters.frozen()
        end, cost = _end_of(plan, here, problem)
        calls += cost
        columns.append(((end - here.trace.end) / DIFFERENCE).reshape(-1).float())
    parameters.set(here.vector)
    return torch.stack(columns, 1), calls


def _end_of(plan: SolverPlan, here: _Point, problem: Problem) -> tuple[Tensor, int]:
    """Where ``plan`` ends, and the network calls that it took: only from the row on that differs."""
    place = first_difference(here.plan, plan)
    if place is None:
        return here.trace.end, 0
    row, heard = place
    if heard:
        return run(plan, problem, begin=here.trace.until(row)).end, plan.steps - row
    # the network sees what it saw in this row, only the sum differs
    seen = Trace(here.trace.states[: row + 1], here.trace.outputs[: row + 1]).summed(plan)
    return run(plan, problem, begin=seen).end, plan.steps - row - 1


def calls_of_a_set(parameters: Fittable) -> int:
    """How many network calls of the batch one set of differences takes; none is made."""
    vector, plan = parameters.vector(), parameters.frozen()
    total = 0
    for j in range(len(vector)):
        moved = vector.clone()
        moved[j] += DIFFERENCE
        parameters.set(moved)
        place = first_difference(plan, parameters.frozen())
        total += 0 if place is None else plan.steps - place[0] - (not place[1])
    parameters.set(vector)
    return total


def first_difference(a: SolverPlan, b: SolverPlan) -> tuple[int, bool] | None:
    """(the first row in which two plans of one kind differ, whether its network call does); None where they are equal."""
    heard = (a.model_time != b.model_time) | (a.alpha[:-1] != b.alpha[:-1]) | (a.sigma[:-1] != b.sigma[:-1])
    heard = heard | (a.in_scale != b.in_scale)
    added = (a.state != b.state).any(1) | (a.output != b.output).any(1)
    for i in range(a.steps):
        if bool(heard[i]):
            return i, True
        if bool(added[i]):
            return i, False
    return None
