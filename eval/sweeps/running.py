"""Cells one after the other: drawn where images are missing, then scored; what fails is recorded and the rest goes on.

Several processes split the missing batches. Only the main one reads what is there, describes and scores: its moments are
those of the stored images in the order of their seeds, to the bit what one process alone makes of them, which moments
summed over processes would not be.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from fewstep.errors import FewstepError
from fewstep.eval.sweeps.cell import Cell, Setting
from fewstep.eval.sweeps.painting import Painter, missing
from fewstep.eval.sweeps.processes import Processes
from fewstep.eval.sweeps.results import Row
from fewstep.eval.sweeps.scoring import relative, score
from fewstep.eval.sweeps.store import CellStore


@dataclass(frozen=True)
class CellDone:
    """A cell that was reached.

    Attributes:
        row: as it stands in the results.
        resolved: its identity, and the times that the pipeline then really visited; empty where it could not be set up.
        model: its model's description, where somebody else writes the manifest.
    """

    row: Row
    resolved: dict[str, Any]
    model: dict[str, Any] = field(default_factory=dict)


class CellRunner:
    """Runs cells of one setting.

    Args:
        setting: what they share.
        painter: draws their images.
        begin: told of a cell and its folder before it is worked on, in the main process.
        processes: who draws; every one of them runs the same cells.
    """

    def __init__(
        self, setting: Setting, painter: Painter, begin: Callable[[Cell, str], None], processes: Processes
    ) -> None:
        self._setting = setting
        self._painter = painter
        self._begin = begin
        self._processes = processes

    def run(self, cell: Cell) -> CellDone:
        """Draw, measure and time a cell.

        A cell that cannot be drawn or measured (an exception, out of memory, NaN, black images, a transform that does
        not apply or stays behind) is a failed row, and what was drawn before it failed is kept. A full disk is no
        property of the cell and is raised. Every process gets the same row.

        Raises:
            OSError: where the folder cannot be written, or another process died.
        """
        processes = self._processes
        store: CellStore | None = None
        resolved: dict[str, Any] = {}
        try:
            with processes.together():
                store = self._setting.store(cell)
            self._agree(store)
            resolved = {"identity": store.identity}
            todo = processes.from_main(partial(self._begun, cell, store))
            with processes.together():
                self._painter.draw(cell, store, todo[processes.rank :: processes.count])
            scored = processes.from_main(partial(score, self._setting, cell, store))
        except OSError:
            raise
        except Exception as error:
            row = self._failed(cell, store, error)
        else:
            return CellDone(scored.row, resolved | scored.visited)
        _free()
        return CellDone(row, resolved)

    def _begun(self, cell: Cell, store: CellStore) -> list[range]:
        """Announce a cell; the batches that it lacks."""
        self._begin(cell, relative(self._setting, store))
        store.describe()
        return missing(self._setting, cell, store)

    def _agree(self, store: CellStore) -> None:
        first, *others = self._processes.gathered(store.identity)
        for rank, other in enumerate(others, 1):
            if differing := [key for key in first if first[key] != other.get(key)]:
                raise FewstepError(
                    f"process {rank} would draw other images than the main process: its {', '.join(differing)} differ; "
                    "use machines of one kind"
                )

    def _failed(self, cell: Cell, store: CellStore | None, error: Exception) -> Row:
        return Row(
            **cell.axes,
            status="failed",
            folder=relative(self._setting, store) if store is not None else "",
            error=_one_line(error),
            redone=store.redone() if store is not None else [],
        )


def _free() -> None:
    """Give memory back after a failure, which may have been the lack of it: the next cell may be smaller."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _one_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
