"""The best cell of a sweep under conditions: cheapest that is good enough, or best that is cheap enough."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from fewstep.errors import FewstepError, unknown
from fewstep.eval.statistics.directions import WORST, lower_is_better
from fewstep.eval.sweeps.results import Results, Row

COSTS = {"nfe": "nfe_per_image", "seconds": "seconds_per_image", "calls": "calls", "steps": "steps"}
_COMPARED: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt,
}  # fmt: skip
_FORM = re.compile(r"\s*([A-Za-z_][\w:.-]*)\s*(<=|>=|<|>)\s*(\S+)\s*")


@dataclass(frozen=True)
class Condition:
    """``fid<2``, ``nfe<=10``: a column of the results, and a bound on it."""

    column: str
    sign: str
    bound: float

    def met(self, row: Row) -> bool:
        value = column(row, self.column)
        return value is not None and _COMPARED[self.sign](value, self.bound)

    def __str__(self) -> str:
        return f"{self.column}{self.sign}{self.bound:g}"


def parse_condition(text: str, known: Sequence[str]) -> Condition:
    """Read a condition.

    Args:
        text: ``NAME<VALUE`` with ``<``, ``<=``, ``>`` or ``>=``.
        known: the columns that there are.

    Raises:
        FewstepError: for another form, an unknown column, or a bound that is no number.
    """
    match = _FORM.fullmatch(text)
    if match is None:
        raise FewstepError(f"cannot read the condition {text!r}; write it as NAME<VALUE, such as fid<2 or nfe<=10")
    name, sign, bound = match.groups()
    if name not in known:
        raise FewstepError(unknown(f"column in {text!r}:", name, known))
    try:
        value = float(bound)
    except ValueError:
        value = math.nan
    if math.isnan(value):
        raise FewstepError(f"the bound of the condition {text!r} is {bound!r}; give a number")
    return Condition(name, sign, value)


def column(row: Row, name: str) -> float | None:
    """A metric's value or a cost of a row."""
    if name in COSTS:
        value = getattr(row, COSTS[name])
        return None if value is None else float(value)
    return row.value(name)


@dataclass(frozen=True)
class Best:
    """What :func:`best` found.

    Attributes:
        row: the cell, blocks of seeds averaged.
        goal: what it is best in.
        met: how many cells meet all conditions.
        of: how many cells were measured.
    """

    row: Row
    goal: str
    met: int
    of: int


def best(
    results: Results, *, quality: Sequence[str] = (), budget: Sequence[str] = (), metric: str | None = None
) -> Best:
    """The cheapest cell that meets ``quality``, or without it the best cell within ``budget``.

    Cheapest is by seconds, where they are told apart, else by network evaluations. Blocks of seeds of one cell count
    as one, with their mean: the minimum would reward luck.

    Args:
        results: of a sweep.
        quality: conditions on metrics, such as ``"fid<2"`` or ``"latent_rmse_worst<0.1"``; all must hold.
        budget: conditions on costs (``nfe``, ``seconds``, ``calls``, ``steps``), such as ``"nfe<=10"``; all must hold.
        metric: what is best within a budget; the sweep's first metric where left out.

    Raises:
        FewstepError: for a condition that cannot be read, no cell that meets all of them (the message says how near
            they come), or values of one metric that were measured differently.
    """
    rows = merged(results.rows)
    if not rows:
        raise FewstepError("no cell of this sweep is finished; run it first")
    metrics = results.columns
    wanted = [parse_condition(text, metrics) for text in quality]
    allowed = [parse_condition(text, tuple(COSTS)) for text in budget]
    goal = metric if metric is not None else (metrics[0] if metrics else None)
    if goal is not None and goal not in metrics:
        raise FewstepError(unknown("metric", goal, metrics))
    if goal is None and not wanted:
        raise FewstepError("this sweep has no metric to be best in; run it with metrics")
    for name in {condition.column for condition in wanted} | ({goal} if goal and not wanted else set()):
        _one_recipe(rows, name)
    fit = [row for row in rows if all(condition.met(row) for condition in (*wanted, *allowed))]
    if not fit:
        raise FewstepError(
            f"none of {len(rows)} cells meets {_listed(wanted, allowed)}; {_nearest(rows, wanted, allowed)}"
        )
    if wanted:
        return Best(min(fit, key=_price), "cost", len(fit), len(rows))
    assert goal is not None
    measured = [row for row in fit if row.value(goal) is not None]
    if not measured:
        raise FewstepError(f"no cell within {_listed(allowed)} has a {goal}")
    sign = 1 if lower_is_better(goal.partition(":")[0]) else -1
    return Best(min(measured, key=lambda row: sign * (row.value(goal) or 0.0)), goal, len(fit), len(rows))


def merged(rows: Sequence[Row]) -> list[Row]:
    """Finished cells, the blocks of seeds of each as one row with the means of values and costs."""
    groups: dict[object, list[Row]] = {}
    for row in rows:
        if row.status == "ok":
            groups.setdefault(replace(row.cell, seed=0), []).append(row)
    return [_mean(group) if len(group) > 1 else group[0] for group in groups.values()]


def _mean(group: Sequence[Row]) -> Row:
    first = group[0]
    metrics = {
        name: {
            **entry,
            "value": fmean(float(row.metrics[name]["value"]) for row in group if name in row.metrics),
            **({"worst": _worst(group, name)} if "worst" in entry else {}),
        }
        for name, entry in first.metrics.items()
    }
    costs: dict[str, Any] = {
        field: fmean(float(value) for row in group if (value := getattr(row, field)) is not None)
        for field in ("calls", "nfe_per_image", "seconds_per_image")
        if getattr(first, field) is not None
    }
    return replace(first, metrics=metrics, samples=sum(row.samples for row in group), **costs)


def _worst(group: Sequence[Row], metric: str) -> dict[str, float]:
    """The worst image of all blocks."""
    found = [(value, seed) for row in group for seed, value in row.worst(metric).items()]
    value, seed = max(found) if lower_is_better(metric) else min(found)
    return {str(seed): value}


def _price(row: Row) -> tuple[float, float]:
    seconds = row.seconds_per_image
    return (math.inf if seconds is None else seconds, row.nfe_per_image or 0.0)


def _one_recipe(rows: Sequence[Row], metric: str) -> None:
    metric = metric.removesuffix(WORST)
    recipes = list(dict.fromkeys(row.metrics[metric]["recipe"] for row in rows if metric in row.metrics))
    if len(recipes) > 1:
        raise FewstepError(
            f"{metric} was measured in {len(recipes)} ways, {recipes[0]} and {recipes[1]}: no comparison"
        )


def _listed(*conditions: Sequence[Condition]) -> str:
    return ", ".join(str(condition) for group in conditions for condition in group) or "no condition"


def _nearest(rows: Sequence[Row], *conditions: Sequence[Condition]) -> str:
    """The value that comes nearest to each bound."""
    said = []
    for condition in (one for group in conditions for one in group):
        values = [value for row in rows if (value := column(row, condition.column)) is not None]
        if values:
            nearest = min(values) if condition.sign.startswith("<") else max(values)
            said.append(
                f"the {'lowest' if condition.sign.startswith('<') else 'highest'} {condition.column} is {nearest:.4g}"
            )
    return ", ".join(said) or "no cell has these values"
