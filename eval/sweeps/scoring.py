"""The second half of a cell: what was drawn is measured. Needs the images on disk, and no pipeline."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from fewstep.eval import fingerprint
from fewstep.eval.drawing.batch import black
from fewstep.eval.metrics import measure
from fewstep.eval.pairs.same_seed import FidelityStream
from fewstep.eval.pairs.samples import Samples
from fewstep.eval.sweeps.cell import Cell, Setting
from fewstep.eval.sweeps.identity import VISITED, jsonable
from fewstep.eval.sweeps.results import Row
from fewstep.eval.sweeps.store import CellStore, Chunk


@dataclass(frozen=True)
class Scored:
    """A cell's row, and the times that the scheduler really visited, with what a cache decided at each."""

    row: Row
    visited: dict[str, Any]


def score(setting: Setting, cell: Cell, store: CellStore) -> Scored:
    """Read a cell's images, measure them unless that was done before, and add up what they cost.

    Raises:
        RuntimeError: where a batch is missing or damaged: it was there when the cell was drawn.
    """
    made = [_made(chunk) for chunk in _chunks(setting, cell, store)]
    kept = _scores(setting, cell, store, made)
    images = sum(m.images for m in made)
    dark = sum(m.black for m in made)
    full = [m for m in made if m.images == setting.batch_size] or made
    row = Row(
        **cell.axes,
        status="ok",
        folder=relative(setting, store),
        samples=images,
        calls=sum(m.record["calls"] for m in made) / len(made),
        nfe_per_image=sum(m.record["evaluations"] for m in made) / images,
        seconds_per_image=float(np.median([m.record["seconds"] / m.images for m in full])),
        metrics=kept["metrics"],
        notes=[
            *([f"{dark} of {images} images are black"] if dark else []),
            *setting.notes,
            *kept["warnings"],
            *dict.fromkeys(doubt for m in made for doubt in m.record.get("doubts", ())),
        ],
        redone=store.redone(),
        effective_nfe_per_image=next((m.record[_EFFECTIVE] for m in made if _EFFECTIVE in m.record), None),
        macs_per_image=next((m.record["macs"] for m in made if "macs" in m.record), None),
        peak_bytes=max((peak for m in made if (peak := _peak(m.record.get("memory", {})))), default=None),
    )
    return Scored(row, {name: made[0].record[name] for name in (*VISITED, DECISIONS) if name in made[0].record})


_EFFECTIVE = "effective_evaluations"
DECISIONS = "decisions"


def _peak(memory: Mapping[str, int]) -> int | None:
    return memory.get("cuda_allocated", memory.get("resident"))


def relative(setting: Setting, store: CellStore) -> str:
    """A cell's folder as it stands in the results."""
    return store.folder.relative_to(setting.out).as_posix()


@dataclass(frozen=True)
class _Made:
    """What is kept of a batch while the others are read."""

    images: int
    black: int
    sha256: str
    record: dict[str, Any]


def _made(chunk: Chunk) -> _Made:
    return _Made(len(chunk.images), black(chunk.images), chunk.sha256, chunk.record)


def _chunks(setting: Setting, cell: Cell, store: CellStore) -> Iterator[Chunk]:
    for seeds in setting.batches(cell):
        chunk = store.fetch(seeds[0], seeds[-1])
        if chunk is None:
            raise RuntimeError(f"the images of seeds {seeds[0]} to {seeds[-1]} vanished before they were measured")
        yield chunk


def _scores(setting: Setting, cell: Cell, store: CellStore, made: list[_Made]) -> dict[str, Any]:
    """Scores of the cell's images, from its folder where images, references and metrics are those of an earlier run."""
    pairs = _Pairs.of(setting, cell)
    parts = [[m.sha256 for m in made], [[metric.name, metric.identity] for metric in setting.metrics]]
    key = fingerprint.of_json(parts if pairs is None else [*parts, pairs.identity])
    seeds = setting.seeds(cell)
    kept = store.fetch_scores(seeds, key)
    if kept is not None:
        return kept
    hashes: list[str] = []

    def batches() -> Iterator[tuple[Tensor, list[str]]]:
        for chunk in _chunks(setting, cell, store):
            hashes.extend(hashlib.sha256(fingerprint.tensor_bytes(image)).hexdigest() for image in chunk.images)
            if pairs is not None:
                pairs.update(chunk)
            yield chunk.images, setting.prompts_of(range(chunk.first, chunk.last + 1))

    measured = measure(setting.metrics, batches())
    metrics: dict[str, Any] = {
        name: {field: value for field, value in asdict(score).items() if field != "per_sample"}
        for name, score in measured.scores.items()
    }
    single = {name: one.per_sample for name, one in measured.scores.items() if one.per_sample is not None}
    for name, samples in (pairs.result(seeds) if pairs else {}).items():
        summary = samples.summary()
        metrics[name] = {"value": summary.pop("mean"), "recipe": samples.recipe, "n": len(seeds), **summary}
        single[name] = samples.values
    scores = {
        "metrics": jsonable(metrics),
        "warnings": [*measured.warnings, *(pairs.warnings if pairs else ())],
    }
    store.sync(setting.batches(cell))
    store.write_scores(seeds, key, scores, _samples(setting, seeds, hashes, single))
    return scores


class _Pairs:
    """A cell's images against those of its reference, as they are read.

    Attributes:
        identity: what the values depend on beside the cell's own images; known before anything is read.
        warnings: why there is nothing to tell, where the reference could not be drawn.
    """

    def __init__(
        self, name: str, stream: FidelityStream, reference: CellStore | None, batches: Sequence[range]
    ) -> None:
        self._name, self._stream, self._reference = name, stream, reference
        hashes = [reference and reference.sha256(seeds) for seeds in batches]
        self.identity = [name, stream.identity, hashes]
        self.warnings = [f"not held against {name}: that cell has failed"] if None in hashes else []

    @classmethod
    def of(cls, setting: Setting, cell: Cell) -> _Pairs | None:
        """None where nobody asked, or the cell is the reference itself."""
        if setting.arm is None or setting.arm.of(cell) == cell:
            return None
        try:
            reference = setting.store(setting.arm.of(cell))
        except Exception:  # whatever a scheduler raises; the reference's own row tells it
            reference = None
        return cls(setting.arm.reference, setting.arm.stream(), reference, list(setting.batches(cell)))

    def update(self, chunk: Chunk) -> None:
        if self._reference is None or self.warnings:
            return
        other = self._reference.fetch(chunk.first, chunk.last)
        if other is None or chunk.latents is None or other.latents is None:
            raise RuntimeError(f"the reference of seeds {chunk.first} to {chunk.last} vanished before it was measured")
        self._stream.update(chunk.images, other.images, (chunk.latents, other.latents))

    def result(self, seeds: Sequence[int]) -> Mapping[str, Samples]:
        return {} if self.warnings else self._stream.result(seeds, self._name).samples


def _samples(
    setting: Setting, seeds: range, hashes: list[str], single: Mapping[str, npt.NDArray[np.float64]]
) -> list[dict[str, Any]]:
    """One record a sample: seed, prompt, hash of its uint8 (C, H, W) pixels, and what the metrics say of it alone."""
    prompts = setting.prompts_of(seeds)
    return [
        {"seed": seed, "prompt": prompts[index], "sha256": hashes[index]}
        | {name: jsonable(float(each[index])) for name, each in single.items() if len(each) == len(hashes)}
        for index, seed in enumerate(seeds)
    ]
