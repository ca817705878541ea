"""Timesteps for methods that publish windows and bins of the training time, 0 (clean) to 1000 (noise)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np

from fewstep.caching.method import Method
from fewstep.errors import FewstepError

Times = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class TimedMethod(Method):
    """Base of methods whose plan depends on the timesteps.

    Attributes:
        timesteps: of the run, 0 to 1000, one a step. None takes those of the pipeline's scheduler, and evenly spaced ones
            where a plan is compiled without a pipeline.
    """

    timed: ClassVar[bool] = True
    timesteps: tuple[float, ...] | None = field(default=None, kw_only=True)

    def at_times(self, times: Sequence[float] | None) -> TimedMethod:
        if times is None or self.timesteps is not None:
            return self
        return replace(self, timesteps=tuple(times))

    def describe(self) -> str:
        return Method.describe(replace(self, timesteps=None))

    def times(self, steps: int) -> Times:
        """(steps,): the timesteps.

        Raises:
            FewstepError: where other ones were given.
        """
        if self.timesteps is None:
            return 999 - np.arange(steps, dtype=np.float64) * (1000 / steps)
        if len(self.timesteps) != steps:
            raise FewstepError(f"{len(self.timesteps)} timesteps are given for {steps} steps; give one a step")
        return np.array(self.timesteps, dtype=np.float64)
