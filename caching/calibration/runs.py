"""Runs of a pipeline for calibration: the same prompts and seeds again and again, of which only the latents matter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fewstep.caching.method import check_count
from fewstep.errors import FewstepError


@dataclass(frozen=True)
class Runs:
    """Samples of a pipeline.

    Attributes:
        pipe: the pipeline.
        prompts: one a seed.
        seeds: one a sample.
        steps: ``num_inference_steps``.
        guidance: classifier-free guidance scale.
        batch: samples drawn at once.
        call: further arguments of the pipeline.
        positions: calls of the network along a trajectory; ``steps``, or what :meth:`followed` saw.
        first: position of the first call, above 0 where ``call`` begins in the middle (image to image).
    """

    pipe: Any
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    steps: int
    guidance: float
    batch: int = 8
    call: Mapping[str, Any] = field(default_factory=dict)
    positions: int = 0
    first: int = 0

    def __post_init__(self) -> None:
        if not self.positions:
            object.__setattr__(self, "positions", self.steps)

    @classmethod
    def of(
        cls,
        pipe: Any,
        prompts: Sequence[str] | None,
        count: int,
        steps: int,
        guidance: float,
        seed: int = 0,
        batch: int = 8,
        call: Mapping[str, Any] | None = None,
    ) -> Runs:
        """``count`` samples with seeds from ``seed`` on, prompts in turn.

        Raises:
            FewstepError: where the pipeline needs prompts and none are given.
        """
        from fewstep.eval.drawing.calling import family

        given = [prompts] if isinstance(prompts, str) else list(prompts or ())
        if not given and family(type(pipe)) != "unconditional":
            raise FewstepError(f"{type(pipe).__name__} needs prompts to be calibrated on")
        for name, value in (("num_inference_steps", steps), ("samples", count), ("batch", batch)):
            check_count(value, name)
        steps = int(steps)  # numpy's would not go into a plan's file
        given = given or [""]
        return cls(
            pipe=pipe,
            prompts=tuple(given[i % len(given)] for i in range(count)),
            seeds=tuple(range(seed, seed + count)),
            steps=steps,
            guidance=guidance,
            batch=batch,
            call=dict(call or {}),
        )

    def followed(self) -> Runs:
        """The same, with the positions that a run of the first batch comes by.

        Raises:
            FewstepError: where the pipeline does not call its network.
        """
        from fewstep.caching.calibration.recording import Recording
        from fewstep.caching.controller import applied

        with applied(self.pipe, Recording(at=("output",))) as controller:
            self.batch_latents(0)
        seen = {step for step, _, _ in controller.caches[0].log}
        if not seen:
            raise FewstepError(f"{type(self.pipe).__name__} did not call its network in {self.steps} steps")
        return replace(self, positions=1 + max(seen), first=min(seen))

    def __len__(self) -> int:
        return len(self.seeds)

    def split(self, held_out: int) -> tuple[Runs, Runs]:
        """All but the last ``held_out`` samples, and those."""
        cut = len(self) - held_out
        if not 0 < cut < len(self):
            raise FewstepError(
                f"{held_out} of {len(self)} samples cannot be held out; leave at least one for each part"
            )
        return self._some(slice(0, cut)), self._some(slice(cut, None))

    def _some(self, part: slice) -> Runs:
        return replace(self, prompts=self.prompts[part], seeds=self.seeds[part])

    @torch.no_grad()
    def latents(self) -> Tensor:
        """The latents that the pipeline ends with as it is now, float32 on the CPU, (samples, ...)."""
        return torch.cat([self.batch_latents(i) for i in range(0, len(self), self.batch)])

    def uncached(self) -> Tensor:
        """:meth:`latents` as what others are held against.

        Raises:
            FewstepError: where they are not finite.
        """
        latents: Tensor = self.latents()
        if not bool(latents.isfinite().all()):
            raise FewstepError(f"{type(self.pipe).__name__} ends with latents that are not finite; run it in float32")
        return latents

    @torch.no_grad()
    def batch_latents(self, begin: int) -> Tensor:
        """Those of the samples from ``begin`` on, one batch."""
        from fewstep.eval.drawing.calling import request
        from fewstep.eval.pairs.latents import capture_latents

        part = slice(begin, min(begin + self.batch, len(self)))
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in self.seeds[part]]
        arguments = request(
            self.pipe, self.prompts[part], generators, steps=self.steps, guidance=self.guidance,
            call={"output_type": "latent", **self.call},
        )  # fmt: skip
        with capture_latents(self.pipe) as captured, torch.random.fork_rng():
            torch.manual_seed(self.seeds[begin])  # for schedulers that are given no generator
            self.pipe(**arguments)
        return captured.latents(len(generators))

    @torch.no_grad()
    def images(self) -> Tensor:
        """The pictures, uint8 (samples, C, H, W)."""
        from fewstep.eval.drawing.batch import draw

        parts = [slice(i, i + self.batch) for i in range(0, len(self), self.batch)]
        return torch.cat([
            draw(self.pipe, self.prompts[p], self.seeds[p], steps=self.steps, guidance=self.guidance, call=self.call)
            for p in parts
        ])  # fmt: skip
