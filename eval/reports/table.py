"""The report's table: one line a cell, sorted by a click on a column's head."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence

from fewstep.eval.reports.columns import FACTORS, REPLICATE, CostColumn, Facet, facets, interval, lower, shown, title
from fewstep.eval.reports.columns import TITLES as TITLES
from fewstep.eval.reports.plots import Style, styles, swatch
from fewstep.eval.sweeps.results import Results, Row


def numbers_table(facet: Facet, *, plain: bool = False) -> str:
    """The table as HTML; marked are the best value of each column and the cells on the front of quality and cost.

    Args:
        facet: the cells of one model.
        plain: without what needs the report's style sheet.
    """
    drawn = {} if plain else styles(facet.names)
    common = common_notes(facet.rows)
    noted = any(_notes(row, common) for row in facet.rows)
    best = {metric: _best(facet, metric) for metric in facet.metrics}
    front = {metric: _on_front(facet, metric) for metric in facet.metrics}
    heads = [_head("Scheduler", "text"), _head("Steps"), *[_head("First seed")] * facet.replicated]
    heads += [_head(title(metric), first="descending" if lower(metric) is False else "") for metric in facet.metrics]
    heads += [_head(cost.title) for cost in facet.costs]
    heads += [_head(FACTORS[factor], "text") for factor in facet.varying]
    heads += [_head("Notes", "text")] * noted
    lines = []
    for number, row in enumerate(facet.rows):
        line = [_name(row.scheduler, facet.changed(row), drawn.get(facet.series(row))), _number(row.steps)]
        line += [_number(getattr(row, REPLICATE, None))] * facet.replicated
        line += [_value(row, metric, number in best[metric], number in front[metric]) for metric in facet.metrics]
        line += [_number(cost.of(row)) for cost in facet.costs]
        line += [f'<td class="text">{html.escape(facet.factor(row, factor))}</td>' for factor in facet.varying]
        line += [f'<td class="text">{_notes(row, common)}</td>'] * noted
        lines.append(f"<tr>{''.join(line)}</tr>")
    label = html.escape(f"Numbers of {facet.model}" if facet.model else "Numbers")
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{label}"><table class="numbers">'
        f"<thead><tr>{''.join(heads)}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def results_html(results: Results) -> str:
    """The rows of a sweep as tables without style, model by model: what a notebook shows of :class:`Results`."""
    return "".join(
        f"<p>{html.escape(facet.model)}</p>{numbers_table(facet, plain=True)}"
        for facet in facets(results.rows, results.metrics)
    )


def common_notes(rows: Sequence[Row]) -> list[str]:
    """Notes that every cell with images has; they are said once below the table instead of in each line."""
    measured = [row.notes for row in rows if row.status == "ok"]
    return [note for note in measured[0] if all(note in notes for notes in measured)] if len(measured) > 1 else []


def front_cost(facet: Facet) -> CostColumn | None:
    """The cost whose front the table marks: the first that was measured."""
    return next(iter(facet.costs), None)


def _best(facet: Facet, metric: str) -> set[int]:
    """Indices of the rows with the best value of a column, where there is something to compare."""
    values = {index: value for index, row in enumerate(facet.rows) if (value := row.value(metric)) is not None}
    way = lower(metric)
    if len(values) < 2 or way is None:
        return set()
    target = min(values.values()) if way else max(values.values())
    return {index for index, value in values.items() if value == target}


def _on_front(facet: Facet, metric: str) -> set[int]:
    """Indices of the rows whose cell is on the front of ``metric`` and cost."""
    cost = front_cost(facet)
    if cost is None:
        return set()
    chosen = {(point.series, point.steps) for point in facet.front(metric, cost)}
    return {index for index, row in enumerate(facet.rows) if (facet.series(row), row.steps) in chosen}


def _head(text: str, kind: str = "", first: str = "") -> str:
    """A column's head; ``first`` is the order of its first click where that is not ascending."""
    kind = f' class="{kind}"' if kind else ""
    first = f' data-first="{first}"' if first else ""
    return f'<th scope="col"{kind}{first}>{html.escape(text)}</th>'


def _name(scheduler: str, changed: Sequence[str], style: Style | None) -> str:
    """The row's head; on a phone a long name is broken where its words end."""
    words = re.split(r"(?<=[A-Za-z0-9])(?=[A-Z][a-z]{2})|(?<=[:(,])", scheduler)
    below = f"<small>{html.escape(', '.join(changed))}</small>" if changed else ""
    return f'<th scope="row">{swatch(style) + " " if style else ""}{"<wbr>".join(map(html.escape, words))}{below}</th>'


def _number(value: float | None) -> str:
    if value is None:
        return '<td data-v="">–</td>'
    return f'<td data-v="{value!r}">{value if isinstance(value, int) else format(value, ".3g")}</td>'


def _value(row: Row, metric: str, best: bool, front: bool) -> str:
    value = row.value(metric)
    if value is None:
        return _number(None)
    kinds = " ".join(kind for kind, marked in (("best", best), ("front", front)) if marked)
    between = interval(row.metrics[metric])
    spread = f"<small>{shown(metric, between[0])} to {shown(metric, between[1])}</small>" if between else ""
    for seed, worst in list(row.worst(metric).items())[:1]:
        spread += f"<small>worst {shown(metric, worst)}, seed {seed}</small>"
    star = '<span title="the best of the column">★</span> ' if best else ""
    kind = f' class="{kinds}"' if kinds else ""
    return f'<td{kind} data-v="{value!r}">{star}{shown(metric, value)}{spread}</td>'


def _notes(row: Row, common: Sequence[str]) -> str:
    own = [note for note in row.notes if note not in common]
    notes = [f'<span class="failed">failed: {html.escape(row.error)}</span>'] if row.error else []
    notes += [f'<span class="note">{html.escape(note)}</span>' for note in (*row.redone, *own)]
    return "<br>".join(notes)
