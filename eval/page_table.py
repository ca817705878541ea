"""The report's table: one line a cell."""

from __future__ import annotations

import html

from fewstep.eval.plots import styles, swatch
from fewstep.eval.results import Results, Row

TITLES = {"fid": "FID", "clip_score": "CLIP score", "accuracy": "Accuracy %"}
LOWER_IS_BETTER = {"fid"}
_FORMS = {"clip_score": ".2f", "accuracy": ".1f"}


def numbers_table(results: Results) -> str:
    """The table as HTML; the best value of each metric among the cells of equal steps is marked."""
    shown = [TITLES.get(metric, metric) for metric in results.metrics]
    heads = ["Steps", "Calls", "NFE / image", *shown, "s / image", "Notes"]
    head = "".join(f"<th{' class=text' if title == 'Notes' else ''}>{html.escape(title)}</th>" for title in heads)
    best = _best(results)
    drawn = styles([row.scheduler for row in results.rows])
    common = common_notes(results)
    lines, before = [], ""
    for row in results.rows:
        if row.scheduler != before:
            name = f"{swatch(drawn[row.scheduler])} {html.escape(row.scheduler)}"
            lines.append(f'<tr class="group"><th colspan="{len(heads)}">{name}</th></tr>')
        lines.append(f"<tr>{_line(row, results.metrics, best, common)}</tr>")
        before = row.scheduler
    return (
        f'<div class="scroll"><table class="numbers"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _best(results: Results) -> set[tuple[str, int, str]]:
    """(scheduler, steps, metric) of the values to mark, where there is something to compare."""
    best: set[tuple[str, int, str]] = set()
    for metric in results.metrics:
        for steps in {row.steps for row in results.rows}:
            values = {
                row.scheduler: value
                for row in results.rows
                if row.steps == steps and (value := row.value(metric)) is not None
            }
            if len(values) > 1:
                choose = min if metric in LOWER_IS_BETTER else max
                target = choose(values.values())
                best |= {(name, steps, metric) for name, value in values.items() if value == target}
    return best


def common_notes(results: Results) -> list[str]:
    """Notes that every cell with images has; they are said once below the table instead of in each line."""
    measured = [row.notes for row in results.rows if row.status == "ok"]
    return [note for note in measured[0] if all(note in notes for notes in measured)] if len(measured) > 1 else []


def _line(row: Row, metrics: tuple[str, ...], best: set[tuple[str, int, str]], common: list[str]) -> str:
    cells = [f"<td>{row.steps}</td>", _number(row.calls, "g"), _number(row.nfe_per_image, "g")]
    for metric in metrics:
        mark = ' class="best"' if (row.scheduler, row.steps, metric) in best else ""
        cells.append(_number(row.value(metric), _FORMS.get(metric, ".4g"), mark))
    cells.append(_number(row.seconds_per_image, ".3g"))
    cells.append(f'<td class="text">{_notes(row, common)}</td>')
    return "".join(cells)


def _number(value: float | None, form: str, attributes: str = "") -> str:
    return f"<td{attributes}>{'–' if value is None else format(value, form)}</td>"


def _notes(row: Row, common: list[str]) -> str:
    own = [note for note in row.notes if note not in common]
    notes = [f'<span class="failed">failed: {html.escape(row.error)}</span>'] if row.error else []
    notes += [f'<span class="note">{html.escape(note)}</span>' for note in (*row.redone, *own)]
    return "<br>".join(notes)
