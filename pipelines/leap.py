"""Leap to the end: once a flow's direction does not change any more, one step takes the rest of the way."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fewstep.errors import FewstepError


@dataclass
class Leap:
    """A ``callback_on_step_end`` for pipelines on ``FlowMatchEulerDiscreteScheduler``.

    With v_i the (guided) velocity of step i and c_i = cos(v_i, v_{i-1}), the run ends at the first step i >= ``at_least``
    at which c has not risen by more than ``tolerance`` over its best for ``patience`` steps: x_0 = x_i - sigma_i v_i. In
    a batch the least cosine decides. Linear proportional leap of On-device Sora, arXiv 2502.04363, sec. 4.1.

    The velocity is that of consecutive latents, (x_{i+1} - x_i) / (sigma_{i+1} - sigma_i), so the scheduler must be Euler's.
    Latents of half precision round it; keep them in float32.

    Attributes:
        at_least: steps that are taken in any case; 14 of 30 in the paper.
        tolerance: 1e-3 there.
        patience: 3 there.
        leapt: the step after which the last run leapt; None where it did not.

    Example:
        >>> leap = pipelines.Leap(at_least=10)
        >>> image = pipe(prompt, num_inference_steps=28, callback_on_step_end=leap).images[0]
        >>> leap.leapt
    """

    at_least: int = 14
    tolerance: float = 1e-3
    patience: int = 3
    leapt: int | None = None
    _last: Tensor | None = field(default=None, repr=False)
    _velocity: Tensor | None = field(default=None, repr=False)
    _best: float = field(default=-1.0, repr=False)
    _stalled: int = field(default=0, repr=False)

    def __post_init__(self) -> None:
        if self.at_least < 1 or self.patience < 1 or self.tolerance < 0:
            raise FewstepError(
                f"at_least is {self.at_least}, patience {self.patience}, tolerance {self.tolerance}; give at least 1, 1 and 0"
            )

    def __call__(self, pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        latents: Tensor = kwargs["latents"]
        sigmas = _sigmas(pipe)
        if step == 0:
            self.leapt, self._last, self._velocity, self._best, self._stalled = None, None, None, -1.0, 0
        elif self._last is not None and self.leapt is None:
            velocity = (latents.double() - self._last.double()) / (sigmas[step + 1] - sigmas[step])
            if self._settled(velocity) and step + 1 >= self.at_least:
                self.leapt = step
                pipe._interrupt = True  # the pipeline passes over the steps that are left
                self._last = self._velocity = None
                return {"latents": (latents.double() - sigmas[step + 1] * velocity).to(latents.dtype)}
            self._velocity = velocity
        self._last = latents.clone()
        return {}

    def _settled(self, velocity: Tensor) -> bool:
        if self._velocity is None:
            return False
        similarity = torch.nn.functional.cosine_similarity(velocity.flatten(1), self._velocity.flatten(1), dim=1)
        cosine = float(similarity.min())
        self._stalled = 0 if cosine > self._best + self.tolerance else self._stalled + 1
        self._best = max(self._best, cosine)
        return self._stalled >= self.patience


def _sigmas(pipe: Any) -> list[float]:
    name = type(pipe.scheduler).__name__
    if name != "FlowMatchEulerDiscreteScheduler":
        raise FewstepError(f"Leap reads the velocity off Euler steps of a flow; the scheduler is {name}")
    if not hasattr(pipe, "interrupt"):
        raise FewstepError(f"{type(pipe).__name__} cannot be interrupted, so its remaining steps cannot be left out")
    sigmas: list[float] = pipe.scheduler.sigmas.tolist()
    return sigmas
