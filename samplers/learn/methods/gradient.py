"""Methods that differentiate the student's whole run: LD3, the time tuner, S4S, BNS, Bespoke and the solver search."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import huber_loss

from fewstep.samplers.grid import Grid
from fewstep.samplers.learn.fitting.descent import Descent, Loss, descend, end_rms
from fewstep.samplers.learn.fitting.parameters import Parameters, Part
from fewstep.samplers.learn.fitting.runner import Trace, error
from fewstep.samplers.learn.methods.untuned import untuned
from fewstep.samplers.learn.teaching.problem import Problem
from fewstep.samplers.plan import SolverPlan
from fewstep.samplers.solver import Solver
from fewstep.samplers.solvers.ddim import DDIM
from fewstep.samplers.solvers.dpm_solver import DPMSolver
from fewstep.samplers.solvers.flow import FlowSolver

Report = Callable[[float, float], None]
HELD_OUT = 0.25
"""Share of the trajectories that the best numbers on the way are chosen by."""


def fit(
    name: str,
    problem: Problem,
    nfe: int,
    stages: Sequence[Sequence[Part]],
    *,
    solver: Solver | None = None,
    grid: Grid | None = None,
    options: Descent | None = None,
    loss: Loss = end_rms,
    report: Report | None = None,
) -> SolverPlan:
    """Descend on the parts of a plan, stage by stage; the options' iterations and seconds are shared among the stages.

    Args:
        stages: the parts that are free in each stage; what the stages before found is kept.
        solver, grid: where to start; the best of :func:`untuned` where either is left out.
    """
    options = options or Descent()
    train, held_out = problem.split(max(1, round(HELD_OUT * len(problem))))
    if solver is None or grid is None:
        best = [u for u in untuned(train, nfe) if (solver is None or u.solver == solver)]
        start = best[0] if best else untuned(train, nfe)[0]
        solver, grid = solver or start.solver, grid or start.grid
    parts: list[Part] = list(dict.fromkeys(p for stage in stages for p in stage))
    parameters = Parameters(solver, problem.schedule, grid, parts)
    before = float(error(parameters.frozen(), held_out).mean())
    history: list[float] = []
    share = replace(
        options, iterations=max(1, options.iterations // len(stages)), seconds=options.seconds / len(stages)
    )
    for k, stage in enumerate(stages):
        with parameters.only(stage):
            history += descend(
                parameters, train, held_out, replace(share, seed=options.seed + k), loss=loss, report=report
            )
    made: dict[str, Any] = {
        **problem.about, "method": name, "loss": history, "error_before": before,
        "error_after": float(error(parameters.frozen(), held_out).mean()),
    }  # fmt: skip
    return parameters.frozen(made)


def ld3(
    problem: Problem, nfe: int, *, relax: float | None = None, options: Descent | None = None, **start: Any
) -> SolverPlan:
    """The grid and, apart from it, the times that the network is told.

    The objective is relaxed: the student may start up to ``relax`` (RMS) away from the noise. The default is the authors'
    0.001 H W C / N^2 as an L2 radius. RMS of latents stands in for their LPIPS of images.

    Source: Learning to Discretize Denoising Diffusion ODEs, 2405.15506, section 4.
    """
    d = problem.noise[0].numel()
    relax = 1e-3 * d / nfe**2 / d**0.5 if relax is None else relax
    return fit("ld3", problem, nfe, [("grid", "times")], options=replace(options or Descent(), relax=relax), **start)


def time_tuner(problem: Problem, nfe: int, **options: Any) -> SolverPlan:
    """Only the times that the network is told. Source: Towards More Accurate Diffusion Model Acceleration with a Timestep
    Tuner, 2310.09469."""
    return fit("time_tuner", problem, nfe, [("times",)], **options)


def s4s(
    problem: Problem, nfe: int, *, alternate: bool = True, options: Descent | None = None, **start: Any
) -> SolverPlan:
    """The multistep coefficients or, alternately, the times and the coefficients, on LD3's relaxed objective.

    Source: S4S: Solving for a Diffusion Model Solver, 2502.17423, sections 3 and 4.
    """
    relax = 1e-3 * problem.noise[0].numel() ** 0.5 / nfe**2
    stages: list[Sequence[Part]] = [("grid", "times"), ("mix",)] * 2 if alternate else [("mix",)]
    return fit("s4s", problem, nfe, stages, options=replace(options or Descent(), relax=relax), **start)


def bns(problem: Problem, nfe: int, **options: Any) -> SolverPlan:
    """All coefficients and times of an N-step linear method, nothing held: states may have another marginal.

    Rows here start from X_i where the paper's start from X_0; with all outputs at hand that spans the same methods.

    Source: Bespoke Non-Stationary Solvers, 2403.01329, section 3.
    """
    return fit("bns", problem, nfe, [("grid", "times", "mix", "scale")], **options)


def bespoke(problem: Problem, nfe: int, *, grid: Grid | None = None, **options: Any) -> SolverPlan:
    """A scale and time transformation of Euler's method: the grid and two numbers a row.

    RK1-Bespoke's row ((s_i + h s'_i) X_i + h t'_i s_i u_i) / s_{i+1} is Euler's with any factor on the state and any on the
    velocity; these are what is free here. The end error is minimised in place of the paper's bound on it.

    Source: Bespoke Solvers for Generative Flow Models, 2310.19075, eq. 16 and 17.
    """
    solver = FlowSolver(order=1) if problem.schedule.family == "flow" else DDIM()
    if grid is None:
        grid = untuned(problem, nfe)[0].grid
    return fit("bespoke", problem, nfe, [("grid", "scale")], solver=solver, grid=grid, **options)


def neural_solver(problem: Problem, nfe: int, *, grid: Grid | None = None, **options: Any) -> SolverPlan:
    """Step sizes and affine mixtures of outputs in first-order rows, by the states on the way and the end.

    The loss is the sum over steps of the squared distance to the teacher's state at that time, and 1000 times the Huber
    loss (delta 0.001) of the end.

    Source: Differentiable Solver Search for Fast Diffusion Sampling, 2505.21114, section 4.
    """

    solver = FlowSolver(order=1) if problem.schedule.family == "flow" else DPMSolver(order=1)
    grid = grid or untuned(problem, nfe)[0].grid
    return fit("neural_solver", problem, nfe, [("grid", "mix")], solver=solver, grid=grid, loss=_on_the_way, **options)


def _on_the_way(trace: Trace, problem: Problem, plan: SolverPlan) -> Tensor:
    lam = (torch.log(plan.alpha) - torch.log(plan.sigma)).detach()
    total = 1000 * huber_loss(trace.end, problem.targets, reduction="none", delta=1e-3).flatten(1).mean(1)
    for x, at in zip(trace.states[1:-1], lam[1:-1].tolist(), strict=True):
        total = total + (x - problem.state_at(at)).flatten(1).square().mean(1)
    return total
