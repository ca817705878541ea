"""The numbers of a model's card, in the file that :func:`fewstep.pipelines.models` reads."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from safetensors import safe_open

from .. import folders
from .configs import Published
from .state import State


def write(folder: Path, published: Published, state: State, measured: dict[str, float]) -> None:
    """Writes a fresh card: what was measured of earlier weights does not hold for new ones."""
    facts = {
        "kind": published.kind,
        "class": published.class_name,
        "description": published.description,
        "parameters": sum(_parameters(path) for path in folder.rglob("*model.safetensors")),
        "training": {"steps": state.step, "minutes": round(state.seconds / 60, 1)},
        "measured": measured,
    }
    _write(folder, facts)


def add(folder: Path, measured: dict[str, float]) -> None:
    """Adds measurements of the exported weights to the card."""
    facts: dict[str, Any] = json.loads((folder / folders.CARD).read_text())
    facts["measured"] |= measured
    _write(folder, facts)


def _write(folder: Path, facts: dict[str, Any]) -> None:
    (folder / folders.CARD).write_text(json.dumps(facts, indent=2) + "\n")


def _parameters(path: Path) -> int:
    with safe_open(path, "pt") as file:
        return sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118
