"""The chain that works best here, with everything checked on what it has not seen."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

from fewstep.errors import FewstepError
from fewstep.samplers.learn.fitting.levenberg import SECANTS, calls_of_a_set, levenberg
from fewstep.samplers.learn.fitting.mixture import Mixture, grid_of
from fewstep.samplers.learn.fitting.parameters import Parameters, Part
from fewstep.samplers.learn.fitting.rows import least_squares
from fewstep.samplers.learn.fitting.runner import error
from fewstep.samplers.learn.methods.untuned import Untuned, untuned
from fewstep.samplers.learn.teaching.problem import Problem
from fewstep.samplers.learn.teaching.teacher import Teacher
from fewstep.samplers.plan import SolverPlan

FEWEST = 8
SHARE = 0.2
"""A set of differences takes at most this share of the time that is left: fewer trajectories, but not fewer than FEWEST."""
MUCH = 0.9
"""Share of the held-out error that rows by least squares may leave to be gone on from."""
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
    ("grid", ("grid", "times"), 32, 4),
    ("coefficients", ("grid", "times", "mix"), 80, 8),
    ("free rows", ("grid", "times", "mix", "scale"), 80, 12),
)
"""(name, what is free, trajectories, sets of differences) of the stages; each goes on from the best plan so far."""


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

    Starts from the best untuned solver and grid. First its grid and model times are fitted; its rows then have a closed form,
    from which coefficients and grid go on together; then rows whose marginals need not be kept, all by Levenberg and Marquardt's
    method. What every step finds is judged on held-out trajectories; the best there is returned, and that is the untuned plan
    where nothing beat it.

    Args:
        seconds: of learning; it ends earlier where nothing improves.
        start: a learned plan to go on from, of another model for example: plans carry over between models of one noise
            schedule. Where it beats the best untuned plan the stages that find the way are left out.
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
    stages = STAGES
    if start is not None and tuning.go_on_from(_given(start, tuning.judge, nfe)):
        stages = STAGES[-1:]
    tuning.sets = sum(count for *_, count in stages)
    for stage in stages:
        tuning.run(*stage)
        if stage[0] == "grid":
            tuning.rows()
    return tuning.result(problem.about)


class _Tuning:
    """The best plan so far, and what is left of the time."""

    def __init__(self, train: Problem, judge: Problem, nfe: int, seconds: float, report: Report | None) -> None:
        self.train, self.judge, self.seconds, self.report = train, judge, seconds, report
        self.began = time.monotonic()
        few = untuned(train, nfe, samples=8)[:3]
        before = time.monotonic()
        judged = [replace(u, error=float(error(u.plan, judge).mean())) for u in few]
        judged = [u for u in judged if math.isfinite(u.error)]
        if not judged:
            raise FewstepError(
                "the untuned plans give NaN or infinite samples on the held-out trajectories; run the model in float32"
            )
        self.pace = (time.monotonic() - before) / (len(few) * nfe * len(judge))
        """Seconds of a network call for a sample."""
        self.start = min(judged, key=lambda u: u.error)
        self.untouched, self.begin = self.start.error, f"{self.start.solver} on {self.start.grid.name}"
        self.stage, self.history, self.idle, self.sets = "untuned", list[dict[str, float | None]](), 0, 1

    @property
    def spent(self) -> float:
        return time.monotonic() - self.began

    def go_on_from(self, given: Untuned) -> bool:
        """Take ``given`` for what is best so far, if it is."""
        if better := given.error < self.start.error:
            self.start, self.stage, self.begin = given, "given", given.plan.method
        return better

    def seen(self, plan: SolverPlan, loss: float, stage: str) -> bool:
        """Judge a plan, keep it if it is the best, and say whether the stage may go on."""
        found = float(error(plan, self.judge).mean())
        self.history.append({"seconds": self.spent, "loss": loss, "held_out": found if math.isfinite(found) else None})
        self.idle = 0 if found < 0.995 * self.start.error else self.idle + 1
        if found < self.start.error:
            self.start, self.stage = _as_start(plan, found, self.train), stage
        if self.report is not None:
            share = max(len(self.history) / (self.sets * (1 + SECANTS)), self.spent / self.seconds)
            self.report(Progress(min(share, 1.0), stage, loss, self.start.error, self.start.plan))
        return self.idle < PATIENCE

    def run(self, stage: str, parts: tuple[Part, ...], samples: int, sets: int) -> None:
        """Levenberg and Marquardt's method on these parts, on as many trajectories as the time allows."""
        left = self.seconds - self.spent
        parameters = Parameters(self.start.solver, self.train.schedule, self.start.grid, parts)
        if left <= 0 or not len(parameters.vector()):
            return
        affordable = SHARE * left / (self.pace * max(1, calls_of_a_set(parameters)))
        some = self.train.take(slice(0, int(max(FEWEST, min(samples, affordable)))))
        self.idle = 0
        levenberg(
            parameters,
            some,
            iterations=sets,
            seconds=left,
            report=lambda i: self.seen(parameters.frozen(), i.loss, stage),
        )

    def rows(self) -> None:
        """The closed form for the rows: one run of all trajectories, and a better start for what follows if it gains much.

        A greedy fit that gains little is a dead end: what is fitted from there on ends worse.
        """
        if self.spent >= self.seconds:
            return
        plan = least_squares(self.start.plan, self.train, ridge=1e-2)
        if float(error(plan, self.judge).mean()) < MUCH * self.start.error:
            self.seen(plan, float(error(plan, self.train).mean()), "rows")

    def result(self, about: Mapping[str, Any]) -> SolverPlan:
        told: dict[str, Any] = {
            **about,
            "learned_by": "fewstep.samplers.learn.tune",
            "stage": self.stage,
            "started_from": self.begin,
            "trajectories": len(self.train),
            "held_out": len(self.judge),
            "error_before": self.untouched,
            "error_after": self.start.error,
            "seconds": round(self.spent, 1),
            "history": self.history,
            "date": date.today().isoformat(),
        }
        return replace(self.start.plan, provenance=told)


def _as_start(plan: SolverPlan, found: float, problem: Problem) -> Untuned:
    grid = replace(grid_of(plan, problem.schedule), name="a learned grid")
    return Untuned(Mixture.of(plan, problem.schedule), grid, plan, found)


def _given(plan: SolverPlan, judge: Problem, nfe: int) -> Untuned:
    plan.check_schedule(judge.schedule, "the plan to start from")
    if plan.nfe != nfe:
        raise FewstepError(f"the plan to start from has {plan.nfe} calls, {nfe} were asked for")
    return _as_start(plan, float(error(plan, judge).mean()), judge)


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
