"""One self-contained page about a sweep: what was run, the numbers, the plots, and pictures to see the difference."""

from __future__ import annotations

import html
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep import artifact
from fewstep.errors import ArtifactError
from fewstep.eval import manifest as manifests
from fewstep.eval.contact import data_uri, sheet, small
from fewstep.eval.page_style import CSS
from fewstep.eval.page_table import TITLES, common_notes, numbers_table
from fewstep.eval.plots import quality_plot, styles, swatch
from fewstep.eval.results import Results, Row, totals
from fewstep.eval.store import opened, stored_seeds

NAME = "report.html"
SHOWN = 8  # seeds a cell in the picture grid


def report(out: str | Path) -> Path:
    """Write ``report.html`` into a sweep's folder: one file that asks nothing of the network, light or dark.

    Args:
        out: the folder that :meth:`~fewstep.eval.Sweep.run` wrote; also while it runs, or after it was killed.

    Returns:
        The page's path.

    Raises:
        ArtifactError: where the folder holds no results of this version.
        OSError: where the page cannot be written.
    """
    out = Path(out)
    results = Results.load(out)
    manifest = manifests.load(out)
    sections = (_head(results, manifest), _numbers(results), _plots(results), _pictures(out, results, manifest))
    text = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(_title(manifest))}</title><style>{CSS}</style></head><body>\n"
        + "\n".join(section for section in sections if section)
        + _manifest(manifest)
        + "\n</body></html>\n"
    )
    artifact.write_bytes(out / NAME, text.encode())
    return out / NAME


def _title(manifest: dict[str, Any]) -> str:
    return f"{manifest.get('sweep', {}).get('model', 'A sweep')}: quality against cost"


def _head(results: Results, manifest: dict[str, Any]) -> str:
    sweep = manifest.get("sweep", {})
    last = (manifest.get("sessions") or [{}])[-1]
    where = last.get("environment", {})
    schedulers = len({row.scheduler for row in results.rows})
    steps = sorted({row.steps for row in results.rows})
    listed = ", ".join(str(s) for s in steps)
    sentence = (
        f"{schedulers} scheduler{'s' if schedulers != 1 else ''} at {listed} steps, {sweep.get('samples', '?')} images "
        f"each of the same seeds and prompts, guidance {sweep.get('guidance', '?')}, batches of "
        f"{sweep.get('batch_size', '?')}: {totals(results.rows)}."
    )
    libraries = where.get("libraries", {})
    machine = (
        f"fewstep {where.get('fewstep', '?')}, torch {libraries.get('torch', '?')}, diffusers "
        f"{libraries.get('diffusers', '?')}, on {', '.join(where.get('devices', ['?']))} with "
        f"{where.get('threads', '?')} threads; {_time(last.get('started'))} to {_time(last.get('ended'))} UTC "
        f"({last.get('status', 'unknown')})."
    )
    missing = results.planned - len(results.rows)
    unfinished = (
        f'<p class="note">{missing} of {results.planned} cells are not done yet; the same command goes on.</p>'
        if missing > 0
        else ""
    )
    return (
        f"<h1>{html.escape(_title(manifest))}</h1><p>{html.escape(sentence)}</p>{unfinished}"
        f'<p class="dim">{html.escape(machine)}</p>'
    )


def _time(stamp: str | None) -> str:
    """``2026-11-22T02:34:38+00:00`` for people; the manifest's times are UTC."""
    return stamp[:19].replace("T", " ") if stamp else "?"


def _numbers(results: Results) -> str:
    recipes = dict.fromkeys(entry["recipe"] for row in results.rows for entry in row.metrics.values())
    notes = "".join(f'<p class="note">All cells: {html.escape(note)}.</p>' for note in common_notes(results))
    said = "".join(f"<br><code>{html.escape(recipe)}</code>" for recipe in recipes)
    return (
        f"<h2>Numbers</h2>{numbers_table(results)}{notes}"
        '<p class="dim">Shaded: the best at that number of steps. NFE: evaluations of the network for one image, '
        "counted while it ran; classifier-free guidance makes two of a call. Seconds: median over the batches, whole "
        f"pipeline, after a warm-up. Values are comparable only under the same recipe:{said}</p>"
    )


def _plots(results: Results) -> str:
    drawn = [quality_plot(results.rows, metric, TITLES.get(metric, metric)) for metric in results.metrics]
    plots = "".join(f"<div>{svg}</div>" for svg in drawn if svg)
    if not plots:
        return ""
    entries = "".join(
        f"<span>{swatch(style)}{html.escape(name)}</span>"
        for name, style in styles([row.scheduler for row in results.rows]).items()
    )
    return (
        f'<h2>Quality against cost</h2><div class="legend">{entries}</div><div class="plots">{plots}</div>'
        '<p class="dim">Solid: fewstep. Dashed: diffusers.</p>'
    )


def _pictures(out: Path, results: Results, manifest: dict[str, Any]) -> str:
    steps = sorted({row.steps for row in results.rows})
    names = list(dict.fromkeys(row.scheduler for row in results.rows))
    rows = {(row.scheduler, row.steps): row for row in results.rows}
    first = int(manifest.get("sweep", {}).get("seeds", [0])[0])
    zoom = 3 if len(steps) <= 2 else 2  # as large as the page's width allows
    head = "".join(f"<th>{count} steps</th>" for count in steps)
    body = "".join(
        f'<tr class="name"><th colspan="{len(steps)}">{html.escape(name)}</th></tr><tr>'
        + "".join(f"<td>{_picture(out, rows.get((name, count)), first, zoom)}</td>" for count in steps)
        + "</tr>"
        for name in names
    )
    prompts = manifest.get("sweep", {}).get("first_prompts", [])[:SHOWN]
    listed = "".join(f"<li>{html.escape(prompt)}</li>" for prompt in prompts)
    return (
        f"<h2>The same seeds everywhere</h2><p>Each block shows the seeds {first} to {first + SHOWN - 1}, row by row. "
        "Only scheduler and steps differ between blocks.</p>"
        f'<ol class="prompts" start="{first}">{listed}</ol>'
        f'<div class="scroll"><table class="grid"><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _picture(out: Path, row: Row | None, first: int, zoom: int) -> str:
    """One cell's first seeds; images of up to 48 pixels are shown ``zoom`` times as large, pixel by pixel."""
    if row is None:
        return '<span class="dim">not done</span>'
    images = _first_images(out / row.folder, first) if row.folder else None
    if images is None:
        return f'<span class="failed">{html.escape(row.error or "no images")}</span>'
    picture = sheet(small(images))
    scale = zoom if max(images.shape[2:]) <= 48 else 1
    label = html.escape(f"{row.scheduler}, {row.steps} steps", quote=True)
    return f'<img alt="{label}" width="{picture.width * scale}" src="{data_uri(picture)}">'


def _first_images(folder: Path, first: int) -> Tensor | None:
    """The cell's images of the first seeds; None where there are none that are whole."""
    found = list(_chunks(folder, first))
    return torch.cat(found)[:SHOWN] if found else None


def _chunks(folder: Path, first: int) -> Iterator[Tensor]:
    try:
        store = opened(folder)
    except ArtifactError:
        return
    wanted = first
    for start, last in stored_seeds(folder):
        if wanted >= first + SHOWN:
            return
        chunk = store.peek(start, last) if start == wanted else None
        if chunk is not None:
            yield chunk.images
            wanted = last + 1


def _manifest(manifest: dict[str, Any]) -> str:
    text = html.escape(_folded(manifest))
    return f"<details><summary>Manifest</summary><pre>{text}</pre></details>"


def _folded(manifest: dict[str, Any]) -> str:
    """Indented JSON with lists of numbers on one line: a grid of 50 times is one thing, not 50 lines."""
    placeholders: dict[str, str] = {}

    def fold(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: fold(item) for key, item in value.items()}
        if isinstance(value, list) and not any(isinstance(item, dict | list) for item in value):
            mark = f"\x00{len(placeholders)}\x00"
            placeholders[json.dumps(mark)] = json.dumps(value)
            return mark
        return [fold(item) for item in value] if isinstance(value, list) else value

    text = json.dumps(fold(manifest), indent=2)
    for mark, line in placeholders.items():
        text = text.replace(mark, line)
    return text
