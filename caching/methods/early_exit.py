"""Time-dependent early exit: at noisy times the last blocks are left out."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from fewstep.caching.actions import Action
from fewstep.caching.families import Family
from fewstep.caching.method import check_interval
from fewstep.caching.methods.online import transformer
from fewstep.caching.methods.times import TimedMethod
from fewstep.caching.plan import Actions
from fewstep.errors import FewstepError

RELEASED = tuple(depth / 28 for depth in (28, 28, 24, 24, 20, 20, 16, 16, 12, 12))
"""The authors' table for DiT-XL/2: blocks of 28 in ten equal bins of the time, clean to noisy."""
_BEGIN = re.compile(r"blocks\[(\d+):(\d+)\]")


@dataclass(frozen=True)
class EarlyExit(TimedMethod):
    """The last blocks are skipped, the more of them the noisier the sample.

    The released weights were fine-tuned to it; on other ones a plain exit reads features that the head was not trained on.
    ``refresh`` is the form that needs no training: the skipped blocks' residual from the last step at which they ran is
    added in their place. A Simple Early Exiting Framework for Accelerated Sampling in Diffusion Models, arXiv 2408.05927.

    Attributes:
        depths: shares of the blocks that run, in equal bins of the time from clean to noisy.
        refresh: every how many steps all blocks run, so that their residual can stand for them; None never, they are
            skipped.
    """

    depths: tuple[float, ...] = RELEASED
    refresh: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "depths", tuple(map(float, self.depths)))
        if not self.depths or not all(0 < depth <= 1 for depth in self.depths):
            raise FewstepError(f"depths are {self.depths}; give shares of the blocks, above 0 and at most 1")
        if self.refresh is not None:
            check_interval(self.refresh, "refresh")

    def sites(self, family: Family) -> list[str]:
        count = len(transformer(family, type(self).__name__, "DeepCache leaves out a UNet's deep layers").paths)
        ends = sorted({self._exit(depth, count) for depth in self.depths} | {count})
        if len(ends) == 1:
            ends = [count - 1, count] if count > 1 else [0, 1]
        return [family.site(f"blocks[{a}:{b}]").name for a, b in pairwise(ends)]

    def table(self, steps: int, sites: Sequence[str]) -> Actions:
        ranges = [tuple(map(int, match.groups())) for match in map(_BEGIN.fullmatch, sites) if match]
        count = max(end for _, end in ranges)
        bins = np.clip((self.times(steps) / 1000 * len(self.depths)).astype(int), 0, len(self.depths) - 1)
        exits = np.array([self._exit(self.depths[b], count) for b in bins])
        out = exits[:, None] <= np.array([begin for begin, _ in ranges])
        if self.refresh is None:
            return np.where(out, np.int8(Action.SKIP), np.int8(Action.COMPUTE))
        out &= (np.arange(steps) % self.refresh != 0)[:, None]
        return np.where(out, np.int8(Action.REUSE), np.int8(Action.COMPUTE))

    @staticmethod
    def _exit(depth: float, count: int) -> int:
        return min(max(round(depth * count), 1), count)
