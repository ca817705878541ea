"""One cell of a sweep: its images drawn where they are missing, its scores, its cost."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from fewstep.eval import fingerprint
from fewstep.eval.costs import CallCounter, Timer
from fewstep.eval.drawing import black, draw
from fewstep.eval.identity import VISITED, scheduler_identity, visited
from fewstep.eval.metrics import Metric, measure
from fewstep.eval.progress import SweepProgress
from fewstep.eval.results import Row
from fewstep.eval.scheduling import scheduler_for
from fewstep.eval.store import CellStore, Chunk

CELLS = "cells"


@dataclass(frozen=True)
class Cell:
    """What is asked of one cell."""

    scheduler: str
    steps: int

    @property
    def slug(self) -> str:
        """A folder name that people recognise; the key behind it is what makes it unique."""
        return f"{re.sub(r'[^A-Za-z0-9]+', '-', self.scheduler).strip('-')[:60]}-{self.steps}"


@dataclass(frozen=True)
class Setting:
    """What all cells of a sweep share.

    Attributes:
        pipe: a diffusers text-to-image pipeline; its scheduler is replaced by each cell.
        base_config: the configuration of the scheduler it came with, from which the cells' schedulers are made.
        prompts: seed i has the prompt ``prompts[i % len(prompts)]``.
        seeds: the samples of each cell.
        batch_size: images drawn at once.
        guidance: classifier-free guidance scale.
        call: further arguments of the pipeline, JSON values.
        common: the part of the cells' identities that is the same for all.
        metrics: the columns.
        out: the sweep's folder.
    """

    pipe: Any
    base_config: Any
    prompts: tuple[str, ...]
    seeds: range
    batch_size: int
    guidance: float
    call: Mapping[str, Any]
    common: Mapping[str, Any]
    metrics: tuple[Metric, ...]
    out: Path

    def batches(self) -> Iterator[range]:
        """The seeds of each batch, in order; the last may be smaller."""
        for first in range(self.seeds.start, self.seeds.stop, self.batch_size):
            yield range(first, min(first + self.batch_size, self.seeds.stop))

    def prompts_of(self, seeds: Sequence[int]) -> list[str]:
        return [self.prompts[seed % len(self.prompts)] for seed in seeds]


class CellRunner:
    """Runs cells of one setting, one after the other.

    Attributes:
        resolved: of each cell that was reached its identity, and the times that the pipeline then really visited.
    """

    def __init__(self, setting: Setting, progress: SweepProgress) -> None:
        self._setting = setting
        self._progress = progress
        self._warm = False
        self.resolved: dict[Cell, dict[str, Any]] = {}

    def run(self, cell: Cell) -> Row:
        """Draw, measure and time a cell.

        A cell that cannot be drawn or measured (an exception, out of memory, NaN, black images) is a failed row, and
        what was drawn before it failed is kept. A full disk is no property of the cell and is raised.

        Raises:
            OSError: where the folder cannot be written.
        """
        store: CellStore | None = None
        self._progress.cell(f"{cell.scheduler} {cell.steps}")
        try:
            identity = {
                **self._setting.common,
                "scheduler": scheduler_identity(self._scheduler(cell), cell.steps),
                "steps": cell.steps,
            }
            store = CellStore(self._setting.out / CELLS / f"{cell.slug}-{fingerprint.of_json(identity)[:12]}", identity)
            self.resolved[cell] = {"identity": identity}
            store.describe()
            made = [self._made(cell, store, seeds) for seeds in self._setting.batches()]
            self.resolved[cell].update({name: made[0].record[name] for name in VISITED})
            return self._row(cell, store, made)
        except OSError:
            raise
        except Exception as error:
            return Row(
                cell.scheduler,
                cell.steps,
                self._setting.guidance,
                "failed",
                self._relative(store) if store is not None else "",
                error=_one_line(error),
                redone=store.redone() if store is not None else [],
            )

    def _scheduler(self, cell: Cell) -> Any:
        return scheduler_for(cell.scheduler, self._setting.base_config)

    def _made(self, cell: Cell, store: CellStore, seeds: range) -> _Made:
        """What must be known of one batch, which is drawn unless it is there."""
        chunk = store.fetch(seeds[0], seeds[-1])
        if chunk is None:
            chunk = self._draw(cell, seeds)
            store.write(chunk)
            self._progress.advance(cell.steps * len(seeds))
        return _Made(len(chunk.images), black(chunk.images), chunk.sha256, chunk.record)

    def _draw(self, cell: Cell, seeds: range) -> Chunk:
        pipe = self._setting.pipe
        if not self._warm:
            # Once a process: what is paid only the first time (allocation, kernel choice, threads) is the network's,
            # and the network is the same in all cells.
            pipe.scheduler = self._scheduler(cell)
            self._images(cell, seeds)
            self._warm = True
        # A scheduler of its own for every batch: none can carry anything from one batch into the next, so a resumed
        # sweep draws what an uninterrupted one does.
        pipe.scheduler = self._scheduler(cell)
        with CallCounter(pipe) as counter, Timer() as timer:
            images = self._images(cell, seeds)
        record = {
            "seconds": timer.seconds,
            "calls": counter.calls,
            "evaluations": counter.samples,
            **visited(pipe.scheduler),
        }
        return Chunk(seeds[0], images, record)

    def _images(self, cell: Cell, seeds: range) -> Tensor:
        s = self._setting
        return draw(s.pipe, s.prompts_of(seeds), seeds, steps=cell.steps, guidance=s.guidance, call=s.call)

    def _row(self, cell: Cell, store: CellStore, made: list[_Made]) -> Row:
        scores = self._scores(store, made)
        images = sum(m.images for m in made)
        dark = sum(m.black for m in made)
        full = [m for m in made if m.images == self._setting.batch_size] or made
        return Row(
            cell.scheduler,
            cell.steps,
            self._setting.guidance,
            "ok",
            self._relative(store),
            samples=images,
            calls=sum(m.record["calls"] for m in made) / len(made),
            nfe_per_image=sum(m.record["evaluations"] for m in made) / images,
            seconds_per_image=float(np.median([m.record["seconds"] / m.images for m in full])),
            metrics=scores["metrics"],
            notes=([f"{dark} of {images} images are black"] if dark else []) + scores["warnings"],
            redone=store.redone(),
        )

    def _scores(self, store: CellStore, made: list[_Made]) -> dict[str, Any]:
        """Scores of the cell's images, from the cell's folder where images and metrics are those of an earlier run."""
        metrics = self._setting.metrics
        key = fingerprint.of_json([[m.sha256 for m in made], [[metric.name, metric.identity] for metric in metrics]])
        kept = store.fetch_scores(key)
        if kept is not None:
            return kept
        measured = measure(metrics, self._stored(store))
        scores = {
            "metrics": {
                name: {field: value for field, value in asdict(score).items() if field != "per_sample"}
                for name, score in measured.scores.items()
            },
            "warnings": list(measured.warnings),
        }
        store.write_scores(key, scores)
        return scores

    def _stored(self, store: CellStore) -> Iterator[tuple[Tensor, list[str]]]:
        for seeds in self._setting.batches():
            chunk = store.fetch(seeds[0], seeds[-1])
            if chunk is None:
                raise RuntimeError(f"the images of seeds {seeds[0]} to {seeds[-1]} vanished while they were measured")
            yield chunk.images, self._setting.prompts_of(seeds)

    def _relative(self, store: CellStore) -> str:
        return store.folder.relative_to(self._setting.out).as_posix()


@dataclass(frozen=True)
class _Made:
    """What is kept of a batch once its images are on disk."""

    images: int
    black: int
    sha256: str
    record: dict[str, Any]


def _one_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
