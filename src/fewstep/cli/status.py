"""``fewstep status``."""

from __future__ import annotations

import typer

from fewstep.cli import options
from fewstep.cli.printing import duration, say


def status(folder: options.Finished) -> None:
    """How far a sweep is, what failed, and how long it will take; exit code 1 where a cell failed."""
    from fewstep.eval.sweeps.state import status as state

    found = state(folder)
    done = len(found.rows) - len(found.failed)
    last = found.sessions[-1] if found.sessions else {}
    doing = "running" if found.running else "finished" if len(found.rows) == found.planned else "stopped"
    say(
        f"{doing}: {done} of {found.planned} cells done, {len(found.failed)} failed; started {last.get('started', '?')}"
    )
    if found.current is not None:
        when, title = "now" if found.running else "last", found.titles[found.current]
        say(f"{when}: {title}, {found.current_samples} of {found.samples} images")
    for name in found.damaged:
        say(f"damaged: {folder / name} is not what was written; the same command writes it anew")
    for row in found.failed:
        say(f"failed: {found.titles[row.cell]}: {row.error}")
    for row in found.rows:
        for text in row.redone:
            say(f"repaired: {found.titles[row.cell]}: {text}")
    if len(found.rows) < found.planned:
        left = duration(found.seconds_left)
        say(f"about {left} left" if found.seconds_left is not None else "time left unknown: no cell is finished yet")
    if found.failed:
        raise typer.Exit(options.FAILED)
