"""Token merging: attention among fewer tokens, of images (ToMe) or of neighbouring frames (TDTM)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fewstep.caching.actions import Action
from fewstep.caching.families import Family
from fewstep.caching.families.unet import UNetFamily
from fewstep.caching.forms import form_name
from fewstep.caching.method import Method
from fewstep.caching.plan import Actions
from fewstep.errors import FewstepError


@dataclass(frozen=True)
class TokenMerging(Method):
    """ToMe: ``ratio`` of the tokens are merged into their most similar neighbours around each self-attention.

    Token Merging for Fast Stable Diffusion, arXiv 2303.17604. See :class:`~fewstep.caching.forms.token_merging.MergedTokens`.
    Pays at high resolution: the matching costs (N^2 / 4) (1 - 1 / 4) C products of its own.

    Attributes:
        ratio: share of the tokens, at most 0.75.
        max_downsample: of a UNet only layers whose maps are downsampled at most this often are merged: 1, 2, 4 or 8.
        start, stop: shares of the trajectory between which tokens are merged.
        seed: of the draw of destinations.
    """

    ratio: float = 0.5
    max_downsample: int = 1
    start: float = 0.0
    stop: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.ratio <= 0.75:
            raise FewstepError(f"ratio is {self.ratio}; give a share of the tokens from 0 to 0.75")
        _check_window(self.start, self.stop)

    def sites(self, family: Family) -> list[str]:
        refuse_rotary(family, "TokenMerging")
        paths = [path for path in family.branches("attention") if path.endswith("attn1")]
        if isinstance(family, UNetFamily):
            paths = [path for path in paths if downsampled(family, path) <= self.max_downsample]
        if not paths:
            raise FewstepError(
                f"TokenMerging found no self-attention (attn1) in {family.name} that is downsampled "
                f"{self.max_downsample} times or less"
            )
        return [family.site(form_name("merge", path, ratio=self.ratio, seed=self.seed)).name for path in paths]

    def table(self, steps: int, sites: Sequence[str]) -> Actions:
        return _sparse_between(self.start, self.stop, steps, len(sites))


@dataclass(frozen=True)
class FrameMerging(Method):
    """TDTM: neighbouring frames are averaged for attention, in the first share of the steps.

    On-device Sora: Enabling Training-Free Diffusion-based Text-to-Video Generation for Mobile Devices, arXiv 2502.04363.
    See :class:`~fewstep.caching.forms.frame_merging.MergedFrames`. Late in the trajectory it blurs motion.

    Attributes:
        stop: share of the trajectory in which frames are merged.
    """

    stop: float = 0.5

    def __post_init__(self) -> None:
        _check_window(0.0, self.stop)

    def sites(self, family: Family) -> list[str]:
        options = frame_options(family)
        paths = [path for kind in ("attention", "cross_attention") for path in family.branches(kind)]
        return [family.site(form_name("frames", path, **options)).name for path in paths]

    def table(self, steps: int, sites: Sequence[str]) -> Actions:
        return _sparse_between(0.0, self.stop, steps, len(sites))


def refuse_rotary(family: Family, method: str) -> None:
    """Raises FewstepError where positions are rotary, so that they belong to tokens and cannot be merged."""
    config = getattr(family.model, "config", {})
    position = type(getattr(family.model, "pos_embed", None)).__name__.lower()
    if (
        hasattr(family.model, "rope")
        or "flux" in position
        or "rope" in position
        or config.get("use_rotary_positional_embeddings")
        or config.get("axes_dims_rope")
    ):
        raise FewstepError(
            f"{method} cannot merge tokens of {family.name}: it has rotary positions, which belong to tokens"
        )


def frame_options(family: Family) -> dict[str, int]:
    """Where the frames of a video transformer's sample are.

    Raises:
        FewstepError: for other models.
    """
    video = video_layout(family)
    if video is None:
        raise FewstepError(f"FrameMerging serves CogVideoX and Wan transformers, the model is {family.name}")
    axis, frames, _ = video
    return {"axis": axis, "patch": frames}


def video_layout(family: Family) -> tuple[int, int, int] | None:
    """Axis of the frames in a video transformer's sample, frames to a token, and side of a patch; None for other models."""
    config = getattr(family.model, "config", {})
    if family.name.startswith("CogVideoX"):
        return 1, config.get("patch_size_t") or 1, config["patch_size"]
    if family.name.startswith("Wan"):
        return 2, config["patch_size"][0], config["patch_size"][1]
    return None


def downsampled(family: UNetFamily, path: str) -> int:
    """How many times smaller than the sample the maps of a UNet's layer are, along a side."""
    levels = len(family.model.down_blocks)  # type: ignore[arg-type]
    part, _, rest = path.partition(".")
    level = {"down_blocks": 0, "up_blocks": levels - 1}.get(part, levels - 1)
    number = int(rest.split(".", 1)[0]) if part in ("down_blocks", "up_blocks") else 0
    return int(2 ** (level - number if part == "up_blocks" else level + number))


def _sparse_between(start: float, stop: float, steps: int, sites: int) -> Actions:
    where = np.arange(steps) / steps
    column = np.where((start <= where) & (where < stop), np.int8(Action.SPARSE), np.int8(Action.COMPUTE))
    return np.repeat(column[:, None], sites, 1).astype(np.int8)


def _check_window(start: float, stop: float) -> None:
    if not 0 <= start < stop <= 1:
        raise FewstepError(f"the window is {start} to {stop}; give shares with 0 <= start < stop <= 1")
