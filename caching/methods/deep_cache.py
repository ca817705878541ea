"""DeepCache: only the outermost layers of a UNet run at every step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fewstep.caching.families import Family
from fewstep.caching.families.unet import UNetFamily
from fewstep.caching.method import Method, check_interval, steps_table
from fewstep.caching.methods.interval import every
from fewstep.caching.plan import Actions
from fewstep.errors import FewstepError


@dataclass(frozen=True)
class DeepCache(Method):
    """The feature that enters the outermost ``branch + 1`` decoder layers is reused; the sample itself still enters.

    DeepCache: Accelerating Diffusion Models for Free, arXiv 2312.00858. Full steps are every ``interval``-th, or with
    ``center`` and ``power`` the paper's non-uniform ones, which are denser around ``center``: x = linspace((-c)^(1/p),
    (T - c)^(1/p), n + 1)^p + c with signed powers, n = ceil(T / interval).

    Attributes:
        interval: steps from one computed in full to the next, on average where non-uniform.
        branch: how deep the cut is: 0 keeps one encoder skip and one decoder layer live, and is cheapest.
        center: step around which full steps are dense; None for uniform ones.
        power: how dense, more than 1.
    """

    knob = "interval"
    interval: int = 3
    branch: int = 0
    center: float | None = None
    power: float = 1.4

    def __post_init__(self) -> None:
        check_interval(self.interval)
        if not isinstance(self.branch, int) or self.branch < 0:
            raise FewstepError(f"branch is {self.branch!r}; give a whole number, 0 for the outermost")
        if self.power < 1:
            raise FewstepError(f"power is {self.power}; give 1 (uniform) or more")

    def sites(self, family: Family) -> list[str]:
        if not isinstance(family, UNetFamily):
            raise FewstepError(
                f"DeepCache needs a UNet with skips, the model is {family.name}; FORA or Interval serve others"
            )
        return [family.site(f"branch.{self.branch}").name]

    def table(self, steps: int, sites: Sequence[str]) -> Actions:
        if self.center is None:
            return steps_table(every(steps, self.interval), 1)
        full = non_uniform(steps, self.interval, self.center, self.power)
        return steps_table([i in full for i in range(steps)], 1)


def non_uniform(steps: int, interval: int, center: float, power: float) -> set[int]:
    """The full steps around a centre; centre and power shrink by 0.02 until enough of them are distinct.

    Raises:
        FewstepError: where that does not help.
    """
    count = -(-steps // interval)
    while power >= 1:
        first, last = (float(np.sign(v)) * abs(v) ** (1 / power) for v in (-center, steps - center))
        line = np.linspace(first, last, count + 1)
        x = np.sign(line) * np.abs(line) ** power + center
        found = {int(v) for v in np.round(x[:-1]) if 0 <= v < steps}
        if len(found) == count:
            return found | {0}
        center, power = center - 0.02, power - 0.02
    raise FewstepError(
        f"no {count} distinct full steps among {steps} around center; use a larger interval or a smaller power"
    )
