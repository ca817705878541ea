"""``fewstep compare``."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from fewstep.cli.printing import number, say

WIDEST = 60


def compare(
    a: Annotated[Path, typer.Argument(metavar="A", help="Folder of a sweep, or of one of its cells (DIR/cells/NAME).")],
    b: Annotated[Path, typer.Argument(metavar="B", help="The other one.")],
) -> None:
    """Which settings changed from A to B, and whether each metric moved by more than chance."""
    from fewstep.eval.sweeps.differences import compare_sweeps

    for pair in compare_sweeps(a, b):
        say(f"{pair.title}:")
        for key, (before, after) in pair.changed.items():
            say(f"  {key}: {_short(before)} -> {_short(after)}")
        if not pair.changed:
            say("  the same settings")
        for name, (before, after) in pair.costs.items():
            say(f"  {name} {number(before)} -> {number(after)}")
        for metric in pair.metrics:
            say(f"  {metric}")


def _short(value: Any) -> str:
    """JSON, cut: neither a hash nor a grid of 50 times is what the eye looks for."""
    if isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value):
        return f"sha256:{value[:12]}"
    text = "absent" if value is None else json.dumps(value)
    return text if len(text) <= WIDEST else f"{text[: WIDEST - 1]}…"
