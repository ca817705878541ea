"""How the commands print: numbers, durations, tables and lines."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.table import Table


def number(value: float | None) -> str:
    """Four digits, or a dash for what is not known."""
    return "–" if value is None else f"{value:.4g}"


def duration(seconds: float | None) -> str:
    """``2 h 5 min``, ``3 min 20 s``, ``12 s``; a dash for what is not known."""
    if seconds is None:
        return "–"
    if seconds < 10:
        return f"{seconds:.2g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def show(table: Table) -> None:
    """Print a table. A log has no width to keep to; rich would fold the names at 80 columns there."""
    Console(width=None if sys.stdout.isatty() else 160).print(table, markup=False)


def say(text: str) -> None:
    """Print a line as it is, whatever its length."""
    Console(soft_wrap=True).print(text, highlight=False, markup=False)
