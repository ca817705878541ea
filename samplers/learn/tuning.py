"""The chain that works best here, with everything checked on what it has not seen."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

from fewstep.errors import FewstepError
from fewstep.samplers.learn.fitting.levenberg import SECANTS, Iteration, calls_of_a_set, levenberg
from fewstep.samplers.learn.fitting.mixture import Mixture, grid_of
from fewstep.samplers.learn.fitting.parameters import Parameters, Part
from fewstep.samplers.learn.fitting.runner import error
from fewstep.samplers.learn.methods.untuned import Untuned, untuned
from fewstep.samplers.learn.teaching.problem import Problem
from fewstep.samplers.learn.teaching.teacher import Teacher
from fewstep.samplers.plan import SolverPlan

FEWEST = 8
SHARE = 0.2
"""A set of differences takes at most this share of the time that is left: fewer trajectories, but not fewer than FEWEST."""
PATIENCE = 3
"""Steps that do not help on held-out trajectories, after which a stage is over."""


@dataclass(frozen=True)
class Progress:
    """Where a run of :func:`tune` is."""

    share: float
    """Of the time it may take, or more of the iterations."""
    stage: str
    loss: float
    """Mean RMS error on what is learned from."""
    held_out: float
    """The same on what is not, of the best plan so far."""
    plan: SolverPlan


Report = Callable[[Progress], None]
STAGES: tuple[tuple[str, tuple[Part, ...], int, int], ...] = (
    ("grid", ("grid", "times"), 12, 1),
    ("coefficients", ("grid", "times", "mix"), 12, 3),
    ("free rows", ("grid", "times", "mix", "scale"), 32, 3),
)
"""(name, what is free, trajectories, sets of differences) of the stages; each goes on from the one before.

A dozen trajectories are enough to find the way, at a fraction of the cost."""


def tune(
    problem: Problem,
    nfe: int,
    *,
    seconds: float = 900.0,
    held_out: int | None = None,
    start: SolverPlan | None = None,
    report: Report | None = None,
) -> SolverPlan:
    """The best plan of so many calls that can be learned from ``problem`` in that time.

    Starts from the best untuned solver and grid. First its grid and model times are fitted, then the coefficients with them,
    then, on more trajectories, rows whose marginals need not be kept, all by Levenberg and Marquardt's method. What every step
    finds is judged on held-out trajectories; the best there is returned, and that is the untuned plan where nothing beat it.

    Args:
        seconds: of learning; it ends earlier where nothing improves.
        start: a learned plan to go on from, of another model for example: plans carry over between models of one noise
            schedule. Where it beats the best untuned plan the stages that find the way are left out.
        held_out: trajectories to judge by; a third if left out.

    Returns:
        The plan, with what it was learned for and its held-out error before and after in ``provenance``.

    Raises:
        FewstepError: fewer than three trajectories, or a number of calls that no solver can make.
    """
    if len(problem) < 3:
        raise FewstepError(
            f"{len(problem)} trajectories are too few to learn from and to judge by; give at least 3, rather 64"
        )
    began = time.monotonic()
    train, judge = problem.split(held_out or max(1, len(problem) // 3))
    begin, pace = _start(train, judge, nfe)
    untouched, stages = begin.error, STAGES
    if start is not None:
        given = _given(start, judge, nfe)
        if given.error < begin.error:
            begin, stages = given, STAGES[-1:]
    best, least, method = begin.plan, begin.error, "untuned" if stages == STAGES else "given"
    history: list[dict[str, float]] = []
    carried: Parameters | None = None
    total = sum(count * (1 + SECANTS) for *_, count in stages)
    for stage, parts, samples, count in stages:
        left = seconds - (time.monotonic() - began)
        if left <= 0:
            break
        parameters = Parameters(begin.solver, problem.schedule, begin.grid, parts)
        if carried is not None:
            parameters.take(carried)
        if not any(math.prod(v.shape) for v in parameters.tensors()):
            continue

        def seen(iteration: Iteration, parameters: Parameters = parameters, stage: str = stage) -> bool:
            nonlocal best, least, method, idle
            plan = parameters.frozen()
            found = float(error(plan, judge).mean())
            history.append({"seconds": time.monotonic() - began, "loss": iteration.loss, "held_out": found})
            idle = 0 if found < 0.995 * least else idle + 1
            if found < least:
                best, least, method = plan, found, stage
            if report is not None:
                share = max(len(history) / total, (time.monotonic() - began) / seconds)
                report(Progress(min(share, 1.0), stage, iteration.loss, least, best))
            return idle < PATIENCE

        idle = 0
        affordable = int(SHARE * left / (pace * max(1, calls_of_a_set(parameters)))) if left < math.inf else samples
        some = train.take(slice(0, max(FEWEST, min(samples, affordable))))
        levenberg(parameters, some, iterations=count, seconds=left, report=seen)
        carried = parameters
    provenance: dict[str, Any] = {
        **problem.about,
        "learned_by": "fewstep.samplers.learn.tune",
        "stage": method,
        "started_from": f"{begin.solver} on {begin.grid.name}",
        "trajectories": len(train),
        "held_out": len(judge),
        "error_before": untouched,
        "error_after": least,
        "seconds": round(time.monotonic() - began, 1),
        "history": history,
        "date": date.today().isoformat(),
    }
    return replace(best, provenance=provenance)


def _start(train: Problem, judge: Problem, nfe: int) -> tuple[Untuned, float]:
    """The best untuned plan, and the seconds that a network call takes for a sample.

    The few plans that are best on some trajectories are compared on all that are held out.
    """
    few = untuned(train, nfe, samples=8)[:3]
    began = time.monotonic()
    judged = [replace(u, error=float(error(u.plan, judge).mean())) for u in few]
    pace = (time.monotonic() - began) / (len(few) * nfe * len(judge))
    return min(judged, key=lambda u: u.error), pace


def _given(plan: SolverPlan, judge: Problem, nfe: int) -> Untuned:
    plan.check_schedule(judge.schedule, "the plan to start from")
    if plan.nfe != nfe:
        raise FewstepError(f"the plan to start from has {plan.nfe} calls, {nfe} were asked for")
    grid = replace(grid_of(plan, judge.schedule), name="a learned grid")
    return Untuned(Mixture.of(plan, judge.schedule), grid, plan, float(error(plan, judge).mean()))


def auto(
    pipe: Any,
    prompts: Sequence[str],
    nfe: int,
    minutes: float = 15.0,
    *,
    guidance: float | Sequence[float] = 7.5,
    trajectories: int = 64,
    teacher_steps: int = 64,
    seed: int = 1_000_000,
    folder: str | Path | None = None,
    call: dict[str, Any] | None = None,
    report: Report | None = None,
) -> SolverPlan:
    """Learn a plan of ``nfe`` calls for a diffusers pipeline: :func:`tune` on trajectories of a :class:`Teacher`.

    Args:
        pipe: any pipeline that calls its ``unet`` or ``transformer`` once a step; see :class:`Teacher`.
        prompts: as many as ``trajectories``; the last third, and its noise, is what the plan is judged by.
        minutes: of learning, after the teacher's trajectories are there.
        guidance: one, or several that the plan shall serve.
        seed: the first trajectory's; far from the seeds that are used to draw, so that held-out stays held out.
        folder: where the trajectories are kept for the next number of calls.

    Returns:
        A plan for :class:`~fewstep.samplers.PlanScheduler`; :func:`~fewstep.samplers.learn.use_` puts it into a pipeline and
        warns where it is used outside of what it was learned for.
    """
    seeds = range(seed, seed + trajectories)
    teacher = Teacher(pipe, prompts, guidance, teacher_steps, seeds, folder=folder, call=call)
    return tune(teacher.problem(), nfe, seconds=60 * minutes, report=report)
