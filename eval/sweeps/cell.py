"""One cell of a sweep: what is asked of it, and what it shares with the other cells of its model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewstep.eval import fingerprint
from fewstep.eval.drawing.scheduling import DEFAULT_GRID, scheduler_for, with_grid
from fewstep.eval.metrics import Metric
from fewstep.eval.sweeps.identity import scheduler_identity
from fewstep.eval.sweeps.store import CellStore
from fewstep.eval.sweeps.transforms import NONE, Transform

if TYPE_CHECKING:
    from fewstep.eval.sweeps.reference_arm import ReferenceArm

CELLS = "cells"
AXES = ("model", "scheduler", "grid", "steps", "guidance", "cache", "quant", "seed")


@dataclass(frozen=True)
class Cell:
    """What is asked of one cell: a value on every axis.

    Attributes:
        model: the model's name in the sweep.
        scheduler: spec, as :func:`fewstep.samplers.parse_spec` spells it.
        grid: name of the grid, or ``default`` for the scheduler's own.
        steps: number of steps.
        guidance: classifier-free guidance scale.
        cache: name of the cache, or ``none``.
        quant: name of the quantisation, or ``none``.
        seed: the first seed of its block.
    """

    model: str
    scheduler: str
    grid: str
    steps: int
    guidance: float
    cache: str
    quant: str
    seed: int

    @property
    def axes(self) -> dict[str, Any]:
        """The values by axis, in the order of :data:`AXES`."""
        values = asdict(self)
        return {axis: values[axis] for axis in AXES}

    @property
    def slug(self) -> str:
        """A folder name that people recognise; the key behind it is what makes it unique."""
        before = [self.scheduler, *([self.grid] if self.grid != DEFAULT_GRID else [])]
        after = [name for name in (self.cache, self.quant) if name != NONE]
        return "-".join([_plain(" ".join(before))[:60], str(self.steps), *(_plain(name)[:30] for name in after)])

    @property
    def title(self) -> str:
        """For people: what is said of nearly every cell is left out."""
        said = [f"{self.scheduler}, {self.steps} steps"]
        said += [f"grid {self.grid}"] if self.grid != DEFAULT_GRID else []
        said += [f"{axis} {name}" for axis, name in (("cache", self.cache), ("quant", self.quant)) if name != NONE]
        return ", ".join(said)

    def work(self, samples: int) -> float:
        """Units of work: network evaluations, if every step made one call. Guidance doubles them."""
        return float(self.steps * samples * (2 if self.guidance > 1 else 1))


def titles(cells: Iterable[Cell]) -> dict[Cell, str]:
    """The title of every cell, with the model, the guidance and the first seed where these tell the cells apart."""
    cells = tuple(cells)
    models, scales, seeds = ({getattr(cell, axis) for cell in cells} for axis in ("model", "guidance", "seed"))
    return {
        cell: (f"{cell.model}: " if len(models) > 1 else "")
        + cell.title
        + (f", guidance {cell.guidance:g}" if len(scales) > 1 else "")
        + (f", seeds from {cell.seed}" if len(seeds) > 1 else "")
        for cell in cells
    }


@dataclass(frozen=True)
class Setting:
    """What the cells of one model share.

    Attributes:
        base_config: the configuration of the scheduler that the model came with; the cells' schedulers are made of it.
        prompts: seed i has the prompt ``prompts[i % len(prompts)]``.
        samples: images a cell.
        batch_size: images drawn at once.
        call: further arguments of the pipeline, JSON values.
        common: the part of the cells' identities that is the same for all.
        metrics: the columns that mean something for this model.
        notes: what every row of this model is to say.
        transforms: the values of the ``cache`` and ``quant`` axes by name.
        arm: which cell is the reference of which, where fidelity is asked for.
        out: the sweep's folder.
    """

    base_config: Any
    prompts: tuple[str, ...]
    samples: int
    batch_size: int
    call: Mapping[str, Any]
    common: Mapping[str, Any]
    metrics: tuple[Metric, ...]
    notes: tuple[str, ...]
    transforms: Mapping[str, Mapping[str, Transform]]
    arm: ReferenceArm | None
    out: Path

    def seeds(self, cell: Cell) -> range:
        return range(cell.seed, cell.seed + self.samples)

    def batches(self, cell: Cell) -> Iterator[range]:
        """The seeds of each batch, in order; the last may be smaller."""
        seeds = self.seeds(cell)
        for first in range(seeds.start, seeds.stop, self.batch_size):
            yield range(first, min(first + self.batch_size, seeds.stop))

    def prompts_of(self, seeds: Sequence[int]) -> list[str]:
        return [self.prompts[seed % len(self.prompts)] for seed in seeds]

    def scheduler(self, cell: Cell) -> Any:
        """A scheduler of the cell's own, its grid chosen."""
        return scheduler_for(with_grid(cell.scheduler, cell.grid), self.base_config)

    def transform(self, axis: str, cell: Cell) -> Transform:
        return self.transforms[axis][cell.axes[axis]]

    def identity(self, cell: Cell) -> dict[str, Any]:
        """Everything that the cell's images depend on but the seeds, resolved."""
        changes = {
            axis: {"name": changed.name, **changed.identity}
            for axis in self.transforms
            if (changed := self.transform(axis, cell)).name != NONE
        }
        return {
            **self.common,
            "guidance": cell.guidance,
            "scheduler": scheduler_identity(self.scheduler(cell), cell.steps),
            "steps": cell.steps,
            **changes,
        }

    def store(self, cell: Cell) -> CellStore:
        """Where the cell's images are. Blocks of seeds of one configuration share it."""
        identity = self.identity(cell)
        return CellStore(
            self.out / CELLS / f"{cell.slug}-{fingerprint.of_json(identity)[: fingerprint.SHORT]}", identity
        )


def _plain(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-")
