"""Recipe: all that is decided for one model, as one value."""

from __future__ import annotations

import glob
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewstep.artifact import read_json, write_json
from fewstep.caching import CachePlan
from fewstep.errors import ArtifactError, PlanError
from fewstep.quant import QuantPlan
from fewstep.samplers import SolverPlan, parse_spec

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KIND = "Recipe"
_KEYS = ("sampler", "steps", "guidance", "cache", "cache_digest", "quant", "provenance")


@dataclass(frozen=True, eq=False)
class Recipe:
    """Which sampler, which cache, which layers in how many bits; what is None stays as the pipeline has it.

    Attributes:
        sampler: a plan, or a scheduler with its options as :func:`~fewstep.samplers.make_scheduler` reads it.
        steps: ``num_inference_steps``; that of the plans where left out.
        guidance: the classifier-free guidance it was made for; None where that does not matter.
        cache: for that many steps.
        quant: formats of the denoiser's layers, whose weights are rounded to the nearest codes. Weights that a method
            calibrated lie in a folder of their own (:func:`fewstep.quant.save`) and are loaded before the recipe is applied.
        provenance: how it was found: what was aimed at, measured and tried; JSON.

    Raises:
        PlanError: nothing is decided, a part of another kind, no number of steps, or parts that are for different ones.
    """

    sampler: SolverPlan | str | None = None
    steps: int | None = None
    guidance: float | None = None
    cache: CachePlan | None = None
    quant: QuantPlan | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.sampler is None and self.cache is None and self.quant is None:
            raise PlanError("a recipe decides something: give a sampler, a cache or a quantisation")
        _check_kinds(self)
        object.__setattr__(self, "provenance", dict(self.provenance or {}))
        if isinstance(self.sampler, str):
            object.__setattr__(self, "sampler", str(parse_spec(self.sampler)))
        known = {"the recipe": self.steps}
        if isinstance(self.sampler, SolverPlan):
            known["its sampler"] = self.sampler.nfe
        if self.cache is not None:
            known["its cache"] = self.cache.num_inference_steps
        given = {what: steps for what, steps in known.items() if steps is not None}
        if len(set(given.values())) > 1:
            raise PlanError("; ".join(f"{what} is for {steps} steps" for what, steps in given.items()))
        if not given and self.sampler is not None:
            raise PlanError(f"{self.sampler} takes any number of steps; give steps=")
        if given:
            object.__setattr__(self, "steps", next(iter(given.values())))

    @property
    def call(self) -> dict[str, Any]:
        """What to call the pipeline with: ``pipe(prompt, **recipe.call)``."""
        given = {"num_inference_steps": self.steps, "guidance_scale": self.guidance}
        return {name: value for name, value in given.items() if value is not None}

    def __repr__(self) -> str:
        return str(self)  # a notebook shows it; its parts are attributes

    def __str__(self) -> str:
        said = []
        if self.sampler is not None:
            name = self.sampler if isinstance(self.sampler, str) else self.sampler.method
            said.append(f"{name}, {self.steps} steps")
        if self.cache is not None:
            share = self.cache.provenance.get("macs_share")
            said.append(f"{self.cache.method} cache" + (f" at {share:.1%} of the MACs" if share is not None else ""))
        if self.quant is not None:
            said.append(f"{self.quant.method}, {self.quant.bits:.2f} bits a weight")
        return "Recipe: " + "; ".join(said)

    def save(self, path: str | Path) -> None:
        """Write ``path`` (JSON); a cache lies beside it in a file that the JSON names. Whole or not at all.

        The cache of a recipe that ``path`` held before is removed.

        Raises:
            ArtifactError: a path that does not end in .json.
            PlanError: a provenance that is no JSON.
        """
        path = _checked(path)
        cache = None if self.cache is None else f"{path.stem}-cache-{self.cache.digest}.json"
        body = {
            "sampler": self.sampler.to_dict() if isinstance(self.sampler, SolverPlan) else self.sampler,
            "steps": self.steps,
            "guidance": self.guidance,
            "cache": cache,
            "cache_digest": None if self.cache is None else self.cache.digest,
            "quant": None if self.quant is None else self.quant.to_json(),
            "provenance": dict(self.provenance),
        }
        try:
            json.dumps(body, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise PlanError(f"the recipe's provenance cannot be written as JSON: {error}") from None
        if self.cache is not None and cache is not None:
            self.cache.save(path.with_name(cache))
        write_json(path, KIND, body)
        for old in path.parent.glob(f"{glob.escape(path.stem)}-cache-{'[0-9a-f]' * 16}*"):
            if cache is None or not old.name.startswith(Path(cache).stem):
                old.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read what :meth:`save` wrote.

        Raises:
            ArtifactError: unreadable, of another kind or version, unknown keys, or a cache that is missing or another one.
            PlanError: a part that is malformed.
        """
        path = _checked(path)
        body = read_json(path, KIND, required=_KEYS)
        cache = None
        if body["cache"] is not None:
            if Path(str(body["cache"])).name != body["cache"]:
                raise ArtifactError(f"{path} names its cache {body['cache']!r}; it lies beside it")
            cache = CachePlan.load(path.with_name(body["cache"]))
            if cache.digest != body["cache_digest"]:
                raise ArtifactError(
                    f"{body['cache']} has digest {cache.digest}; {path} was saved with {body['cache_digest']}"
                )
        sampler = SolverPlan.from_dict(body["sampler"]) if isinstance(body["sampler"], Mapping) else body["sampler"]
        quant = None if body["quant"] is None else QuantPlan.from_json(body["quant"])
        return cls(sampler, body["steps"], body["guidance"], cache, quant, body["provenance"])

    def plot(self) -> Figure:
        """Error against work of everything that :func:`~fewstep.pipelines.tune` tried; the recipe's own point filled.

        Raises:
            PlanError: a recipe that was not tuned.
        """
        from fewstep.pipelines.recipes.figure import tried

        return tried(self)


def _check_kinds(recipe: Recipe) -> None:
    """Raises PlanError where a part is not what a recipe is made of."""
    for what, part, kind, right in (
        ("sampler", recipe.sampler, (SolverPlan, str), "a SolverPlan, or a scheduler such as 'DPMSolver(grid=karras)'"),
        ("cache", recipe.cache, CachePlan, "a CachePlan: method.compile(caching.family_of(network), steps)"),
        ("quant", recipe.quant, QuantPlan, "a QuantPlan: config.plan(network)"),
        ("provenance", recipe.provenance, Mapping, "a dict"),
    ):
        if not isinstance(part, kind) and part is not None:
            raise PlanError(f"{what} is {part!r:.80}; give {right}")
    steps, guidance = recipe.steps, recipe.guidance
    if steps is not None and (not isinstance(steps, int) or isinstance(steps, bool) or steps < 1):
        raise PlanError(f"steps is {steps!r}; give at least 1, a whole number")
    number = isinstance(guidance, int | float) and not isinstance(guidance, bool)
    if guidance is not None and not (number and math.isfinite(guidance)):
        raise PlanError(f"guidance is {guidance!r}; give a number")


def _checked(path: str | Path) -> Path:
    path = Path(path)
    if path.suffix != ".json":
        raise ArtifactError(f"the path of a recipe must end in .json, got {str(path)!r}")
    return path
