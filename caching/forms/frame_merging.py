"""Merged frames: attention of a video transformer over pairs of neighbouring frames, averaged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fewstep.caching.actions import Action
from fewstep.caching.roles import Forward, Moment, Role, first_tensor
from fewstep.errors import FewstepError


@dataclass(frozen=True)
class MergedFrames(Role):
    """Tokens of frames 2k and 2k + 1 are averaged for attention; what it returns is given to both.

    The positions of a pair are those of its first frame. A frame that has no partner stays alone. Temporal dimension token
    merging of On-device Sora, arXiv 2502.04363.

    Attributes:
        axis: of the frames in the sample: 2 of (B, C, F, H, W), 1 of (B, F, C, H, W).
        patch: frames to a token.
    """

    axis: int = 2
    patch: int = 1
    reads: ClassVar[tuple[Action, ...]] = (Action.REUSE,)

    def compute(self, at: Moment, forward: Forward, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        return forward(*args, **kwargs)

    def reuse(self, at: Moment, forward: Forward, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        raise FewstepError(f"site {at.cell.site!r} is computed or sparse; reuse site {self.path!r} itself")

    def sparse(self, at: Moment, forward: Forward, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        x = first_tensor(args, kwargs)
        frames = -(-at.scene.sample.shape[self.axis] // self.patch)
        if x.ndim != 3 or x.shape[1] % frames:
            raise FewstepError(f"{self.path} was called with shape {tuple(x.shape)}: no tokens of {frames} frames")
        merged = average_pairs(x, frames)
        tokens = x.shape[1]
        changed_args = [self._positions(v, frames, tokens) for v in args]
        changed = {k: self._positions(v, frames, tokens) if "rotary" in k else v for k, v in kwargs.items()}
        if args:
            changed_args[0] = merged
        else:
            changed[next(iter(kwargs))] = merged
        out = forward(*changed_args, **changed)
        if isinstance(out, tuple):  # joint attention: the video's tokens, then the text's
            return (repeat_pairs(out[0], frames), *out[1:])
        return repeat_pairs(out, frames)

    def _positions(self, value: Any, frames: int, tokens: int) -> Any:
        """Rotary tables for the first frame of each pair."""
        if not isinstance(value, tuple):
            return value
        return tuple(_first_of_pairs(table, frames, tokens) for table in value)


def average_pairs(x: Tensor, frames: int) -> Tensor:
    """(B, F n, C) to (B, ceil(F / 2) n, C)."""
    batch, tokens, width = x.shape
    paired = frames // 2 * 2 * (tokens // frames)
    pairs = x[:, :paired].reshape(batch, frames // 2, 2, tokens // frames, width)
    return torch.cat([pairs.mean(2).flatten(1, 2), x[:, paired:]], 1)


def repeat_pairs(y: Tensor, frames: int) -> Tensor:
    """(B, ceil(F / 2) n, C) to (B, F n, C)."""
    batch, tokens, width = y.shape
    half = -(-frames // 2)
    return y.reshape(batch, half, tokens // half, width).repeat_interleave(2, 1)[:, :frames].flatten(1, 2)


def _first_of_pairs(table: Any, frames: int, tokens: int) -> Any:
    if not isinstance(table, Tensor) or tokens not in table.shape:
        return table
    axis = table.shape.index(tokens)
    first = torch.arange(tokens, device=table.device).reshape(frames, -1)[::2].flatten()
    return table.index_select(axis, first)
