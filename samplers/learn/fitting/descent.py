"""Gradient descent on a plan's free numbers, through the whole run of the student."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.errors import FewstepError, GridError
from fewstep.samplers.learn.fitting.parameters import Parameters
from fewstep.samplers.learn.fitting.runner import Trace, error, rms, run
from fewstep.samplers.learn.teaching.problem import Problem
from fewstep.samplers.plan import SolverPlan

Loss = Callable[[Trace, Problem, SolverPlan], Tensor]
"""(n,): what the trace of a plan costs."""


def end_rms(trace: Trace, problem: Problem, plan: SolverPlan) -> Tensor:
    """The RMS distance of the student's end from its teacher's."""
    del plan
    return rms(trace.end, problem.targets)


@dataclass(frozen=True)
class Descent:
    """Options of :func:`descend`."""

    rate: float = 0.03
    """Adam's step size, which falls to 0 along a cosine."""
    iterations: int = 100
    seconds: float = math.inf
    """Stop after these, wherever the cosine is."""
    batch: int = 16
    relax: float = 0.0
    """RMS radius of a ball in which the student may choose its own start (LD3's relaxed objective); 0 is none."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    seed: int = 0


def descend(
    parameters: Parameters,
    problem: Problem,
    held_out: Problem,
    options: Descent,
    *,
    loss: Loss = end_rms,
    report: Callable[[float, float], None] | None = None,
) -> list[float]:
    """Minimise ``loss`` over the problem's samples; ``parameters`` is left where the error on ``held_out`` was least.

    Args:
        held_out: trajectories to judge by, ten times on the way and at the end.
        report: called after every iteration with (share of the budget, loss).

    Returns:
        The loss of every iteration.

    Raises:
        FewstepError: the plan to start from gives NaN on this model, so there is nothing to descend from.
    """
    began, tensors = time.monotonic(), parameters.tensors()
    optimiser = torch.optim.Adam(tensors, lr=options.rate, betas=(0.9, 0.95))
    randomness = torch.Generator().manual_seed(options.seed)
    offsets = torch.zeros_like(problem.noise)
    best, kept, history = math.inf, parameters.vector(), list[float]()

    def judge() -> None:
        nonlocal best, kept
        try:
            found = float(error(parameters.frozen(), held_out).mean())
        except GridError:  # points that fell together: the steps were too long
            return
        if found < best:
            best, kept = found, parameters.vector()

    judge()
    if not math.isfinite(best):
        raise FewstepError("the plan to start from gives NaN or infinite samples on this model; start from another")
    for k in range(options.iterations):
        spent = max(k / options.iterations, (time.monotonic() - began) / options.seconds)
        if spent >= 1:
            break
        for group in optimiser.param_groups:
            group["lr"] = options.rate * 0.5 * (1 + math.cos(math.pi * spent))
        some = torch.randperm(len(problem), generator=randomness)[: options.batch]
        part = problem.take(some)
        try:
            plan = parameters.plan()
        except GridError:
            break
        start = part.start(plan) + offsets[some]
        free = [start.requires_grad_()] if options.relax else []
        value = loss(run(plan, part, begin=Trace((start,), ())), part, plan).mean()
        if not value.requires_grad:
            raise FewstepError(
                "this model gives no gradient to its time; it must compute with the t it is given, as a tensor"
            )
        gradients = torch.autograd.grad(value, [*tensors, *free], allow_unused=True)
        if not bool(value.isfinite()):
            break
        for v, g in zip(tensors, gradients, strict=False):
            v.grad = torch.zeros_like(v) if g is None else g
        torch.nn.utils.clip_grad_norm_(tensors, options.clip)
        optimiser.step()
        if options.relax and gradients[-1] is not None:
            offsets[some] = _in_ball(offsets[some] - _direction(gradients[-1]) * 0.3 * options.relax, options.relax)
        history.append(float(value.detach()))
        if report is not None:
            report(spent, history[-1])
        if (k + 1) % max(1, options.iterations // 10) == 0:
            judge()
    judge()
    parameters.set(kept)
    return history


def _norm(x: Tensor) -> Tensor:
    return x.flatten(1).square().mean(1).sqrt().reshape(-1, *[1] * (x.ndim - 1)).clamp(min=1e-12)


def _direction(gradient: Tensor) -> Tensor:
    return gradient.detach() / _norm(gradient.detach())


def _in_ball(x: Tensor, radius: float) -> Tensor:
    return x * (radius / _norm(x)).clamp(max=1)
