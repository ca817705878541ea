"""The account of a running sweep, kept by the main process: manifest, results, progress, trackers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewstep.eval.sweeps.cell import Cell, titles
from fewstep.eval.sweeps.manifest import Manifest
from fewstep.eval.sweeps.progress import SweepProgress
from fewstep.eval.sweeps.results import Results, Row
from fewstep.eval.sweeps.tracking import Trackers

if TYPE_CHECKING:
    from fewstep.eval.sweeps.sweep import Sweep

SHOWN = 16  # prompts in the manifest; enough for the report's pictures


class Account:
    """Told of what happens, it writes each time what a reader is to find should the process die the moment after.

    Args:
        sweep: the request.
        out: its folder.
        columns: of the results.
        bar: for people.
        command: what stands in the manifest as the command line.
    """

    def __init__(
        self, sweep: Sweep, out: Path, columns: tuple[str, ...], bar: SweepProgress, command: Sequence[str]
    ) -> None:
        self._cells, self._samples = sweep.cells, sweep.samples_drawn
        self._titles = titles(self._cells)
        self._out, self._columns, self._bar = out, columns, bar
        self._rows: dict[Cell, Row] = {}
        self._manifest = Manifest(out, request(sweep), command)
        self._trackers = Trackers(sweep.trackers, out, request(sweep))

    @contextmanager
    def kept(self) -> Iterator[Account]:
        """While the block runs; at its end the manifest says how it ended."""
        self._manifest.save()
        try:
            with self._bar, self._trackers:
                yield self
        except BaseException:
            self._manifest.end("interrupted")
            raise
        failed = sum(row.status != "ok" for row in self._rows.values())
        self._manifest.end(f"finished, {failed} cells failed" if failed else "finished")

    def model(self, description: dict[str, Any]) -> None:
        """A model was loaded and is known to the bit."""
        self._manifest.model(description)

    def begin(self, cell: Cell, folder: str) -> None:
        """A cell is being worked on."""
        self._bar.cell(self._titles[cell])
        self._manifest.begin({**cell.axes, "folder": folder})

    def finished(self, row: Row, resolved: dict[str, Any]) -> None:
        """A cell is done, or has failed."""
        self._rows[row.cell] = row
        rows = tuple(self._rows[cell] for cell in self._cells if cell in self._rows)
        Results(self._columns, len(self._cells), rows).save(self._out)
        self._manifest.cell({**row.cell.axes, "folder": row.folder, "status": row.status, **resolved})
        self._trackers.log(row, len(self._rows) - 1)
        self._bar.finished(row, self._titles[row.cell])
        self._bar.remaining(sum(cell.work(self._samples) for cell in self._cells if cell not in self._rows))


def request(sweep: Sweep) -> dict[str, Any]:
    """The request as JSON; ``models`` is added to as they are loaded."""
    axes = sweep.axes
    scales = axes["guidance"]
    first = sweep.sources[0].prompts(sweep.prompts)
    return {
        "model": ", ".join(axes["model"]),
        "schedulers": list(axes["scheduler"]),
        "grids": list(axes["grid"]),
        "steps": list(axes["steps"]),
        "guidance": scales[0] if len(scales) == 1 else list(scales),
        "caches": list(axes["cache"]),
        "quants": list(axes["quant"]),
        "exclude": [dict(rule) for rule in sweep.exclude],
        "seeds": [sweep.seeds[0], sweep.seeds[-1]],
        "blocks": list(axes["seed"]),
        "samples": sweep.samples_drawn,
        "batch_size": sweep.batch_size,
        "fidelity": None if sweep.arm is None else sweep.arm.described(),
        "call": dict(sweep.call),
        "first_prompts": [first[seed % len(first)] for seed in sweep.seeds[:SHOWN]],
        "cells": [cell.axes for cell in sweep.cells],
    }
