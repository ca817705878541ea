"""The tables of a sweep: what it found, and what it would cost."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

from fewstep.cli.printing import duration, number, say, show

if TYPE_CHECKING:
    from fewstep.eval.sweeps.estimate import SweepEstimate
    from fewstep.eval.sweeps.results import Results


def print_results(results: Results) -> None:
    """A line a cell: what it is, what it cost, and its metrics."""
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


def print_estimate(estimate: SweepEstimate) -> None:
    """A line a cell: what would be drawn, and how long it would take."""
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
