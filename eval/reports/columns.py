"""What the columns of a sweep mean: what tells its cells apart, what they cost, and which way a metric is better."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean
from typing import Any

from fewstep.errors import FewstepError
from fewstep.eval.reports.pareto import pareto_front
from fewstep.eval.statistics.directions import lower_is_better
from fewstep.eval.sweeps.results import Row

TITLES = {
    "fid": "FID",
    "fid_inf": "FID∞",
    "sfid": "sFID",
    "kid": "KID",
    "cmmd": "CMMD",
    "inception_score": "Inception score",
    "clip_score": "CLIP score",
    "accuracy": "Accuracy %",
    "psnr": "PSNR dB",
    "ssim": "SSIM",
    "lpips": "LPIPS",
    "latent_rmse": "Latent RMSE",
    "feature_distance": "Feature distance",
}
_FORMS = {"clip_score": ".2f", "accuracy": ".1f", "psnr": ".2f"}


def title(metric: str) -> str:
    """A metric's name for people."""
    return TITLES.get(metric, metric)


def lower(metric: str) -> bool | None:
    """Whether a metric is better when lower; None where nobody said, so that nothing is called best."""
    try:
        return lower_is_better(metric)
    except FewstepError:
        return None


def shown(metric: str, value: float) -> str:
    """A value of a metric with as many digits as mean something."""
    return format(value, _FORMS.get(metric, "#.3g" if 1e-3 <= abs(value) < 100 else ".4g"))


@dataclass(frozen=True)
class CostColumn:
    """A column that says what an image costs.

    Attributes:
        field: the row's field.
        title: the column's head.
        axis: the axis of a plot.
        unit: what a number in a sentence is followed by.
        scale: what the field is multiplied with to be shown.
    """

    field: str
    title: str
    axis: str
    unit: str
    scale: float = 1.0

    def of(self, *rows: Row) -> float | None:
        """The mean cost of rows in the unit shown; None where none was measured."""
        found = [float(value) for row in rows if (value := getattr(row, self.field, None)) is not None]
        return self.scale * fmean(found) if found else None


COSTS = (
    CostColumn("nfe_per_image", "NFE / image", "network evaluations per image", "network evaluations"),
    CostColumn(
        "effective_nfe_per_image", "Effective NFE / image", "effective network evaluations per image", "effective"
    ),
    CostColumn("macs_per_image", "GMACs / image", "10⁹ multiply-accumulates per image", "GMACs", 1e-9),
    CostColumn("peak_bytes", "Peak MB", "peak memory, MB", "MB", 1e-6),
    CostColumn("seconds_per_image", "s / image", "seconds per image", "s"),
)

_USUAL = {"grid": "default", "cache": "none", "quant": "none"}
"""Values that say that nothing was changed."""
FACTORS = {"grid": "Grid", "guidance": "Guidance", "cache": "Cache", "quant": "Quantisation"}
"""What else than the scheduler and its steps tells the cells of one model apart, as far as the rows have it."""
REPLICATE = "seed"
"""The field that tells repetitions of one cell apart: its first seed."""


@dataclass(frozen=True)
class Point:
    """A cell in a plot: replicates are one point at their mean, with their range as its interval."""

    series: str
    steps: int
    rows: tuple[Row, ...]
    cost: float
    value: float
    interval: tuple[float, float] | None


@dataclass(frozen=True)
class Facet:
    """The cells of one model: what its table, its plots and its pictures share.

    Attributes:
        model: its name; empty where the rows name none.
        rows: in the order of the sweep.
        metrics: the columns.
    """

    model: str
    rows: tuple[Row, ...]
    metrics: tuple[str, ...]

    @cached_property
    def varying(self) -> tuple[str, ...]:
        """The factors in which these cells differ."""
        return tuple(factor for factor in FACTORS if len({self.factor(row, factor) for row in self.rows}) > 1)

    @cached_property
    def replicated(self) -> bool:
        """Whether cells were repeated on other seeds."""
        return len({getattr(row, REPLICATE, None) for row in self.rows}) > 1

    @cached_property
    def costs(self) -> tuple[CostColumn, ...]:
        """The costs that some cell has; effective evaluations only where a cache makes them fewer than the real ones."""
        known = [cost for cost in COSTS if any(cost.of(row) is not None for row in self.rows)]
        nfe, effective = COSTS[:2]
        same = all(effective.of(row) in (None, nfe.of(row)) for row in self.rows)
        return tuple(cost for cost in known if cost is not effective or not same)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The series, in the order of first appearance."""
        return tuple(dict.fromkeys(self.series(row) for row in self.rows))

    @cached_property
    def steps(self) -> tuple[int, ...]:
        return tuple(sorted({row.steps for row in self.rows}))

    def series(self, row: Row) -> str:
        """What a row is called besides its steps: the scheduler and the factors that vary."""
        return ", ".join([row.scheduler, *self.changed(row)])

    def changed(self, row: Row) -> list[str]:
        """The varying factors of a row that say something: ``["grid karras", "guidance 2"]``."""
        own = {factor: self.factor(row, factor) for factor in self.varying}
        return [f"{factor} {value}" for factor, value in own.items() if value and value != _USUAL.get(factor)]

    def factor(self, row: Row, factor: str) -> str:
        """A factor's value for people; empty where the row has none."""
        value = getattr(row, factor, None)
        return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)

    def points(self, metric: str, cost: CostColumn) -> list[Point]:
        """Every cell that has both, replicates merged; not where PSNR of an identical image is infinite."""
        cells: dict[tuple[str, int], list[Row]] = {}
        for row in self.rows:
            value = row.value(metric)
            if value is not None and math.isfinite(value) and cost.of(row) is not None:
                cells.setdefault((self.series(row), row.steps), []).append(row)
        return [_point(series, steps, rows, metric, cost) for (series, steps), rows in cells.items()]

    def front(self, metric: str, cost: CostColumn) -> list[Point]:
        """The points that no other beats in both, by rising cost; none where it is not known what is better."""
        way = lower(metric)
        if way is None:
            return []
        points = self.points(metric, cost)
        chosen = pareto_front([p.cost for p in points], [p.value for p in points], lower_is_better=way)
        return [points[index] for index in chosen]


def facets(rows: Sequence[Row], metrics: Sequence[str]) -> list[Facet]:
    """The rows model by model, in the order of first appearance."""
    models: dict[str, list[Row]] = {}
    for row in rows:
        models.setdefault(str(getattr(row, "model", "") or ""), []).append(row)
    return [Facet(model, tuple(group), tuple(metrics)) for model, group in models.items()]


def interval(entry: Mapping[str, Any]) -> tuple[float, float] | None:
    """The interval of a row's metric, or its value plus and minus its spread, where it carries one."""
    if entry.get("interval"):
        low, high = entry["interval"]
        return float(low), float(high)
    spread = entry.get("spread")
    return None if spread is None else (entry["value"] - spread, entry["value"] + spread)


def _point(series: str, steps: int, rows: Sequence[Row], metric: str, cost: CostColumn) -> Point:
    values = [value for row in rows if (value := row.value(metric)) is not None]
    spread = (min(values), max(values)) if len(values) > 1 else interval(rows[0].metrics[metric])
    return Point(series, steps, tuple(rows), cost.of(*rows) or 0.0, fmean(values), spread)
