"""MagCache: a table of how the residual's magnitude changes from step to step bounds the error of reusing it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from fewstep.caching.families import Family
from fewstep.caching.method import Method, check_interval, steps_table
from fewstep.caching.methods.online import positive, whole_stack
from fewstep.caching.plan import Actions, CachePlan
from fewstep.caching.predictors import Hold, Predictor, Scale, channel_axis
from fewstep.caching.profiling import See, Sight, watch_runs
from fewstep.errors import FewstepError


@dataclass(frozen=True)
class MagCache(Method):
    """The residual of the whole network is reused while its magnitude is expected to have changed little.

        gamma_t = mean over tokens of |r_t|_2 / |r_{t-1}|_2,    P = prod gamma,    E = sum |1 - P|

    over a run of reused steps; E may not pass ``threshold``, nor the run ``max_run``. The ratios hardly depend on the prompt,
    so one calibration prompt gives them (:meth:`fit`), and since nothing else is looked at the method is a plan.
    MagCache: Fast Video Generation with Magnitude-Aware Cache, arXiv 2506.09045.

    Attributes:
        threshold: bound on E. The authors use 0.24 with runs of 5 and a tenth retained on FLUX, 0.12, 4 and 0.2 on Wan 2.1
            1.3B.
        max_run: longest run of reused steps, K.
        retention: share of the steps that is computed at the start.
        ratios: gamma of every step, that of the first is not used; for other numbers of steps the nearest one stands in.
            None for the published ones of FLUX.1.
        scale: whether a reused residual is also multiplied by the expected growth P.
    """

    knob: ClassVar[str | None] = "threshold"
    threshold: float = 0.06
    max_run: int = 3
    retention: float = 0.2
    ratios: tuple[float, ...] | None = None
    scale: bool = False

    def __post_init__(self) -> None:
        positive(self.threshold, "threshold")
        check_interval(self.max_run, "max_run")
        if not 0 <= self.retention <= 1:
            raise FewstepError(f"retention is {self.retention}; give a share of the steps from 0 to 1")
        if self.ratios is not None:
            object.__setattr__(self, "ratios", tuple(map(float, self.ratios)))
            if not self.ratios or not all(0 < r < float("inf") for r in self.ratios):
                raise FewstepError("ratios are positive numbers, one a step; MagCache.fit measures them")

    def sites(self, family: Family) -> list[str]:
        return [whole_stack(family, type(self).__name__)]

    @property
    def predictor(self) -> Predictor:
        return Scale(self.ratios) if self.scale and self.ratios else Hold()

    def compile(self, family: Family, steps: int) -> CachePlan:
        known = published_ratios(family) if self.ratios is None else self.ratios
        made = Method.compile(replace(self, ratios=nearest(known, steps)), family, steps)
        return replace(made, method=self.describe())

    def table(self, steps: int, sites: Sequence[str]) -> Actions:
        ratios = nearest(self.ratios or (1.0,), steps)
        computed = []
        retained = max(int(self.retention * steps + 0.5), 1)
        grown, error, run = 1.0, 0.0, 0
        for step in range(steps):
            if step >= retained:
                grown, run = grown * ratios[step], run + 1
                error += abs(1 - grown)
            compute = step < retained or error > self.threshold or run > self.max_run
            if compute:
                grown, error, run = 1.0, 0.0, 0
            computed.append(compute)
        return steps_table(computed, len(sites))

    def describe(self) -> str:
        measured = "" if self.ratios is None else f", {len(self.ratios)} ratios"
        return f"MagCache({self.threshold:g}, {self.max_run}, {self.retention:g}{measured}, scale={self.scale})"

    @classmethod
    def fit(
        cls,
        pipe: Any,
        prompts: Sequence[str] | None = None,
        *,
        num_inference_steps: int,
        samples: int = 1,
        **options: Any,
    ) -> MagCache:
        """MagCache with the ratios of a pipeline's own residuals, averaged over tokens, samples and guidance's streams.

        Args:
            pipe: a diffusers pipeline; left as it was.
            prompts: drawn in turn; one is enough.
            num_inference_steps: steps of the trajectories.
            samples: trajectories.
            options: fields of MagCache, and ``guidance_scale``, ``seed``, ``batch``, ``call`` as of
                :func:`fewstep.caching.profile`.
        """
        own = {name: options.pop(name) for name in ("threshold", "max_run", "retention", "scale") if name in options}
        measured: defaultdict[int, list[Tensor]] = defaultdict(list)

        def begin() -> See:
            last: list[Tensor] = []

            def see(sight: Sight) -> None:
                norm = sight.value.float().norm(dim=channel_axis(sight.value))
                if last:
                    measured[sight.step].append((norm / last.pop()).mean())
                last[:] = [norm]

            return see

        watch_runs(
            pipe, lambda family: whole_stack(family, cls.__name__), begin, prompts=prompts, samples=samples,
            num_inference_steps=num_inference_steps, **options,
        )  # fmt: skip
        ratios = [
            float(np.mean([float(r) for r in measured[step]])) if measured[step] else 1.0
            for step in range(1 + max(measured, default=0))
        ]
        return cls(ratios=tuple(ratios), **own)


def nearest(ratios: Sequence[float], steps: int) -> tuple[float, ...]:
    """A table for another number of steps: the entries nearest in the share of the trajectory."""
    if steps == 1:
        return (float(ratios[-1]),)
    where = np.round(np.arange(steps) * ((len(ratios) - 1) / (steps - 1))).astype(int)
    return tuple(float(ratios[i]) for i in where)


def published_ratios(family: Family) -> tuple[float, ...]:
    """The authors' ratios for a model's class.

    Raises:
        FewstepError: where there are none.
    """
    if family.name != "FluxTransformer2DModel":
        raise FewstepError(
            f"no magnitude ratios are published for {family.name}; measure them with MagCache.fit(pipe, prompts, "
            "num_inference_steps=...)"
        )
    from diffusers.hooks.mag_cache import FLUX_MAG_RATIOS

    return tuple(map(float, FLUX_MAG_RATIOS.tolist()))
