"""``fewstep sweep``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from fewstep.cli import options
from fewstep.cli.printing import say
from fewstep.cli.tables import print_estimate, print_results

if TYPE_CHECKING:
    from fewstep.eval.sweeps.sweep import Sweep


def sweep(
    file: options.SweepFile = None,
    schedulers: options.Schedulers = None,
    steps: options.NumbersOfSteps = None,
    out: options.SweepFolder = None,
    model: options.Models = None,
    grids: options.Grids = None,
    guidance: options.Guidances = None,
    caches: options.Caches = None,
    quants: options.Quants = None,
    metrics: options.Metrics = None,
    fidelity: options.Fidelity = None,
    samples: options.Samples = None,
    blocks: options.Blocks = None,
    seed: options.FirstSeed = None,
    batch_size: options.BatchSize = None,
    limit: options.Limit = None,
    device: options.Device = None,
    tracker: options.Trackers = None,
    ray: options.Ray = None,
    dry_run: options.DryRun = False,
) -> None:
    """Every scheduler at every number of steps, and so on: images, FID, CLIP score, NFE, seconds. Resumable."""
    from fewstep.eval.sweeps.specs import numbers, whole_numbers

    given: dict[str, Any] = {
        "schedulers": _items(schedulers),
        "steps": None if steps is None else whole_numbers(steps, "steps"),
        "model": _items(model),
        "grids": _items(grids),
        "guidance": None if guidance is None else numbers(guidance, "guidance"),
        "caches": _items(caches),
        "quants": _items(quants),
        "metrics": _items(metrics),
        "fidelity": fidelity,
        "samples": samples,
        "blocks": blocks,
        "seed": seed,
        "batch_size": batch_size,
        "limit": limit,
        "trackers": _items(tracker),
        "device": device,
    }
    request = _request(file, {key: value for key, value in given.items() if value is not None})
    if out is not None and out.exists() and not out.is_dir():
        raise ValueError(f"out is the file {str(out)!r}; give a folder")
    if dry_run:
        _estimate(request, out)
    elif out is None:
        raise ValueError("--out is missing; give the folder for images and results")
    else:
        _run(request, out, ray)


def _items(texts: list[str] | None) -> list[str] | None:
    """The items of an option that is comma-separated, repeated, or both."""
    from fewstep.eval.sweeps.specs import split_top_level

    return None if texts is None else [item for text in texts for item in split_top_level(text)]


def _request(file: Path | None, given: dict[str, Any]) -> Sweep:
    from fewstep.eval.sweeps.file import from_table, read

    if file is not None:
        return read(file, given)
    for key in ("schedulers", "steps"):
        if key not in given:
            raise ValueError(f"--{key} is missing; give it, or a file that describes the sweep")
    return from_table(given, Path())


def _run(request: Sweep, out: Path, ray: str | None) -> None:
    from fewstep.eval.sweeps.processes import ProcessLost, main_process

    try:
        results = request.run(out, ray=ray)
    except ProcessLost as error:
        print(f"fewstep: {error}", file=sys.stderr)
        raise typer.Exit(options.FAILED) from error
    if main_process():
        print_results(results)
        say(f"{out / 'results.csv'}; `fewstep report {out}` makes a page of it")
    if results.failed:
        raise typer.Exit(options.FAILED)


def _estimate(request: Sweep, out: Path | None) -> None:
    from fewstep.eval.sweeps.processes import main_process

    if main_process():
        print_estimate(request.estimate(out))
