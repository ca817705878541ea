"""Step Rehash: features are reused over the steps at which they were measured to be alike."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from fewstep.caching.families import Family
from fewstep.caching.method import Method, steps_table
from fewstep.caching.methods.online import whole_stack
from fewstep.caching.plan import Actions
from fewstep.caching.profiling import See, Sight, watch_runs
from fewstep.errors import FewstepError


@dataclass(frozen=True)
class StepRehash(Method):
    """A site is computed again when its value is less alike the one that is kept than a threshold, by an offline profile.

    Likeness is the cosine between the values of a step and an earlier one, as :meth:`fit` measured it on uncached runs.
    Fast and Memory-Efficient Video Diffusion Using Streamlined Inference, arXiv 2411.01171, whose code and thresholds for this
    part are not released; the slicing that is its other half is not part of this.

    Attributes:
        threshold: least cosine at which a value is reused.
        similarity: (steps, reach) cosine of step t with step t - 1 - k.
        site: the name of the site; None for the whole stack of a transformer, and the deep part of a UNet.
    """

    knob: ClassVar[str | None] = None  # more threshold is less reuse
    threshold: float = 0.95
    similarity: tuple[tuple[float, ...], ...] = ()
    site: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "similarity", tuple(tuple(map(float, row)) for row in self.similarity))
        if not -1 <= self.threshold <= 1:
            raise FewstepError(f"threshold is {self.threshold}; give a cosine, such as 0.95")

    def sites(self, family: Family) -> list[str]:
        return [self._site(family)]

    def _site(self, family: Family) -> str:
        return whole_stack(family, type(self).__name__) if self.site is None else family.site(self.site).name

    def table(self, steps: int, sites: Sequence[str]) -> Actions:
        if len(self.similarity) != steps:
            raise FewstepError(
                f"StepRehash has a profile of {len(self.similarity)} steps, the run has {steps}; measure one with StepRehash.fit"
            )
        computed, kept = [], 0
        for step in range(steps):
            behind = step - kept - 1
            row = self.similarity[step]
            if step == 0 or behind >= len(row) or row[behind] < self.threshold:
                kept = step
            computed.append(kept == step)
        return steps_table(computed, len(sites))

    def describe(self) -> str:
        return f"StepRehash({self.threshold:g}" + (f", site={self.site!r})" if self.site else ")")

    @classmethod
    def fit(
        cls,
        pipe: Any,
        prompts: Sequence[str] | None = None,
        *,
        num_inference_steps: int,
        threshold: float = 0.95,
        site: str | None = None,
        reach: int = 8,
        samples: int = 4,
        **options: Any,
    ) -> StepRehash:
        """Step Rehash with the profile of a pipeline: cosines, averaged over samples and guidance's streams.

        Args:
            pipe: a diffusers pipeline; left as it was.
            prompts: drawn in turn.
            num_inference_steps: steps of the profile and of the plan.
            threshold, site: as of the class.
            reach: longest run of reused steps; as many values are held while it measures.
            samples: trajectories.
            options: ``guidance_scale``, ``seed``, ``batch``, ``call`` as of :func:`fewstep.caching.profile`.
        """
        method = cls(threshold, (), site)
        cosines: defaultdict[tuple[int, int], list[float]] = defaultdict(list)
        positions = [0]

        def begin() -> See:
            past: deque[Tensor] = deque(maxlen=reach)

            def see(sight: Sight) -> None:
                value = sight.value.flatten(1).float()
                for behind, earlier in enumerate(past):
                    cosines[sight.step, behind] += torch.nn.functional.cosine_similarity(value, earlier, dim=1).tolist()
                past.appendleft(value)
                positions[0] = max(positions[0], sight.step + 1)

            return see

        watch_runs(
            pipe,
            method._site,
            begin,
            prompts=prompts,
            samples=samples,
            num_inference_steps=num_inference_steps,
            **options,
        )
        table = [
            [float(np.mean(found)) if (found := cosines[step, behind]) else -1.0 for behind in range(reach)]
            for step in range(positions[0])
        ]
        return cls(threshold, tuple(map(tuple, table)), site)
