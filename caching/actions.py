"""What is done at a site at a step."""

from __future__ import annotations

from enum import IntEnum


class Action(IntEnum):
    """A decision; its number is what plan files, logs and heat maps hold."""

    COMPUTE = 0
    """Run the site's modules; their value is kept where a later step needs it."""
    REUSE = 1
    """Put what was kept, through the plan's predictor, in the place of the modules' work."""
    SKIP = 2
    """Leave the modules out, as if they were the identity (a range of blocks) or added nothing (a branch)."""
    SPARSE = 3
    """Run the site's cheaper form (merged tokens, windowed attention)."""


NAMES = ("computed", "reused", "skipped", "sparse")
"""What a heat map calls the numbers."""
