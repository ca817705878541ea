"""``fewstep tune``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fewstep.cli.options import DeviceOption, duration, number, say


def tune(
    sampler: Annotated[
        bool, typer.Option("--sampler", help="Learn a sampler: a plan of few calls for this model.")
    ] = False,
    recipe: Annotated[
        bool,
        typer.Option(
            "--recipe", help="Search sampler, cache and quantisation together, for a --quality or a --budget."
        ),
    ] = False,
    model: Annotated[
        str,
        typer.Option("--model", "-m", help="An embedded model (`fewstep models`), or the folder of a saved pipeline."),
    ] = "fashion-sd",
    nfe: Annotated[int, typer.Option(help="Network calls an image, with --sampler.")] = 5,
    quality: Annotated[
        float | None, typer.Option(help="With --recipe: the largest RMS error of the latents; least work is sought.")
    ] = None,
    budget: Annotated[
        float | None, typer.Option(help="With --recipe: the most work, in calls of the network; least error is sought.")
    ] = None,
    guidance: Annotated[
        list[float] | None,
        typer.Option("--guidance", "-g", help="Guidance to learn for; repeat it for a plan that serves several.  [4]"),
    ] = None,
    calls: Annotated[
        str, typer.Option(help="With --recipe: numbers of network calls to learn samplers for, comma-separated.")
    ] = "4,6,8,12,16",
    out: Annotated[
        Path, typer.Option("--out", "-o", help="The plan's or recipe's JSON file; arrays lie beside it.")
    ] = Path("plan.json"),
    plot: Annotated[Path | None, typer.Option(help="A PNG of the loss and the learned grid.  [OUT with .png]")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="A text file, a prompt a line; the embedded model's own if left out.")
    ] = None,
    minutes: Annotated[float, typer.Option(help="How long to learn, after the teacher.")] = 15.0,
    trajectories: Annotated[int, typer.Option(help="How many trajectories; a third of them is only judged by.")] = 64,
    teacher_steps: Annotated[int, typer.Option(help="Steps of the teacher.")] = 64,
    work: Annotated[
        Path | None, typer.Option(help="Keep the teacher's trajectories here; a stopped run goes on from them.")
    ] = None,
    device: DeviceOption = None,
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
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from fewstep.eval.sweeps.sources import make_sources
    from fewstep.samplers import learn

    (source,) = make_sources(model)
    given = _lines(prompts)
    if given is None and not source.embedded and source.family != "unconditional":
        raise ValueError(f"{model} draws what it is told; give --prompts, a file with at least {trajectories} lines")
    words = list(source.prompts(given))
    if given is None:
        words = words[-trajectories:]  # its evaluations begin with the first ones
    pipe = source.load(device)
    if recipe:
        _recipe(pipe, words, quality, budget, guidance, minutes, trajectories, teacher_steps, calls, work, out, plot)
        return
    scales = guidance or [4.0 if source.guided else 1.0]
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, transient=True) as bar:
        task = bar.add_task("teacher", total=None)
        seeds = range(FIRST, FIRST + trajectories)
        teacher = learn.Teacher(pipe, words, scales, teacher_steps, seeds, folder=work)
        problem = teacher.problem()

        def report(progress: Any) -> None:
            said = f"{progress.stage}: {progress.loss:.4f}, held out {progress.held_out:.4f}"
            bar.update(task, description=said, total=1.0, completed=progress.share)

        plan = learn.tune(problem, nfe, seconds=60 * minutes, report=report)
    plan.save(out)
    learn.plot(plan, plot or out.with_suffix(".png"))
    told = plan.provenance
    say(
        f"{out}: {plan.nfe} calls, held-out RMS error {number(told['error_before'])} -> {number(told['error_after'])} "
        f"({told['started_from']} -> {told['stage']}), {duration(told['seconds'])}"
    )


def _recipe(
    pipe: Any, words: list[str], quality: float | None, budget: float | None, guidance: list[float] | None, minutes: float,
    trajectories: int, steps: int, calls: str, work: Path | None, out: Path, plot: Path | None,
) -> None:  # fmt: skip
    from rich.console import Console

    from fewstep import pipelines
    from fewstep.errors import FewstepError
    from fewstep.eval.sweeps.specs import whole_numbers

    if guidance is not None and len(guidance) > 1:
        raise FewstepError(f"a recipe is for one guidance scale, got {guidance}")
    with Console(stderr=True).status("tuning") as status:
        found = pipelines.tune(
            pipe, words, quality=quality, budget=budget, calls=whole_numbers(calls, "calls"),
            guidance=guidance[0] if guidance else None, minutes=minutes, trajectories=trajectories, reference=steps,
            folder=work, tell=status.update,
        )  # fmt: skip
    found.save(out)
    found.plot().savefig(plot or out.with_suffix(".png"), dpi=150)
    told = found.provenance
    say(f"{out}: {found}; held-out RMS error {number(told['error'])}, the work of {number(told['work'])} calls")


FIRST = 1_000_000
"""The first trajectory's seed, far from those that images are drawn from."""


def _lines(path: Path | None) -> list[str] | None:
    if path is None:
        return None
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"{path} holds no prompt; give one a line")
    return lines
