"""What is asked of a sweep: values on every axis, checked before anything is loaded."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewstep.errors import FewstepError
from fewstep.eval import fingerprint
from fewstep.eval.checks import at_least, distinct, guidance_scale
from fewstep.eval.devices import usable
from fewstep.eval.drawing.scheduling import DEFAULT_GRID, canonical, step_counts, with_grid
from fewstep.eval.metrics import Metric
from fewstep.eval.sweeps.cell import Cell
from fewstep.eval.sweeps.exclusion import Rule, excluded, make_rule
from fewstep.eval.sweeps.reference_arm import ReferenceArm, make_arm
from fewstep.eval.sweeps.results import Results
from fewstep.eval.sweeps.sources import Source, make_sources
from fewstep.eval.sweeps.transforms import NONE, Transform, distinct_names, make_transform

if TYPE_CHECKING:
    from fewstep.eval.sweeps.estimate import SweepEstimate

MOST_BLOCKS = 10_000  # each is a cell of every setting; more is a slip of the pen
LAST_SEED = 2**63 - 1


@dataclass(frozen=True)
class Sweep:
    """A request: models x schedulers x grids x steps x guidance x caches x quantisations x blocks of seeds.

    Every cell draws the same seeds and prompts, so that cells can be compared image by image.

    Args:
        model: the name of an embedded model, the folder of a saved diffusers pipeline, or a pipeline; a list of these;
            or pipelines by name.
        schedulers: specs as :func:`fewstep.samplers.make_scheduler` reads them, such as ``"DPMSolver(solver_order=3)"``
            or ``"diffusers:UniPCMultistepScheduler"``.
        steps: numbers of steps. What a step costs is counted, not assumed. A scheduler of saved plans
            (``"Plan(plan='fashion-sd')"``) gets those of them that it has a plan for.
        grids: names of grids, or paths of saved ones; ``"default"`` is each scheduler's own.
        guidance: classifier-free guidance scale, or several; at most 1 is without. A model that knows none has the
            value 1 alone.
        caches: specs of what :mod:`fewstep.caching` has, or :class:`~fewstep.eval.sweeps.transforms.Transform` objects;
            ``"none"`` is the model as it is.
        quants: the same for :mod:`fewstep.quant`.
        exclude: cells to leave out, ``{axis: value or values}`` each: a cell that meets all of one rule.
        samples: images a cell.
        blocks: how many blocks of seeds; every block is a cell of its own, so that values have a spread.
        seed: the first seed; image i of block b has seed ``seed + b * samples + i``.
        batch_size: images drawn at once. It is part of a cell's identity: another batch rounds differently.
        limit: at most so many images a cell, to try a sweep out.
        prompts: seed i gets ``prompts[i % len(prompts)]``; the model's own where left out.
        metrics: names or :class:`~fewstep.eval.metrics.Metric` objects. Where left out: for an embedded model FID, CLIP
            score and class accuracy, FID alone where it draws without prompts, and for a pipeline of yours none.
        fidelity: against which cell of the same model, guidance and seeds each image is held (latent RMS error, PSNR, SSIM):
            ``"same"`` for the cell's own scheduler and steps without cache and quantisation, ``"DDIM@100"`` for DDIM at 100
            steps; with ``{"reference": ..., "lpips": ..., "features": ...}`` also LPIPS or the distance in a feature net.
            References that no axis asks for become cells of their own. Left out: no reference.
        trackers: accelerate's experiment trackers that each finished cell's numbers go to, by name (``"tensorboard"``,
            ``"wandb"``) or as ``accelerate.tracking.GeneralTracker``.
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
    grids: Sequence[str] = (DEFAULT_GRID,)
    guidance: float | Sequence[float] = 4.0
    caches: Sequence[str | Transform] = (NONE,)
    quants: Sequence[str | Transform] = (NONE,)
    exclude: Sequence[Mapping[str, Any]] = ()
    samples: int = 1000
    blocks: int = 1
    seed: int = 0
    batch_size: int = 50
    limit: int | None = None
    prompts: Sequence[str] | None = None
    metrics: Sequence[str | Metric] | None = None
    fidelity: str | Mapping[str, Any] | None = None
    trackers: Sequence[Any] = ()
    call: Mapping[str, Any] = field(default_factory=dict)
    device: str | None = None

    def __post_init__(self) -> None:
        specs = tuple(canonical(spec) for spec in distinct("schedulers", self.schedulers))
        object.__setattr__(self, "schedulers", distinct("schedulers", specs))
        for steps in distinct("steps", self.steps):
            at_least("steps", steps, 1)
        for scale in distinct("guidance", self.scales):
            guidance_scale(scale)
        for grid in distinct("grids", self.grids):
            if not isinstance(grid, str):
                raise FewstepError(f"grids has {grid!r}; give names, such as 'karras', or paths of saved grids")
        for what, value, least in (
            ("samples", self.samples, 2),
            ("blocks", self.blocks, 1),
            ("seed", self.seed, 0),
            ("batch_size", self.batch_size, 1),
            ("limit", 2 if self.limit is None else self.limit, 2),
        ):
            at_least(what, value, least)
        if self.blocks > MOST_BLOCKS:
            raise FewstepError(f"blocks is {self.blocks}; give at most {MOST_BLOCKS}")
        if (last := self.seed + self.blocks * self.samples - 1) > LAST_SEED:
            raise FewstepError(f"the last seed would be {last}; the largest that torch takes is {LAST_SEED}")
        if self.device is not None:
            usable(self.device)
        self._check_prompts()
        if not isinstance(self.call, Mapping):
            raise FewstepError(f"call is {self.call!r}; give a table of arguments of the pipeline")
        fingerprint.canonical_json(dict(self.call))  # refuses what could not be hashed
        if isinstance(self.metrics, str):
            raise FewstepError(f"metrics is {self.metrics!r}; give a list")
        for cell in self.cells:
            with_grid(cell.scheduler, cell.grid)

    @classmethod
    def from_file(cls, path: str | Path) -> Sweep:
        """The sweep that a TOML file describes: its keys are this class's arguments. See docs/sweep.md.

        Raises:
            FewstepError: for a file that is missing or no TOML, an unknown key, or a value that cannot be; the message
                names file, key and value.
        """
        from fewstep.eval.sweeps.file import read

        return read(path)

    @cached_property
    def sources(self) -> tuple[Source, ...]:
        """The models, none of them loaded."""
        return make_sources(self.model)

    @property
    def scales(self) -> tuple[float, ...]:
        """The guidance scales as they were asked for."""
        one = isinstance(self.guidance, int | float) or self.guidance is None
        return (self.guidance,) if one else tuple(self.guidance)  # type: ignore[arg-type,return-value]

    @cached_property
    def transforms(self) -> dict[str, dict[str, Transform]]:
        """The values of the ``cache`` and ``quant`` axes by name."""
        made = {}
        for axis, values in (("cache", self.caches), ("quant", self.quants)):
            transforms = [make_transform(axis, value) for value in distinct(f"{axis}s", values)]
            distinct_names(axis, transforms)
            made[axis] = {transform.name: transform for transform in transforms}
        return made

    @property
    def samples_drawn(self) -> int:
        """Images a cell, the limit considered."""
        return self.samples if self.limit is None else min(self.samples, self.limit)

    @property
    def seeds(self) -> range:
        """The seeds of the first block."""
        return range(self.seed, self.seed + self.samples_drawn)

    @cached_property
    def cells(self) -> tuple[Cell, ...]:
        """All cells that are not excluded, model by model, scheduler by scheduler; a reference before those it is of.

        Raises:
            FewstepError: an exclude rule that cannot be or that leaves nothing, or saved plans of none of the steps asked for.
        """
        values = self.axes
        rules = self._rules(values)
        possible = {spec: self._possible(spec) for spec in self.schedulers}
        cells = []
        for source in self.sources:
            scales = values["guidance"] if source.guided else (1.0,)
            others = [values[axis] for axis in ("scheduler", "grid", "steps")]
            rest = [values[axis] for axis in ("cache", "quant", "seed")]
            cells += [Cell(source.name, *asked) for asked in itertools.product(*others, scales, *rest)]
        cells = [cell for cell in cells if cell.steps in possible[cell.scheduler]]
        kept = tuple(cell for cell in cells if not excluded(cell, rules))
        if not kept:
            raise FewstepError(f"exclude leaves none of {len(cells)} cells; give rules that leave some")
        arm = self.arm
        return kept if arm is None else tuple(dict.fromkeys(one for cell in kept for one in (arm.of(cell), cell)))

    @cached_property
    def arm(self) -> ReferenceArm | None:
        """The reference arm, where fidelity is asked for."""
        return make_arm(self.fidelity)

    @cached_property
    def axes(self) -> dict[str, tuple[Any, ...]]:
        """What is on every axis."""
        transforms = self.transforms
        return {
            "model": tuple(source.name for source in self.sources),
            "scheduler": tuple(self.schedulers),
            "grid": tuple(self.grids),
            "steps": tuple(self.steps),
            "guidance": tuple(float(scale) for scale in self.scales),
            "cache": tuple(transforms["cache"]),
            "quant": tuple(transforms["quant"]),
            "seed": tuple(self.seed + block * self.samples for block in range(self.blocks)),
        }

    def run(
        self, out: str | Path, *, progress: bool = True, command: Sequence[str] | None = None, ray: str | None = None
    ) -> Results:
        """Run what is missing below ``out`` and write results.csv, results.json and manifest.json.

        Killed at any moment and called again it goes on where it was, and ends with the images and scores of a run that
        was never stopped. Images of another configuration in the same folder are left alone and not used.

        Processes that ``torchrun`` or ``accelerate launch`` started together share the drawing; all call this alike.

        Args:
            out: folder; made where missing.
            progress: a progress bar with the time left on standard error.
            command: what stands in the manifest as the command line; ``sys.argv`` where left out.
            ray: run the cells as tasks on Ray: ``"local"`` starts workers on this machine, ``"auto"`` or an address joins a
                cluster, whose machines all see ``out`` under its path. A program that is connected to one stays so.

        Returns:
            One row a cell; failed cells are rows too (``results.failed``).

        Raises:
            FewstepError: for a scheduler option, a metric or a tracker that cannot be, or no Ray, before anything is written.
            BlockingIOError: where another process runs a sweep into ``out``.
            OSError: where ``out`` cannot be written, or another process of the launch died; what was finished stays.
        """
        from fewstep.eval.sweeps.run import run

        return run(self, Path(out), progress=progress, command=command, ray=ray)

    def estimate(self, out: str | Path | None = None) -> SweepEstimate:
        """What a run would draw and cost, with nothing written.

        Network calls follow from the schedulers' grids. Seconds come from cells of the same model in ``out``; where
        there are none, from drawing one batch at one and at three steps.

        Args:
            out: the folder that the sweep would go to; images that are there need not be drawn.

        Raises:
            FewstepError: for a scheduler option that cannot be.
        """
        from fewstep.eval.sweeps.estimate import estimate

        return estimate(self, None if out is None else Path(out))

    def _possible(self, scheduler: str) -> set[int]:
        counts = step_counts(scheduler)
        found = set(self.steps) if counts is None else set(self.steps) & set(counts)
        if not found:
            there = ", ".join(map(str, counts or ()))
            raise FewstepError(
                f"{scheduler} has plans of {there} steps, none of which is asked for: {list(self.steps)}"
            )
        return found

    def _rules(self, values: Mapping[str, Sequence[Any]]) -> list[Rule]:
        if isinstance(self.exclude, str | Mapping) or not isinstance(self.exclude, Sequence):
            raise FewstepError(f"exclude is {self.exclude!r}; give a list of rules")
        return [make_rule(rule, values) for rule in self.exclude]

    def _check_prompts(self) -> None:
        lacking = [source for source in self.sources if not source.embedded and source.family != "unconditional"]
        if self.prompts is None and lacking:
            raise FewstepError(
                f"{lacking[0].name}: a pipeline of yours needs prompts; only the embedded models bring their own"
            )
        wrong = isinstance(self.prompts, str) or not isinstance(self.prompts, Sequence) or not self.prompts
        if self.prompts is not None and (wrong or not all(isinstance(prompt, str) for prompt in self.prompts)):
            raise FewstepError("prompts must be a list of at least one prompt")
