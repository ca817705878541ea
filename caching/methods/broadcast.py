"""Attention outputs broadcast to later steps: Pyramid Attention Broadcast, and FasterCache's reuse with momentum."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fewstep.caching.families import Family
from fewstep.caching.families.transformer import BRANCHES
from fewstep.caching.method import Method, check_interval
from fewstep.caching.methods.times import TimedMethod, Times
from fewstep.caching.plan import Actions
from fewstep.caching.predictors import Momentum, Predictor
from fewstep.errors import FewstepError, unknown

KINDS = ("spatial", "temporal", "cross")
MLP = "feed_forward"


@dataclass(frozen=True)
class PyramidBroadcast(TimedMethod):
    """Attention outputs are reused in the middle of the trajectory, each kind for as many steps as it bears.

    Attention changes most at both ends of the trajectory. In the window between, a kind with range n is computed at every
    n-th step. The output is taken before the block's gate, so the time still acts on it.
    Feed-forwards of the first blocks may rest too, a few steps long after each of some times. The authors' code knows these
    times only where they are timesteps of the run; here the nearest step stands for each.
    Real-Time Video Generation with Pyramid Attention Broadcast, arXiv 2408.12588.

    Attributes:
        spatial: range of self-attention and joint attention; 1 computes always.
        temporal: range of the attention between frames, where a model has it apart.
        cross: range of cross-attention.
        window: timesteps, exclusive, between which is reused.
        mlp_times: timesteps after which feed-forwards rest; none where left out.
        mlp_blocks: how many blocks at the front that concerns.
        mlp_rest: how many steps they rest.
    """

    spatial: int = 2
    temporal: int = 4
    cross: int = 6
    window: tuple[float, float] = (100, 800)
    mlp_times: tuple[float, ...] = ()
    mlp_blocks: int = 5
    mlp_rest: int = 2

    def __post_init__(self) -> None:
        object.__setattr__(self, "mlp_times", tuple(self.mlp_times))
        for name in (*KINDS, "mlp_blocks", "mlp_rest"):
            check_interval(getattr(self, name), name)
        if not all(0 <= time <= 1000 for time in self.mlp_times):
            raise FewstepError(f"mlp_times are {self.mlp_times}; give timesteps from 0 to 1000")
        if not 0 <= self.window[0] < self.window[1] <= 1000:
            raise FewstepError(f"window is {self.window}; give two timesteps from 0 to 1000, the smaller first")

    @classmethod
    def published(cls, name: str) -> PyramidBroadcast:
        """The authors' ranges and window for a model.

        Raises:
            FewstepError: for a model that they publish none for.
        """
        if name not in PUBLISHED:
            raise FewstepError(unknown("model", name, PUBLISHED))
        return cls(**PUBLISHED[name])

    def sites(self, family: Family) -> list[str]:
        found = [site for kind, sites in attentions(family).items() if getattr(self, kind) > 1 for site in sites]
        if self.mlp_times:
            found += [site for site in family.branches(MLP) if int(site.split(".")[1]) < self.mlp_blocks]
        if not found:
            raise FewstepError(f"{type(self).__name__} found no attention with a range above 1 in {family.name}")
        return found

    def table(self, steps: int, sites: Sequence[str]) -> Actions:
        times, index = self.times(steps), np.arange(steps)
        inside = (self.window[0] < times) & (times < self.window[1])
        resting = self._resting(times)
        columns = [
            resting if (kind := kind_of(site)) == MLP else inside & (index % getattr(self, kind) != 0) for site in sites
        ]
        return np.stack(columns, 1).astype(np.int8)

    def _resting(self, times: Times) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """(steps,) where feed-forwards rest: the steps after each of the times, but not those themselves."""
        begins = {int(np.abs(times - time).argmin()) for time in self.mlp_times}
        rests = {begin + i for begin in begins for i in range(1, self.mlp_rest + 1)} - begins
        return np.isin(np.arange(len(times)), sorted(rests))


PUBLISHED: dict[str, dict[str, Any]] = {
    "allegro": {
        "spatial": 2, "temporal": 4, "cross": 6, "window": (100, 850), "mlp_times": tuple(range(738, 425, -24)), "mlp_blocks": 7,
    },
    "cogvideox": {"spatial": 2, "temporal": 1, "cross": 1, "window": (100, 850)},
    "latte": {"spatial": 2, "temporal": 3, "cross": 6, "window": (100, 800), "mlp_times": (720, 640, 560, 480, 400)},
    "open-sora-1.2": {"spatial": 2, "temporal": 4, "cross": 6, "window": (450, 930), "mlp_times": (864, 788, 676)},
    "open-sora-plan-1.1": {"spatial": 2, "temporal": 4, "cross": 6, "window": (100, 850)},
    "vchitect": {"spatial": 2, "temporal": 4, "cross": 6, "window": (100, 800)},
}  # fmt: skip
"""By name what the authors' code uses."""


@dataclass(frozen=True)
class FasterCache(Method):
    """Attention outputs, computed every ``interval`` steps after the start and moved on along their last change in between.

    FasterCache: Training-Free Video Diffusion Model Acceleration with High Quality, arXiv 2410.19355, its dynamic feature
    reuse. Its other half, reuse of the unconditional branch, works on the guidance and is apart.

    Attributes:
        interval: 3 in the authors' CogVideoX script, 2 for Latte.
        start: share of the steps before reuse begins.
        weight: of the last change.
    """

    interval: int = 3
    start: float = 0.36
    weight: float = 0.3

    def __post_init__(self) -> None:
        check_interval(self.interval)
        if not 0 <= self.start <= 1:
            raise FewstepError(f"start is {self.start}; give a share of the steps from 0 to 1")

    @property
    def predictor(self) -> Predictor:
        return Momentum(self.weight)

    def sites(self, family: Family) -> list[str]:
        kinds = attentions(family)
        found = [*kinds["spatial"], *kinds["temporal"]]
        if not found:
            raise FewstepError(f"{type(self).__name__} reuses self-attention, and {family.name} has none")
        return found

    def table(self, steps: int, sites: Sequence[str]) -> Actions:
        index = np.arange(steps)
        reused = (index >= self.start * steps) & (index % self.interval != 0)
        return np.repeat(reused[:, None], len(sites), 1).astype(np.int8)


def attentions(family: Family) -> dict[str, list[str]]:
    """Paths of a model's attentions by kind."""
    own = family.branches("attention")
    own += [site.removesuffix("proj_out") + "attn" for site in family.branches("fused")]
    return {
        "spatial": [site for site in own if kind_of(site) == "spatial"],
        "temporal": [site for site in own if kind_of(site) == "temporal"],
        "cross": family.branches("cross_attention"),
    }


def kind_of(site: str) -> str:
    """Which kind an attention is of, or that it is a feed-forward, by its path."""
    if site.rsplit(".", 1)[-1] in BRANCHES[MLP]:
        return MLP
    if site.rsplit(".", 1)[-1] in ("attn2", "cross_attn"):
        return "cross"
    return "temporal" if site.startswith("temporal_") else "spatial"
