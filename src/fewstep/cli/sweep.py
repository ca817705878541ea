"""``fewstep sweep``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from fewstep.cli.options import FAILED, DeviceOption, duration, number, say, show

if TYPE_CHECKING:
    from fewstep.eval.sweeps.estimate import SweepEstimate
    from fewstep.eval.sweeps.results import Results
    from fewstep.eval.sweeps.sweep import Sweep

_SPECS = "Comma-separated or repeated"


def sweep(
    file: Annotated[
        Path | None, typer.Argument(metavar="[SWEEP.toml]", help="Describes the sweep; options go over what it says.")
    ] = None,
    schedulers: Annotated[
        list[str] | None,
        typer.Option(
            "--schedulers",
            "--scheduler",
            help=f"{_SPECS}; 'diffusers:Name' is diffusers' own. Options go in parentheses.",
        ),
    ] = None,
    steps: Annotated[str | None, typer.Option(help="Comma-separated, such as 5,8,10,20.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder for images and results; a run there goes on.")
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            "-m",
            help=f"{_SPECS}: embedded models (`fewstep models`), folders of saved pipelines.  [fashion-sd]",
        ),
    ] = None,
    grids: Annotated[list[str] | None, typer.Option(help=f"{_SPECS}: karras, ays, ...  [default]")] = None,
    guidance: Annotated[
        str | None,
        typer.Option(
            "--guidance",
            "-g",
            help="Classifier-free guidance scale, or several, comma-separated; at most 1 is without.  [4]",
        ),
    ] = None,
    caches: Annotated[list[str] | None, typer.Option(help=f"{_SPECS}.  [none]")] = None,
    quants: Annotated[list[str] | None, typer.Option(help=f"{_SPECS}.  [none]")] = None,
    metrics: Annotated[list[str] | None, typer.Option(help=f"{_SPECS}; what fits the model where left out.")] = None,
    fidelity: Annotated[
        str | None,
        typer.Option(
            help="Hold each image against a reference of its seed: 'same' for its own scheduler without cache and "
            "quantisation, or such as 'DDIM@100', DDIM at 100 steps.",
        ),
    ] = None,
    samples: Annotated[int | None, typer.Option("--samples", "-n", help="Images a cell.  [1000]")] = None,
    blocks: Annotated[int | None, typer.Option(help="Blocks of seeds, each a cell of its own.  [1]")] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", "-s", help="The first seed; image i has seed SEED + i.  [0]")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images drawn at once.  [50]")] = None,
    limit: Annotated[int | None, typer.Option(help="At most so many images a cell, to try it out.")] = None,
    device: DeviceOption = None,
    tracker: Annotated[
        list[str] | None, typer.Option(help=f"{_SPECS}: tensorboard, wandb, ... gets each finished cell's numbers.")
    ] = None,
    ray: Annotated[
        str | None, typer.Option(help="Run the cells on Ray: 'local', 'auto', or the address of a cluster.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it would cost; draw and write nothing.")] = False,
) -> None:
    """Every scheduler at every number of steps, and so on: images, FID, CLIP score, NFE, seconds. Resumable."""
    from fewstep.eval.sweeps.processes import ProcessLost, main_process
    from fewstep.eval.sweeps.specs import numbers, split_top_level, whole_numbers

    def several(texts: list[str] | None) -> list[str] | None:
        return None if texts is None else [item for text in texts for item in split_top_level(text)]

    given: dict[str, Any] = {
        "schedulers": several(schedulers),
        "steps": None if steps is None else whole_numbers(steps, "steps"),
        "model": several(model),
        "grids": several(grids),
        "guidance": None if guidance is None else numbers(guidance, "guidance"),
        "caches": several(caches),
        "quants": several(quants),
        "metrics": several(metrics),
        "fidelity": fidelity,
        "samples": samples,
        "blocks": blocks,
        "seed": seed,
        "batch_size": batch_size,
        "limit": limit,
        "trackers": several(tracker),
        "device": device,
    }
    request = _request(file, {key: value for key, value in given.items() if value is not None})
    if out is not None and out.exists() and not out.is_dir():
        raise ValueError(f"out is the file {str(out)!r}; give a folder")
    if dry_run:
        if not main_process():
            return
        _print_estimate(request.estimate(out))
        return
    if out is None:
        raise ValueError("--out is missing; give the folder for images and results")
    try:
        results = request.run(out, ray=ray)
    except ProcessLost as error:
        print(f"fewstep: {error}", file=sys.stderr)
        raise typer.Exit(FAILED) from error
    if main_process():
        _print_results(results)
        say(f"{out / 'results.csv'}; `fewstep report {out}` makes a page of it")
    if results.failed:
        raise typer.Exit(FAILED)


def _request(file: Path | None, given: dict[str, Any]) -> Sweep:
    from fewstep.eval.sweeps.file import from_table, read

    if file is not None:
        return read(file, given)
    for key in ("schedulers", "steps"):
        if key not in given:
            raise ValueError(f"--{key} is missing; give it, or a file that describes the sweep")
    return from_table(given, Path())


def _print_results(results: Results) -> None:
    from fewstep.eval.reports.columns import title

    table = Table(box=None, pad_edge=False)
    table.add_column("scheduler", overflow="fold")
    told = _telling(results)
    for axis in told:
        table.add_column(axis)
    for head in ("steps", "NFE/image", *(title(name) for name in results.metrics), "s/image"):
        table.add_column(head, justify="right")
    for row in results.rows:
        first = [str(getattr(row, axis)) for axis in told]
        if row.status != "ok":
            table.add_row(f"{row.scheduler} failed: {row.error}", *first, str(row.steps), style="red")
            continue
        values = [row.nfe_per_image, *(row.value(name) for name in results.metrics), row.seconds_per_image]
        table.add_row(row.scheduler, *first, str(row.steps), *map(number, values))
    show(table)


def _telling(results: Results) -> list[str]:
    """The axes beside scheduler and steps on which there is more than one value."""
    axes = ("model", "grid", "guidance", "cache", "quant", "seed")
    return [axis for axis in axes if len({getattr(row, axis) for row in results.rows}) > 1]


def _print_estimate(estimate: SweepEstimate) -> None:
    table = Table(box=None, pad_edge=False)
    for head in ("model", "cell"):
        table.add_column(head, overflow="fold")
    for head in ("guidance", "seed", "images", "calls", "NFE/image", "time"):
        table.add_column(head, justify="right")
    for one in estimate.cells:
        cell = one.cell
        where = [f"{cell.guidance:g}", str(cell.seed)]
        if one.error:
            table.add_row(cell.model, f"{cell.title} would fail: {one.error}", *where, style="red")
            continue
        counts = [str(one.images), str(one.calls), number(one.nfe_per_image)]
        table.add_row(cell.model, cell.title, *where, *counts, duration(one.seconds))
    show(table)
    basis = "; ".join(f"{model}: {text}" for model, text in estimate.basis.items())
    say(
        f"{len(estimate.cells)} cells, {estimate.images} images to draw, {estimate.calls} network calls, about "
        f"{duration(estimate.seconds)} without the metrics ({basis}); nothing was written"
    )
