"""The chain that works best here, with everything checked on what it has not seen."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

from fewstep.errors import FewstepError
from fewstep.samplers.grid import Grid
from fewstep.samplers.learn.fitting.levenberg import SECANTS, Iteration, calls_of_a_set, levenberg
from fewstep.samplers.learn.fitting.mixture import Mixture, grid_of
from fewstep.samplers.learn.fitting.parameters import Parameters, Part
from fewstep.samplers.learn.fitting.rows import least_squares
from fewstep.samplers.learn.fitting.runner import error
from fewstep.samplers.learn.methods.untuned import Untuned, shortlist
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


class Stage(NamedTuple):
    """What is searched, and what for."""

    name: str
    parts: tuple[Part, ...]
    samples: int
    """Trajectories, at most."""
    sets: int
    """Of differences, at most."""
    share: float
    """Of the time that is left."""
    worth: int
    """Trajectories without which it is left out, and its time for what follows."""


GRID = Stage("grid", ("grid", "times"), samples=32, sets=4, share=1 / 3, worth=FEWEST)
ROWS = Stage("free rows", ("grid", "times", "mix", "scale"), samples=80, sets=12, share=1.0, worth=0)


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

    Starts from the best untuned solvers on three grids. Rows have a closed form (:func:`least_squares`), which costs one run
    and is all that little time allows. Then the best grid and the times that the network is told are searched, and rows follow
    in closed form again. From the best of these, and if time is left from the others, all numbers are searched together, by
    Levenberg and Marquardt's method. What every step finds is judged on held-out trajectories; the best there is returned, and
    that is the untuned plan where nothing beat it.

    Args:
        seconds: of learning; it ends earlier where nothing improves.
        start: a learned plan to go on from, of another model for example: plans carry over between models of one noise
            schedule. Where it beats the best untuned plan its grid is not searched by itself again.
        held_out: trajectories to judge by; a third if left out.

    Returns:
        The plan, with what it was learned for and its held-out error before and after in ``provenance``.

    Raises:
        FewstepError: fewer than three trajectories, a number of calls that no solver can make, or samples that are not finite.
    """
    if len(problem) < 3:
        raise FewstepError(
            f"{len(problem)} trajectories are too few to learn from and to judge by; give at least 3, rather 64"
        )
    held_out = max(1, len(problem) // 3) if held_out is None else held_out
    tuning = _Tuning(*problem.split(held_out), nfe, seconds, report)
    given = start is not None and tuning.take(_given(start, tuning.judge, nfe))
    starts = [tuning.best] if given else tuning.starts
    begins = [tuning.rows(start) for start in starts]
    if not given and (placed := tuning.search(starts[0], GRID)) is not starts[0]:
        begins.append(tuning.rows(placed))
    for begin in sorted(begins, key=lambda u: u.error):
        tuning.search(begin, ROWS)
    return tuning.result(problem.about)


class _Tuning:
    """The best plan so far, and what is left of the time."""

    def __init__(self, train: Problem, judge: Problem, nfe: int, seconds: float, report: Report | None) -> None:
        self.train, self.judge, self.seconds, self.report = train, judge, seconds, report
        self.began = time.monotonic()
        few = shortlist(train, nfe)
        before = time.monotonic()
        judged = [replace(u, error=float(error(u.plan, judge).mean())) for u in few]
        judged = [u for u in judged if math.isfinite(u.error)]
        if not judged:
            raise FewstepError(
                "the untuned plans give NaN or infinite samples on the held-out trajectories; run the model in float32"
            )
        self.pace = (time.monotonic() - before) / (len(few) * nfe * len(judge))
        """Seconds of a network call for a sample."""
        self.starts = sorted(judged, key=lambda u: u.error)
        self.best = self.starts[0]
        self.untouched, self.begin = self.best.error, f"{self.best.solver} on {self.best.grid.name}"
        self.stage, self.history = "untuned", list[dict[str, float | None]]()

    @property
    def spent(self) -> float:
        return time.monotonic() - self.began

    def take(self, given: Untuned) -> bool:
        """Whether ``given`` is better than what is best so far; it is what is best then."""
        if better := given.error < self.best.error:
            self.best, self.stage, self.begin = given, "given", given.plan.method
        return better

    def seen(self, plan: SolverPlan, loss: float, stage: str) -> Untuned:
        """Judge a plan, and keep it if it is the best."""
        found = float(error(plan, self.judge).mean())
        here = Untuned(Mixture.of(plan, self.train.schedule), _learned_grid(plan, self.train), plan, found)
        self.history.append({"seconds": self.spent, "loss": loss, "held_out": found if math.isfinite(found) else None})
        if found < self.best.error:
            self.best, self.stage = here, stage
        if self.report is not None:
            sets = GRID.sets + (1 + len(self.starts)) * ROWS.sets
            share = max(len(self.history) / (sets * (1 + SECANTS)), self.spent / self.seconds)
            self.report(Progress(min(share, 1.0), stage, loss, self.best.error, self.best.plan))
        return here

    def search(self, begin: Untuned, stage: Stage) -> Untuned:
        """The best of what Levenberg and Marquardt's method finds from ``begin``, on as many trajectories as time allows."""
        left = stage.share * (self.seconds - self.spent)
        parameters = Parameters(begin.solver, self.train.schedule, begin.grid, stage.parts)
        if left <= 0 or not len(parameters.vector()):
            return begin
        affordable = SHARE * left / (self.pace * max(1, calls_of_a_set(parameters)))
        if affordable < stage.worth:
            return begin
        some = self.train.take(slice(0, int(max(FEWEST, min(stage.samples, affordable)))))
        best, idle = begin, 0

        def goes_on(step: Iteration) -> bool:
            nonlocal best, idle
            here = self.seen(parameters.frozen(), step.loss, stage.name)
            idle = 0 if here.error < 0.995 * best.error else idle + 1
            best = _least(best, here)
            return idle < PATIENCE

        levenberg(parameters, some, iterations=stage.sets, seconds=left, report=goes_on)
        return best

    def rows(self, begin: Untuned) -> Untuned:
        """``begin`` with the closed form for its rows, which costs one run of all trajectories, if that is better."""
        if self.spent >= self.seconds:
            return begin
        plan = least_squares(begin.plan, self.train, free=True)
        return _least(begin, self.seen(plan, float(error(plan, self.train.take(slice(0, FEWEST))).mean()), "rows"))

    def result(self, about: Mapping[str, Any]) -> SolverPlan:
        told: dict[str, Any] = {
            **about,
            "learned_by": "fewstep.samplers.learn.tune",
            "stage": self.stage,
            "started_from": self.begin,
            "trajectories": len(self.train),
            "held_out": len(self.judge),
            "error_before": self.untouched,
            "error_after": self.best.error,
            "seconds": round(self.spent, 1),
            "history": self.history,
            "date": date.today().isoformat(),
        }
        return replace(self.best.plan, provenance=told)


def _least(*found: Untuned) -> Untuned:
    return min((u for u in found if math.isfinite(u.error)), key=lambda u: u.error)


def _learned_grid(plan: SolverPlan, problem: Problem) -> Grid:
    return replace(grid_of(plan, problem.schedule), name="a learned grid")


def _given(plan: SolverPlan, judge: Problem, nfe: int) -> Untuned:
    plan.check_schedule(judge.schedule, "the plan to start from")
    if plan.nfe != nfe:
        raise FewstepError(f"the plan to start from has {plan.nfe} calls, {nfe} were asked for")
    found = float(error(plan, judge).mean())
    return Untuned(Mixture.of(plan, judge.schedule), _learned_grid(plan, judge), plan, found)


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
