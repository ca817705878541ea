"""What a sweep found: one row a cell, written as CSV for tables and as JSON for programs."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from fewstep import artifact
from fewstep.errors import ArtifactError
from fewstep.eval import fingerprint
from fewstep.eval.drawing.scheduling import DEFAULT_GRID
from fewstep.eval.statistics.directions import WORST
from fewstep.eval.sweeps.cell import AXES, Cell
from fewstep.eval.sweeps.transforms import NONE

KIND = "sweep results"
JSON_NAME = "results.json"
CSV_NAME = "results.csv"
CHECKSUM = "sha256"


@dataclass(frozen=True)
class Row:
    """One cell.

    Attributes:
        scheduler: as it was asked for.
        steps: as they were asked for; ``nfe_per_image`` is what they cost.
        guidance: classifier-free guidance scale.
        status: ``ok`` or ``failed``.
        folder: the cell's folder, relative to the sweep's; empty where it could not even be set up.
        samples: images measured.
        calls: forward calls of the denoiser for one batch.
        nfe_per_image: network evaluations for one image, counted; guidance makes two of a step.
        seconds_per_image: median over the batches, whole pipeline, at the sweep's batch size.
        metrics: by name {"value", "recipe", "n"}; where the value is a mean over images that are held against a reference
            also {"median", "q05", "q95", "worst"}, the last one by seed, the worst first.
        error: what made the cell fail, one line.
        notes: warnings, black images.
        redone: damaged files that were found and made again.
        model: the model's name in the sweep; empty in results of older versions, as all that follows has its default.
        grid: name of the grid; ``default`` is the scheduler's own.
        cache: name of the cache, or ``none``.
        quant: name of the quantisation, or ``none``.
        seed: the first seed.
        effective_nfe_per_image: ``nfe_per_image`` with each evaluation weighted by the share of a full pass that was
            executed, less where a cache skipped some; None where it could not be counted, as the next.
        macs_per_image: multiply-accumulates of the denoiser for one image.
        peak_bytes: most memory over the batches: of the GPU where there is one, else of the process.
    """

    scheduler: str
    steps: int
    guidance: float
    status: str
    folder: str = ""
    samples: int = 0
    calls: float | None = None
    nfe_per_image: float | None = None
    seconds_per_image: float | None = None
    metrics: dict[str, dict[str, Any]] = field(default_factory=dict)
    error: str = ""
    notes: list[str] = field(default_factory=list)
    redone: list[str] = field(default_factory=list)
    model: str = ""
    grid: str = DEFAULT_GRID
    cache: str = NONE
    quant: str = NONE
    seed: int = 0
    effective_nfe_per_image: float | None = None
    macs_per_image: float | None = None
    peak_bytes: int | None = None

    @property
    def cell(self) -> Cell:
        """What was asked of the cell."""
        return Cell(**{axis: getattr(self, axis) for axis in AXES})

    def value(self, metric: str) -> float | None:
        """The value of a metric, or with ``_worst`` behind its name that of its worst image; None where there is none."""
        entry = self.metrics.get(metric)
        if entry is not None:
            return float(entry["value"])
        worst = self.worst(metric.removesuffix(WORST)) if metric.endswith(WORST) else {}
        return next(iter(worst.values()), None)

    def worst(self, metric: str) -> dict[int, float]:
        """Seeds of the worst images with their values, the worst first; empty where the metric is none of pairs."""
        worst = self.metrics.get(metric, {}).get("worst", {})
        return {int(seed): float(value) for seed, value in worst.items()}


@dataclass(frozen=True)
class Results:
    """The rows of a sweep so far, in the order of its cells.

    Attributes:
        metrics: the columns' names, also where every cell failed.
        planned: how many cells the sweep has; more than there are rows while it runs or after it was killed.
    """

    metrics: tuple[str, ...]
    planned: int
    rows: tuple[Row, ...]

    @property
    def failed(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.status != "ok")

    @property
    def columns(self) -> tuple[str, ...]:
        """The metrics, each that is kept with its worst image followed by ``NAME_worst``."""
        worst = {name for name in self.metrics if any(row.worst(name) for row in self.rows)}
        return tuple(column for name in self.metrics for column in (name, *[name + WORST] * (name in worst)))

    def _repr_html_(self) -> str:
        """The rows as a table, for notebooks."""
        from fewstep.eval.reports.table import results_html

        return results_html(self)

    def save(self, folder: Path) -> None:
        """Write ``results.json`` and ``results.csv``, each atomically."""
        cells = [asdict(row) for row in self.rows]
        body = {"metrics": list(self.metrics), "planned": self.planned, "cells": cells}
        artifact.write_json(folder / JSON_NAME, KIND, {**body, CHECKSUM: fingerprint.of_json(body)})
        artifact.write_bytes(folder / CSV_NAME, self.to_csv().encode())

    def to_csv(self) -> str:
        """One line a cell; lists joined by "; ", what is missing left empty."""
        plain = [f.name for f in fields(Row) if f.name not in ("metrics", "notes", "redone")]
        columns = self.columns
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow([*plain, *columns, "notes", "redone"])
        for row in self.rows:
            values = [getattr(row, name) for name in plain] + [row.value(name) for name in columns]
            writer.writerow(["" if v is None else v for v in values] + ["; ".join(row.notes), "; ".join(row.redone)])
        return text.getvalue()

    @classmethod
    def load(cls, folder: str | Path) -> Results:
        """Read ``results.json`` of a sweep's folder.

        Raises:
            ArtifactError: where there is none, or it is damaged or of another version.
        """
        path = Path(folder) / JSON_NAME
        if not path.exists():
            raise ArtifactError(f"{folder} holds no {JSON_NAME}; give the --out folder of a sweep")
        body = artifact.read_json(path, KIND, ("metrics", "planned", "cells"), optional=(CHECKSUM,))
        try:
            if not checked(body):
                raise ValueError("its checksum does not match")
            if not isinstance(body["metrics"], list) or not all(isinstance(name, str) for name in body["metrics"]):
                raise TypeError(f"metrics is {body['metrics']!r}")
            return cls(tuple(body["metrics"]), int(body["planned"]), tuple(_row(cell) for cell in body["cells"]))
        except (TypeError, ValueError, OverflowError) as error:
            raise ArtifactError(f"{path} is damaged ({error}); run the sweep again to have it written anew") from error


def damaged(folder: Path) -> tuple[str, ...]:
    """Which of the results' files are there and are not what was written. Not for a folder that is being written to."""
    try:
        results = Results.load(folder)
    except ArtifactError:
        return (JSON_NAME,) if (folder / JSON_NAME).exists() else ()
    table = folder / CSV_NAME
    return (CSV_NAME,) if table.exists() and table.read_bytes() != results.to_csv().encode() else ()


def checked(body: dict[str, Any]) -> bool:
    """Whether a file's body has the checksum it says, which is taken out; files of older versions say none."""
    said = body.pop(CHECKSUM, None)
    try:
        return said is None or said == fingerprint.of_json(body)
    except (
        ValueError,
        RecursionError,
    ):  # NaN, which Python's reader takes and no writer of ours makes; no depth either
        return False


def _row(cell: Any) -> Row:
    """Raises TypeError for what is no row: a file without a checksum may hold anything."""
    row = Row(**cell)
    for one in fields(Row):
        value = getattr(row, one.name)
        kinds = _KINDS[str(one.type).partition("[")[0]]
        if isinstance(value, bool) or not isinstance(value, kinds):
            raise TypeError(f"{one.name} is {value!r}")
    if not all(isinstance(text, str) for text in (*row.notes, *row.redone)):
        raise TypeError(f"notes are {row.notes!r}, redone is {row.redone!r}")
    for name, entry in row.metrics.items():
        if not isinstance(entry, dict) or not isinstance(entry.get("value"), int | float | str):
            raise TypeError(f"metric {name} is {entry!r}")
        float(entry["value"])  # "inf" and "nan" are texts, since JSON has no number for them
        if not isinstance(entry.get("worst", {}), dict):
            raise TypeError(f"the worst of metric {name} are {entry['worst']!r}")
        row.worst(name)
    return row


_KINDS: dict[str, Any] = {
    "str": str,
    "int": int,
    "float": int | float,
    "float | None": int | float | None,
    "int | None": int | None,
    "dict": dict,
    "list": list,
}


def totals(rows: Sequence[Row]) -> str:
    """``11 cells, 1 failed`` for people."""
    failed = sum(row.status != "ok" for row in rows)
    return f"{len(rows)} cell{'s' if len(rows) != 1 else ''}, {failed} failed"
