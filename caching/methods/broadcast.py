"""Attention outputs broadcast to later steps: Pyramid Attention Broadcast, and FasterCache's reuse with momentum."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fewstep.caching.families import Family
from fewstep.caching.method import Method, check_interval
from fewstep.caching.methods.times import TimedMethod
from fewstep.caching.plan import Actions
from fewstep.caching.predictors import Momentum, Predictor
from fewstep.errors import FewstepError, unknown

KINDS = ("spatial", "temporal", "cross")


@dataclass(frozen=True)
class PyramidBroadcast(TimedMethod):
    """Attention outputs are reused in the middle of the trajectory, each kind for as many steps as it bears.

    Attention changes most at both ends of the trajectory. In the window between, a kind with range n is computed at every
    n-th step. The output is taken before the block's gate, so the time still acts on it.
    Real-Time Video Generation with Pyramid Attention Broadcast, arXiv 2408.12588. Its skipped feed-forwards of single blocks
    are left out.

    Attributes:
        spatial: range of self-attention and joint attention; 1 computes always.
        temporal: range of the attention between frames, where a model has it apart.
        cross: range of cross-attention.
        window: timesteps, exclusive, between which is reused.
    """

    spatial: int = 2
    temporal: int = 4
    cross: int = 6
    window: tuple[float, float] = (100, 800)

    def __post_init__(self) -> None:
        for name in KINDS:
            check_interval(getattr(self, name), name)
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
        if not found:
            raise FewstepError(f"{type(self).__name__} found no attention with a range above 1 in {family.name}")
        return found

    def table(self, steps: int, sites: Sequence[str]) -> Actions:
        times, index = self.times(steps), np.arange(steps)
        inside = (self.window[0] < times) & (times < self.window[1])
        columns = [inside & (index % getattr(self, kind_of(site)) != 0) for site in sites]
        return np.stack(columns, 1).astype(np.int8)


PUBLISHED: dict[str, dict[str, Any]] = {
    "cogvideox": {"spatial": 2, "temporal": 1, "cross": 1, "window": (100, 850)},
    "latte": {"spatial": 2, "temporal": 3, "cross": 6, "window": (100, 800)},
    "open-sora-1.2": {"spatial": 2, "temporal": 4, "cross": 6, "window": (450, 930)},
    "open-sora-plan-1.1": {"spatial": 2, "temporal": 4, "cross": 6, "window": (100, 850)},
    "vchitect": {"spatial": 2, "temporal": 4, "cross": 6, "window": (100, 800)},
}
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
    """Which kind an attention is of, by its path."""
    if site.rsplit(".", 1)[-1] in ("attn2", "cross_attn"):
        return "cross"
    return "temporal" if site.startswith("temporal_") else "spatial"
