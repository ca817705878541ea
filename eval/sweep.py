"""Schedulers x steps on one model: drawn, measured, timed, written down, and resumable at any moment."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any

from fewstep.errors import FewstepError
from fewstep.eval import fingerprint
from fewstep.eval.cell import Cell, CellRunner, Setting
from fewstep.eval.checks import at_least, distinct, guidance_scale
from fewstep.eval.devices import load_model, place, usable
from fewstep.eval.drawing import SEEDING, borrowed
from fewstep.eval.identity import device_name, model_identity, versions
from fewstep.eval.lock import only_writer, remove_leftovers
from fewstep.eval.manifest import Manifest
from fewstep.eval.metrics import Metric, make_metrics
from fewstep.eval.progress import SweepProgress
from fewstep.eval.results import Results, Row
from fewstep.eval.scheduling import scheduler_for

SHOWN = 16  # prompts in the manifest; enough for the report's pictures
ZOO_METRICS = ("fid", "clip_score", "accuracy")


@dataclass(frozen=True)
class Sweep:
    """A request: every scheduler at every number of steps, on the same seeds and prompts.

    Args:
        model: the name of an embedded model, or a diffusers text-to-image pipeline.
        schedulers: specs as :func:`fewstep.samplers.make_scheduler` reads them, such as ``"DPMSolver(solver_order=3)"``
            or ``"diffusers:UniPCMultistepScheduler"``.
        steps: numbers of steps. What a step costs is counted, not assumed.
        samples: images a cell.
        guidance: classifier-free guidance scale; at most 1 is without.
        seed: the first seed; image i of a cell has seed ``seed + i``.
        batch_size: images drawn at once. It is part of a cell's identity: another batch rounds differently.
        limit: at most so many images a cell, to try a sweep out.
        prompts: seed i gets ``prompts[i % len(prompts)]``; the model's own where left out.
        metrics: names or :class:`~fewstep.eval.metrics.Metric` objects; for an embedded model FID, CLIP score and
            class accuracy where left out, for a pipeline of yours none.
        call: further arguments of the pipeline (``eta``, ``height``, ...), JSON values.
        device: where to compute; an embedded model goes to the accelerator where there is one, a pipeline of yours
            stays where it is, when left out.

    Raises:
        FewstepError: for what could not run: an unknown or repeated scheduler, steps < 1, samples < 2, and so on; the
            message names the value.
    """

    model: Any
    schedulers: Sequence[str]
    steps: Sequence[int]
    _: KW_ONLY
    samples: int = 1000
    guidance: float = 4.0
    seed: int = 0
    batch_size: int = 50
    limit: int | None = None
    prompts: Sequence[str] | None = None
    metrics: Sequence[str | Metric] | None = None
    call: Mapping[str, Any] = field(default_factory=dict)
    device: str | None = None

    def __post_init__(self) -> None:
        from fewstep.samplers import parse_spec

        # One spelling a scheduler, so that the same one asked for in two ways is found out.
        specs = tuple(str(parse_spec(spec)) for spec in distinct("schedulers", self.schedulers))
        object.__setattr__(self, "schedulers", distinct("schedulers", specs))
        for steps in distinct("steps", self.steps):
            at_least("steps", steps, 1)
        at_least("samples", self.samples, 2)
        at_least("seed", self.seed, 0)
        at_least("batch_size", self.batch_size, 1)
        if self.limit is not None:
            at_least("limit", self.limit, 2)
        guidance_scale(self.guidance)
        if self.device is not None:
            usable(self.device)
        if isinstance(self.model, str):
            _known_model(self.model)
        elif self.prompts is None:
            raise FewstepError("a pipeline of yours needs prompts; only the embedded models bring their own")
        if self.prompts is not None and (isinstance(self.prompts, str) or not self.prompts):
            raise FewstepError("prompts must be a list of at least one prompt")
        fingerprint.canonical_json(dict(self.call))  # refuses what could not be hashed

    @property
    def cells(self) -> tuple[Cell, ...]:
        """All cells, scheduler by scheduler."""
        return tuple(Cell(scheduler, steps) for scheduler in self.schedulers for steps in self.steps)

    @property
    def seeds(self) -> range:
        """The seeds of every cell."""
        count = self.samples if self.limit is None else min(self.samples, self.limit)
        return range(self.seed, self.seed + count)

    def run(self, out: str | Path, *, progress: bool = True, command: Sequence[str] | None = None) -> Results:
        """Run what is missing below ``out`` and write results.csv, results.json and manifest.json.

        Killed at any moment and called again it goes on where it was, and ends with the images and scores of a run that
        was never stopped. Images of another configuration in the same folder are left alone and not used.

        Args:
            out: folder; made where missing.
            progress: a progress bar with the time left on standard error.
            command: what stands in the manifest as the command line; ``sys.argv`` where left out.

        Returns:
            One row a cell; failed cells are rows too (``results.failed``).

        Raises:
            FewstepError: for a scheduler option or a metric that cannot be, before anything is written.
            BlockingIOError: where another process runs a sweep into ``out``.
            OSError: where ``out`` cannot be written; what was finished stays.
        """
        pipe, prompts = self._load()
        for spec in self.schedulers:
            scheduler_for(spec, pipe.scheduler.config)
        metrics = make_metrics(self._metrics())
        out = Path(out)
        model = model_identity(pipe)
        common = {
            "model": fingerprint.of_json(model),
            "prompts": fingerprint.of_json(prompts),
            "guidance": float(self.guidance),
            "call": dict(self.call),
            "batch_size": self.batch_size,
            "seeding": SEEDING,
            "device": device_name(pipe.device),
            "versions": versions(),
        }
        with only_writer(out), borrowed(pipe), SweepProgress(self._work(self.cells), progress) as bar:
            remove_leftovers(out)
            setting = Setting(
                pipe, pipe.scheduler.config, prompts, self.seeds, self.batch_size, float(self.guidance),
                self.call, common, metrics, out,
            )  # fmt: skip
            manifest = Manifest(out, self._request(model, setting), sys.argv if command is None else command)
            manifest.save()
            try:
                results = self._run_cells(setting, manifest, bar)
            except BaseException:
                manifest.end("interrupted")
                raise
            manifest.end("finished" if not results.failed else f"finished, {len(results.failed)} cells failed")
        return results

    def _run_cells(self, setting: Setting, manifest: Manifest, bar: SweepProgress) -> Results:
        runner = CellRunner(setting, bar)
        names = tuple(metric.name for metric in setting.metrics)
        results = Results(names, len(self.cells), ())
        for number, cell in enumerate(self.cells, start=1):
            row = runner.run(cell)
            results = Results(names, len(self.cells), (*results.rows, row))
            results.save(setting.out)
            manifest.cell(_described(row, runner.resolved.get(cell, {})))
            bar.finished(row)
            bar.remaining(self._work(self.cells[number:]))
        return results

    def _load(self) -> tuple[Any, tuple[str, ...]]:
        if not isinstance(self.model, str):
            pipe = self.model if self.device is None else place(self.model, self.device)
            return pipe, tuple(self.prompts or ())
        from fewstep.pipelines import zoo

        pipe = load_model(self.model, self.device)
        return pipe, tuple(self.prompts if self.prompts is not None else zoo.prompts(self.model))

    def _metrics(self) -> Iterable[str | Metric]:
        if self.metrics is not None:
            return self.metrics
        return ZOO_METRICS if isinstance(self.model, str) else ()

    def _work(self, cells: Sequence[Cell]) -> float:
        return float(sum(cell.steps for cell in cells) * len(self.seeds))

    def _request(self, model: dict[str, Any], setting: Setting) -> dict[str, Any]:
        return {
            "model": self.model if isinstance(self.model, str) else type(self.model).__name__,
            "components": model,
            "schedulers": list(self.schedulers),
            "steps": list(self.steps),
            "seeds": [self.seeds.start, self.seeds.stop - 1],
            "samples": len(self.seeds),
            "guidance": self.guidance,
            "batch_size": self.batch_size,
            "call": dict(self.call),
            "first_prompts": setting.prompts_of(self.seeds[:SHOWN]),
        }


def _described(row: Row, resolved: dict[str, Any]) -> dict[str, Any]:
    named = {"scheduler": row.scheduler, "steps": row.steps, "folder": row.folder, "status": row.status}
    return named | resolved


def _known_model(name: str) -> None:
    from fewstep import pipelines

    names = pipelines.models()
    if name not in names:
        raise FewstepError(f"unknown model {name!r}; known are {', '.join(names)}")
