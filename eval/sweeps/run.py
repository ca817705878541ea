"""A sweep at work: model by model, cell by cell, or cell by cell on a cluster; the account is kept by the main process."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewstep.errors import FewstepError
from fewstep.eval import fingerprint
from fewstep.eval.drawing.batch import SEEDING
from fewstep.eval.drawing.calling import call_defaults
from fewstep.eval.drawing.scheduling import scheduler_for, with_grid
from fewstep.eval.metrics import Metric, make_metrics
from fewstep.eval.sweeps.account import SHOWN, Account
from fewstep.eval.sweeps.cell import Cell, Setting
from fewstep.eval.sweeps.cluster import connected, run_on
from fewstep.eval.sweeps.identity import device_name, jsonable, model_identity, versions
from fewstep.eval.sweeps.lock import only_writer, remove_leftovers
from fewstep.eval.sweeps.painting import Painter
from fewstep.eval.sweeps.processes import Processes, joined, launched
from fewstep.eval.sweeps.progress import SweepProgress
from fewstep.eval.sweeps.results import Results, Row
from fewstep.eval.sweeps.running import CellDone, CellRunner
from fewstep.eval.sweeps.sources import TEXT_METRICS, Source
from fewstep.eval.sweeps.tracking import check_trackers

if TYPE_CHECKING:
    from fewstep.eval.sweeps.sweep import Sweep


def run(sweep: Sweep, out: Path, *, progress: bool, command: Sequence[str] | None, ray: str | None) -> Results:
    """See :meth:`fewstep.eval.Sweep.run`."""
    check_schedulers(sweep)
    check_trackers(sweep.trackers)
    if ray is not None and launched():
        raise FewstepError("the sweep is shared by launched processes already; leave out ray, or the launcher")
    cells = sweep.cells
    with joined() as processes, ExitStack() as held:
        work = sum(cell.work(sweep.samples_drawn) for cell in cells)
        bar = SweepProgress(work, progress and processes.main, processes.count)
        metrics: tuple[Metric, ...] = ()
        columns: tuple[str, ...] = ()
        account: Account | None = None
        cluster: Any = None
        with processes.together():  # the others begin when the main process holds the folder
            if processes.main:
                metrics, columns = _measured(sweep)
                cluster = held.enter_context(connected(ray)) if ray is not None else None
                held.enter_context(only_writer(out))
                remove_leftovers(out)
                account = Account(sweep, out, columns, bar, sys.argv if command is None else command)
                held.enter_context(account.kept())
        columns = processes.gathered(columns)[0]
        if ray is not None and account is not None:
            rows = _on_cluster(cluster, sweep, out, cells, account)
            remove_leftovers(out)  # of workers that died
        else:
            rows = _here(sweep, out, cells, metrics, bar, processes, account)
        return Results(columns, len(cells), tuple(rows[cell] for cell in cells))


def _measured(sweep: Sweep) -> tuple[tuple[Metric, ...], tuple[str, ...]]:
    """The metrics, and all columns: theirs, and those of a reference."""
    metrics = make_metrics(metric_names(sweep))
    of_pairs = sweep.arm.stream().columns if sweep.arm else ()
    return metrics, (*(metric.name for metric in metrics), *of_pairs)


def _here(
    sweep: Sweep, out: Path, cells: Sequence[Cell], metrics: tuple[Metric, ...], bar: SweepProgress,
    processes: Processes, account: Account | None,
) -> dict[Cell, Row]:  # fmt: skip
    """Model by model, in every process of a launch."""
    rows: dict[Cell, Row] = {}
    begin = account.begin if account else _nobody
    for source in sweep.sources:
        own = [cell for cell in cells if cell.model == source.name]
        if not own:
            continue
        with processes.together():
            runner, description = _runner(sweep, source, metrics, out, bar, begin, processes)
            if account:
                account.model(description)
        for cell in own:
            done = runner.run(cell)
            rows[cell] = done.row
            with processes.together():
                if account:
                    account.finished(done.row, done.resolved)
    return rows


def _on_cluster(ray: Any, sweep: Sweep, out: Path, cells: Sequence[Cell], account: Account) -> dict[Cell, Row]:
    """References first: what is held against them is measured where it is drawn."""
    references = [] if sweep.arm is None else [cell for cell in cells if sweep.arm.of(cell) == cell]
    rows: dict[Cell, Row] = {}
    models: set[str] = set()

    def done(found: CellDone) -> None:
        rows[found.row.cell] = found.row
        if found.model and found.row.model not in models:
            models.add(found.row.model)
            account.model(found.model)
        account.finished(found.row, found.resolved)

    run_on(ray, sweep, out, [references, [cell for cell in cells if cell not in references]], done)
    return rows


def worker(sweep: Sweep, out: Path, model: str) -> Callable[[Cell], CellDone]:
    """What runs single cells of a model in a process that keeps no account."""
    (source,) = (source for source in sweep.sources if source.name == model)
    bar = SweepProgress(0, show=False)
    runner, description = _runner(sweep, source, _measured(sweep)[0], out, bar, _nobody, Processes())

    def run_cell(cell: Cell) -> CellDone:
        done = runner.run(cell)
        return CellDone(done.row, done.resolved, description)

    return run_cell


def _runner(
    sweep: Sweep, source: Source, metrics: Iterable[Metric], out: Path, bar: SweepProgress,
    begin: Callable[[Cell, str], None], processes: Processes,
) -> tuple[CellRunner, dict[str, Any]]:  # fmt: skip
    """The model loaded, with its description for the manifest."""
    pipe = source.load(sweep.device)
    components = model_identity(pipe)
    setting = setting_for(sweep, source, pipe, components, metrics, out)
    reload = None if source.pipe is not None else partial(source.load, sweep.device)
    description = {
        "name": source.name,
        "pipeline": type(pipe).__name__,
        "components": components,
        "call": setting.call,
        "first_prompts": setting.prompts_of(sweep.seeds[:SHOWN]),
    }
    return CellRunner(setting, Painter(pipe, setting, bar, reload), begin, processes), description


def _nobody(cell: Cell, folder: str) -> None:
    """Told of cells where no account is kept."""


def check_schedulers(sweep: Sweep) -> None:
    """Make every scheduler once, so that a slip is told before a model is loaded or a file written.

    Raises:
        FewstepError: for an option or a value that the scheduler's class refuses.
    """
    configs = {source.name: source.scheduler_config for source in sweep.sources}
    for model, scheduler, grid in dict.fromkeys((cell.model, cell.scheduler, cell.grid) for cell in sweep.cells):
        scheduler_for(with_grid(scheduler, grid), configs[model])


def setting_for(
    sweep: Sweep, source: Source, pipe: Any, components: dict[str, Any], metrics: Iterable[Metric], out: Path
) -> Setting:
    """What the cells of one model share, its pipeline being loaded and its components hashed."""
    prompts = source.prompts(sweep.prompts)
    call = call_defaults(pipe) | dict(sweep.call)
    skipped = TEXT_METRICS if source.family == "unconditional" else ()
    metrics = tuple(metrics)
    common = {
        "pipeline": type(pipe).__name__,
        "model": fingerprint.of_json(components),
        "prompts": fingerprint.of_json(prompts),
        "labels": fingerprint.of_json(jsonable(getattr(pipe, "labels", None))),
        "call": call,
        "batch_size": sweep.batch_size,
        "seeding": SEEDING,
        "device": device_name(pipe.device),
        "versions": versions(),
    }
    return Setting(
        base_config=pipe.scheduler.config,
        prompts=prompts,
        samples=sweep.samples_drawn,
        batch_size=sweep.batch_size,
        call=call,
        common=common,
        metrics=tuple(metric for metric in metrics if metric.name not in skipped),
        notes=tuple(
            f"no {metric.name}: {source.name} draws without prompts" for metric in metrics if metric.name in skipped
        ),
        transforms=sweep.transforms,
        arm=sweep.arm,
        out=out,
    )


def metric_names(sweep: Sweep) -> list[str | Metric]:
    """What is to be measured: what was asked for, or what fits some model of the sweep."""
    if sweep.metrics is not None:
        return list(sweep.metrics)
    return list(dict.fromkeys(name for source in sweep.sources for name in source.metrics))
