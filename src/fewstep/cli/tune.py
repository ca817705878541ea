"""``fewstep tune``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewstep.artifact import check_writable
from fewstep.cli import options
from fewstep.cli.printing import duration, number, say

FIRST = 1_000_000
"""The first trajectory's seed, far from those that images are drawn from."""


def tune(
    sampler: options.TuneSampler = False,
    recipe: options.TuneRecipe = False,
    model: options.Model = "fashion-sd",
    nfe: options.NFE = 5,
    quality: options.Quality = None,
    budget: options.Budget = None,
    guidance: options.LearnedGuidance = None,
    calls: options.Calls = "4,6,8,12,16",
    out: options.Tuned = Path("plan.json"),
    plot: options.Plot = None,
    prompts: options.Prompts = None,
    minutes: options.Minutes = 15.0,
    trajectories: options.Trajectories = 64,
    teacher_steps: options.TeacherSteps = 64,
    work: options.Work = None,
    device: options.Device = None,
) -> None:
    """Learn a sampler for a model: fewer calls for the same pictures, in minutes. Or a whole recipe."""
    if sampler == recipe:
        raise ValueError("tune needs to be told what: give --sampler or --recipe")
    if recipe == (quality is None and budget is None) or (quality is not None and budget is not None):
        raise ValueError("--recipe takes --quality or --budget, one of the two, and --sampler neither")
    if out.suffix != ".json":
        raise ValueError(f"out is {str(out)!r}; give a file that ends in .json")
    if not minutes > 0:
        raise ValueError(f"minutes is {minutes:g}; give a positive number")
    if trajectories < 3:
        raise ValueError(f"trajectories is {trajectories}; give at least 3, rather 64")
    if nfe < 1:
        raise ValueError(f"nfe is {nfe}; give a whole number of at least 1")
    lesson = _lesson(model, prompts, guidance, minutes, trajectories, teacher_steps, work, device)
    picture = plot or out.with_suffix(".png")
    check_writable(out)
    check_writable(picture)
    if recipe:
        _tune_recipe(lesson, quality, budget, calls, out, picture)
    else:
        _tune_sampler(lesson, nfe, out, picture)


@dataclass(frozen=True)
class Lesson:
    """What both kinds of tuning learn from."""

    pipe: Any
    prompts: list[str]
    guidance: list[float]
    minutes: float
    trajectories: int
    teacher_steps: int
    work: Path | None


def _lesson(
    model: str, prompts: Path | None, guidance: list[float] | None, minutes: float, trajectories: int, teacher_steps: int,
    work: Path | None, device: str | None,
) -> Lesson:  # fmt: skip
    from fewstep.eval.sweeps.sources import make_sources

    (source,) = make_sources(model)
    given = _lines(prompts)
    if given is None and not source.embedded and source.family != "unconditional":
        raise ValueError(f"{model} draws what it is told; give --prompts, a file with at least {trajectories} lines")
    words = list(source.prompts(given))
    if given is None:
        words = words[-trajectories:]  # its evaluations begin with the first ones
    pipe = source.load(device)
    scales = guidance or [4.0 if source.guided else 1.0]
    return Lesson(pipe, words, scales, minutes, trajectories, teacher_steps, work)


def _lines(path: Path | None) -> list[str] | None:
    if path is None:
        return None
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"{path} holds no prompt; give one a line")
    return lines


def _tune_sampler(lesson: Lesson, nfe: int, out: Path, picture: Path) -> None:
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from fewstep.samplers import learn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, transient=True) as bar:
        task = bar.add_task("teacher", total=None)
        seeds = range(FIRST, FIRST + lesson.trajectories)
        teacher = learn.Teacher(
            lesson.pipe, lesson.prompts, lesson.guidance, lesson.teacher_steps, seeds, folder=lesson.work
        )
        problem = teacher.problem()

        def report(progress: Any) -> None:
            said = f"{progress.stage}: {progress.loss:.4f}, held out {progress.held_out:.4f}"
            bar.update(task, description=said, total=1.0, completed=progress.share)

        plan = learn.tune(problem, nfe, seconds=60 * lesson.minutes, report=report)
    plan.save(out)
    learn.plot(plan, picture)
    told = plan.provenance
    say(
        f"{out}: {plan.nfe} calls, held-out RMS error {number(told['error_before'])} -> {number(told['error_after'])} "
        f"({told['started_from']} -> {told['stage']}), {duration(told['seconds'])}"
    )


def _tune_recipe(
    lesson: Lesson, quality: float | None, budget: float | None, calls: str, out: Path, picture: Path
) -> None:
    from rich.console import Console

    from fewstep import pipelines
    from fewstep.eval.sweeps.specs import whole_numbers

    if len(lesson.guidance) > 1:
        raise ValueError(f"a recipe is for one guidance scale, got {lesson.guidance}")
    with Console(stderr=True).status("tuning") as status:
        found = pipelines.tune(
            lesson.pipe, lesson.prompts, quality=quality, budget=budget, calls=whole_numbers(calls, "calls"),
            guidance=lesson.guidance[0], minutes=lesson.minutes,
            trajectories=lesson.trajectories, reference=lesson.teacher_steps, folder=lesson.work, tell=status.update,
        )  # fmt: skip
    found.save(out)
    found.plot().savefig(picture, dpi=150)
    told = found.provenance
    say(f"{out}: {found}; held-out RMS error {number(told['error'])}, the work of {number(told['work'])} calls")
