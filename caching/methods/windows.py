"""Windowed attention with the statistics, or the residual, of the last full attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fewstep.caching.actions import Action
from fewstep.caching.families import Family
from fewstep.caching.forms import form_name
from fewstep.caching.method import Method, check_interval
from fewstep.caching.methods.merging import video_layout
from fewstep.caching.plan import Actions
from fewstep.errors import FewstepError


@dataclass(frozen=True)
class ReAttention(Method):
    """Re-ttention: full attention at first and every ``interval`` steps, in between a window, reshaped by what was seen.

    See :class:`~fewstep.caching.forms.windowed.Windowed`. Ultra Sparse Visual Generation via Attention Statistical
    Reshape, arXiv 2505.22918; the defaults are its 20 steps of PixArt (window 3 % of 4096 tokens).
    Kept are rho (B, heads, N) and R (B, N, C) a layer. In CogVideoX and Wan the window is one of places in a frame, the
    same in every frame, and the text is always seen.

    Attributes:
        window: keys to either side of a query, by index (in its frame).
        interval: steps from one full attention to the next.
        warmup: steps at the start that are full.
        drift: added to rho a step.
        rescale: False leaves rho at 1: window attention with residual sharing, DiTFastAttn's WA-RS.
        flex: whether windows are computed by FlexAttention, which is a fused kernel on CUDA.
    """

    window: int = 64
    interval: int = 5
    warmup: int = 6
    drift: float = 0.04
    rescale: bool = True
    flex: bool = False

    def __post_init__(self) -> None:
        check_interval(self.interval)
        check_interval(self.warmup, "warmup")

    def sites(self, family: Family) -> list[str]:
        options = {"window": self.window, "rescale": int(self.rescale), "drift": self.drift, "outputs": 0}
        options |= video_options(family) | ({"flex": 1} if self.flex else {})
        return [
            family.site(form_name("window", path, **options)).name for path in self_attentions(family, "ReAttention")
        ]

    def table(self, steps: int, sites: Sequence[str]) -> Actions:
        full = [i < self.warmup or (i - self.warmup + 1) % self.interval == 0 for i in range(steps)]
        column = np.where(full, np.int8(Action.COMPUTE), np.int8(Action.SPARSE))
        return np.repeat(column[:, None], len(sites), 1).astype(np.int8)


def video_options(family: Family) -> dict[str, int]:
    """Options of windowed sites that say where a video's frames are; none for other models."""
    video = video_layout(family)
    return {} if video is None else dict(zip(("axis", "frames", "patch"), video, strict=True))


def self_attentions(family: Family, method: str) -> list[str]:
    """Paths of a model's attentions of its tokens to each other, in order.

    Raises:
        FewstepError: where there is none.
    """
    found = [path for path in family.branches("attention") if path.endswith("attn1")]
    if not found:
        raise FewstepError(f"{method} needs self-attention (attn1), which {family.name} has not")
    return found
