"""The first half of a cell: the images that are missing are drawn. Needs the pipeline, and nothing of the metrics."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

from torch import Tensor

from fewstep.eval.costs.calls import CallCounter, denoisers
from fewstep.eval.costs.clock import Timer
from fewstep.eval.costs.mac_count import MacCounter
from fewstep.eval.costs.memory import peak_memory, reset_peak_memory
from fewstep.eval.drawing.batch import borrowed, draw
from fewstep.eval.pairs.latents import capture_latents
from fewstep.eval.sweeps.cell import Cell, Setting
from fewstep.eval.sweeps.identity import visited
from fewstep.eval.sweeps.mac_memory import MacCount, MacMemory
from fewstep.eval.sweeps.progress import SweepProgress
from fewstep.eval.sweeps.store import CellStore, Chunk
from fewstep.eval.sweeps.transforms import NONE, LeftBehind, unchanged

MANY = 3  # batches whose median one slow batch does not move


def missing(setting: Setting, cell: Cell, store: CellStore) -> list[range]:
    """The batches whose images, or latents where these are wanted, are not there, or not whole; damage is set aside."""

    def whole(seeds: range) -> bool:
        chunk = store.fetch(seeds[0], seeds[-1])
        return chunk is not None and not (setting.arm and chunk.latents is None)

    return [seeds for seeds in setting.batches(cell) if not whole(seeds)]


class Painter:
    """Draws batches of cells of one model.

    Args:
        pipe: a diffusers pipeline; its scheduler is replaced while a batch is drawn.
        setting: what the cells share.
        progress: told of finished work.
        reload: makes the pipeline anew where a transform could not be undone; None for a pipeline of the caller's.
    """

    def __init__(
        self, pipe: Any, setting: Setting, progress: SweepProgress, reload: Callable[[], Any] | None = None
    ) -> None:
        self._pipe = pipe
        self._setting = setting
        self._progress = progress
        self._reload = reload
        self._memory = MacMemory(setting, len(denoisers(pipe)))
        self._warm = False
        self._spoiled = ""
        self._fresh: tuple[Cell, Any] | None = None

    def draw(self, cell: Cell, store: CellStore, batches: Sequence[range]) -> None:
        """Draw ``batches`` of a cell's seeds and write each as it is done.

        Raises:
            TransformError: where the cell's cache or quantisation cannot be applied.
            LeftBehind: where it cannot be undone. The images are kept: they were whole before that. Cells that follow
                get a fresh pipeline, or where it was the caller's are refused with this error too.
        """
        if not batches:
            return
        if self._spoiled:
            raise LeftBehind(f"not drawn: {self._spoiled}, and the pipeline is the caller's")
        quant = self._setting.transform("quant", cell)
        names = [name for name in (cell.cache, cell.quant) if name != NONE]
        try:
            with borrowed(self._pipe), ExitStack() as around:
                if names:
                    around.enter_context(unchanged(self._pipe, " and ".join(names)))
                around.enter_context(quant.applied("quant", self._pipe))
                # What is paid only the first time (allocation, kernel choice, threads) is the network's: once for the
                # plain one, and again when a transform has made another of it. Of many batches the median is taken.
                warm = len(batches) >= MANY if names else self._warm
                count = self._rehearsed(cell, warm)
                for seeds in batches:
                    store.write(self._chunk(cell, seeds, count))
                    self._progress.advance(cell.work(len(seeds)))
        except LeftBehind as error:
            self._replace(str(error))
            raise

    def _chunk(self, cell: Cell, seeds: range, count: MacCount | None) -> Chunk:
        # A scheduler and a cache of its own for every batch: none can carry anything from one batch into the next, so
        # a resumed sweep draws what an uninterrupted one does.
        with self._setting.transform("cache", cell).applied("cache", self._pipe) as cache:
            self._pipe.scheduler = self._scheduler(cell)
            reset_peak_memory()
            watched = capture_latents(self._pipe) if self._setting.arm else nullcontext()
            with watched as captured, CallCounter(self._pipe) as counter, Timer() as timer:
                images = self._images(cell, seeds)
            decided = _decided(cache)
        cost = {"seconds": timer.seconds, "calls": counter.calls, "evaluations": counter.samples}
        macs = count.record(counter.nfe_per_image(len(seeds))) if count else {}
        record = {**cost, "memory": peak_memory(), **macs, **decided, **visited(self._pipe.scheduler)}
        return Chunk(seeds[0], images, record, captured.latents(len(images)) if captured else None)

    def _rehearsed(self, cell: Cell, warm: bool) -> MacCount | None:
        """What an image executes; drawn apart where that is not known, or where nothing is warm yet.

        Counted is the cell's first image where a transform is at work: a cache may decide otherwise on others, and its first
        call may try kernels out. Of the plain network any call will do, also the one that warms it.
        """
        known = self._memory.fetch(cell)
        if warm and known:
            return known
        seeds = next(self._setting.batches(cell))
        counted: MacCount | None = None
        try:
            if not warm and (known or cell.cache != NONE or cell.quant != NONE):
                self._tried(cell, seeds, nullcontext())
                warm = True
            if known is None:
                seeds = seeds[:1] if warm else seeds
                counter = MacCounter(self._pipe)
                self._tried(cell, seeds, counter)
                counted = MacCount.of(counter, len(seeds))
        except LeftBehind:
            raise
        except Exception:  # what cannot be counted may well be drawn, and what cannot be drawn fails where it is
            return known
        self._warm = True
        if counted is not None:
            self._memory.keep(cell, counted)
        return known or counted

    def _tried(self, cell: Cell, seeds: range, around: AbstractContextManager[Any]) -> None:
        with self._setting.transform("cache", cell).applied("cache", self._pipe), around:
            self._pipe.scheduler = self._scheduler(cell)
            self._images(cell, seeds)

    def _scheduler(self, cell: Cell) -> Any:
        """A copy of one that was never used: made anew it would cost a small model's batch some percent."""
        if self._fresh is None or self._fresh[0] != cell:
            self._fresh = cell, self._setting.scheduler(cell)
        return copy.deepcopy(self._fresh[1])

    def _images(self, cell: Cell, seeds: range) -> Tensor:
        s = self._setting
        return draw(self._pipe, s.prompts_of(seeds), seeds, steps=cell.steps, guidance=cell.guidance, call=s.call)

    def _replace(self, why: str) -> None:
        if self._reload is None:
            self._spoiled = why
        else:
            self._pipe, self._warm = self._reload(), False


def _decided(cache: Any) -> dict[str, Any]:
    """For the record: what a cache that reports did at every step and site, and what it doubts."""
    if not hasattr(cache, "report"):
        return {}
    report = cache.report()
    return {"decisions": report.decisions(), "doubts": list(report.warnings)}
