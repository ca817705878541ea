"""How far a sweep is: read from its folder, while it runs or after it was killed."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewstep.errors import ArtifactError
from fewstep.eval.sweeps import manifest as manifests
from fewstep.eval.sweeps.cell import Cell, titles
from fewstep.eval.sweeps.lock import in_use
from fewstep.eval.sweeps.results import Results, Row, damaged
from fewstep.eval.sweeps.store import stored_seeds


@dataclass(frozen=True)
class Status:
    """A sweep's state.

    Attributes:
        running: whether a process holds the folder now.
        planned: how many cells there are to be.
        titles: what to call each of them.
        rows: the finished and failed ones.
        failed: those of them that failed.
        current: the cell that is, or was last, worked on; None where none was.
        current_samples: how many of its images are there.
        samples: images a cell.
        seconds_left: expected, for one process; None as long as no cell is finished, 0 where nothing is left.
        sessions: the manifest's accounts of the runs so far.
        damaged: files of results that are not what was written; the next run writes them anew.
    """

    running: bool
    planned: int
    titles: Mapping[Cell, str]
    rows: tuple[Row, ...]
    failed: tuple[Row, ...]
    current: Cell | None
    current_samples: int
    samples: int
    seconds_left: float | None
    sessions: tuple[Mapping[str, Any], ...]
    damaged: tuple[str, ...]


def status(out: str | Path) -> Status:
    """The state of the sweep in a folder.

    The time left is that of the missing images, at the seconds per unit of work (see :meth:`Cell.work`) of the finished
    cells that are most like them: the same model, cache and quantisation, or where there is none of these, of all.

    Raises:
        ArtifactError: where the folder holds no sweep.
    """
    out = Path(out)
    manifest = manifests.load(out)
    if not manifest:
        raise ArtifactError(f"{out} holds no {manifests.NAME}; give the --out folder of a sweep")
    try:
        return _status(out, manifest)
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError, RecursionError, OSError) as error:
        raise ArtifactError(f"{out / manifests.NAME} is damaged ({error}); run the sweep again") from error


def _status(out: Path, manifest: Mapping[str, Any]) -> Status:
    """What a manifest without a checksum holds instead of what it should shows as one of many errors."""
    try:
        rows = Results.load(out).rows
    except ArtifactError:  # killed in its first cell, or damaged
        rows = ()
    request, sessions = manifest["sweep"], tuple(manifest["sessions"])
    samples = int(request.get("samples", 0))
    plan = [Cell(**axes) for axes in request.get("cells", [])]
    done = {row.cell for row in rows}
    noted = sessions[-1].get("cell") if sessions else None
    current = Cell(**{axis: value for axis, value in noted.items() if axis != "folder"}) if noted else None
    drawn = _drawn(out / noted["folder"], range(noted["seed"], noted["seed"] + samples)) if noted else 0
    left = [(cell, samples - (drawn if cell == current else 0)) for cell in plan if cell not in done]
    running = in_use(out)
    return Status(
        running=running,
        planned=len(plan) or len(rows),
        titles=titles({*plan, *done, *([current] if current else [])}),
        rows=rows,
        failed=tuple(row for row in rows if row.status != "ok"),
        current=current if current not in done else None,
        current_samples=drawn,
        samples=samples,
        seconds_left=_seconds(left, [row for row in rows if row.status == "ok"]),
        sessions=sessions,
        damaged=() if running else damaged(out),
    )


def _drawn(folder: Path, seeds: range) -> int:
    """How many of ``seeds`` have an image in a cell's folder."""
    there = {seed for first, last in stored_seeds(folder) for seed in range(first, last + 1)}
    return sum(seed in there for seed in seeds)


def _seconds(left: Sequence[tuple[Cell, int]], rows: Sequence[Row]) -> float | None:
    if not left:
        return 0.0
    paces = [(row.cell, row.seconds_per_image / row.cell.work(1)) for row in rows if row.seconds_per_image]
    if not paces:
        return None
    total = 0.0
    for cell, samples in left:
        alike = [pace for other, pace in paces if _kind(other) == _kind(cell)]
        total += statistics.median(alike or [pace for _, pace in paces]) * cell.work(samples)
    return total


def _kind(cell: Cell) -> tuple[str, str, str]:
    return cell.model, cell.cache, cell.quant
