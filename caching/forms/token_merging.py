"""Merged tokens: attention among fewer tokens, the most similar of which stand for each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fewstep.caching.actions import Action
from fewstep.caching.roles import Forward, Moment, Role, first_tensor
from fewstep.errors import FewstepError

CELL = 2
"""Side of the squares of tokens in which one is a destination."""


@dataclass(frozen=True)
class MergedTokens(Role):
    """Self-attention over merged tokens; what it returns is copied back to those that were merged.

    In every 2 x 2 square of the token grid one token, drawn at random, is a destination, the others are sources. The
    ``ratio`` N sources that are most similar (cosine) to their nearest destination are averaged into it; attention runs on
    the rest. Token Merging for Fast Stable Diffusion, arXiv 2303.17604, sec. 4.

    The draw has a generator of its own and is one for the batch, so rows do not depend on each other, nor on the global
    state, and both halves of guidance get the same.

    Attributes:
        ratio: share of all tokens to merge, at most 0.75.
        seed: of the draw, which is another one at every step.
    """

    ratio: float = 0.5
    seed: int = 0
    reads: ClassVar[tuple[Action, ...]] = (Action.REUSE,)

    def __post_init__(self) -> None:
        if not 0 <= self.ratio <= 1 - CELL**-2:
            raise FewstepError(f"ratio is {self.ratio}; give a share of the tokens from 0 to {1 - CELL**-2}")

    def compute(self, at: Moment, forward: Forward, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        return forward(*args, **kwargs)

    def reuse(self, at: Moment, forward: Forward, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        raise FewstepError(f"site {at.cell.site!r} is computed or sparse; reuse site {self.path!r} itself")

    def sparse(self, at: Moment, forward: Forward, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        x = first_tensor(args, kwargs)
        if rotary := [n for n, v in kwargs.items() if "rotary" in n and v is not None]:
            raise FewstepError(f"{self.path} takes {rotary[0]}: positions that merged tokens have not")
        if x.ndim != 3:
            raise FewstepError(f"{self.path} was called with shape {tuple(x.shape)}; merging needs tokens (B, N, C)")
        if any(isinstance(v, Tensor) for v in args[1:]) or any(
            kwargs.get(name) is not None for name in ("encoder_hidden_states", "attention_mask")
        ):
            raise FewstepError(f"{self.path} attends to other tokens or under a mask; only plain self-attention merges")
        merge = matching(x, *token_grid(at.scene.sample, x.shape[1]), self.ratio, self.seed + at.step)
        merged = merge.down(x)
        rest = ([merged, *args[1:]], kwargs) if args else (args, {**kwargs, next(iter(kwargs)): merged})
        return merge.up(forward(*rest[0], **rest[1]))


@dataclass(frozen=True)
class Merging:
    """Which tokens become which.

    Attributes:
        order: (B, N) all tokens: first those that are merged, then the others, destinations last.
        into: (B, r) for each of the merged ones the index of its destination among the kept.
    """

    order: Tensor
    into: Tensor

    def down(self, x: Tensor) -> Tensor:
        """(B, N, C) to (B, N - r, C): destinations are means of themselves and what is merged into them."""
        r = self.into.shape[1]
        x = torch.take_along_dim(x, self.order[..., None], 1)
        index = self.into[..., None].expand(-1, -1, x.shape[2])
        return x[:, r:].scatter_reduce(1, index, x[:, :r], "mean", include_self=True)

    def up(self, y: Tensor) -> Tensor:
        """(B, N - r, C) to (B, N, C): every token gets the value of what it became."""
        all_ = torch.cat([torch.take_along_dim(y, self.into[..., None], 1), y], 1)
        return torch.empty_like(all_).scatter_(1, self.order[..., None].expand_as(all_), all_)


def matching(x: Tensor, height: int, width: int, ratio: float, seed: int) -> Merging:
    """Bipartite soft matching of tokens on a grid.

    Args:
        x: (B, height * width, C) what similarity is measured on.
        ratio: share of the tokens to merge.
        seed: of the choice of destinations.
    """
    batch, count, _ = x.shape
    # tokens beyond the last whole square are sources
    rows, columns = height // CELL, width // CELL
    if not rows or not columns:
        return Merging(torch.arange(count, device=x.device).expand(batch, -1), x.new_zeros(batch, 0, dtype=torch.int64))
    choice = _draw((rows, columns), x.device, seed)
    y = torch.arange(rows, device=x.device)[:, None] * CELL + choice // CELL
    z = torch.arange(columns, device=x.device) * CELL + choice % CELL
    destinations = (y * width + z).flatten()
    marks = torch.zeros(count, dtype=torch.int64, device=x.device).index_fill(0, destinations, 1)
    positions = marks.argsort(stable=True)  # sources, then destinations, each in reading order
    sources = count - rows * columns
    r = min(sources, int(count * ratio))
    unit = torch.nn.functional.normalize(x.float(), dim=-1)[:, positions]
    similarity, nearest = (unit[:, :sources] @ unit[:, sources:].mT).max(-1)
    ranked = similarity.argsort(dim=-1, descending=True, stable=True)
    order = torch.cat([positions[ranked], positions[sources:].expand(batch, -1)], 1)
    into = nearest.gather(1, ranked[:, :r]) + (sources - r)
    return Merging(order, into)


def token_grid(sample: Any, tokens: int) -> tuple[int, int]:
    """Height and width of the token grid of a module that sees ``tokens`` of a sample (B, C, H, W), however downsampled.

    Raises:
        FewstepError: where no whole factor fits, as with tokens of a text among them.
    """
    if sample.ndim == 4:
        height, width = sample.shape[-2:]
        for factor in range(1, max(height, width) + 1):
            grid = -(-height // factor), -(-width // factor)
            if grid[0] * grid[1] == tokens:
                return grid
    raise FewstepError(f"{tokens} tokens are no grid of a sample of shape {tuple(sample.shape)}")


def _draw(shape: tuple[int, int], device: torch.device, seed: int) -> Tensor:
    if device.type == "meta":
        return torch.zeros(shape, dtype=torch.int64, device=device)
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randint(CELL**2, shape, device=device, generator=generator)
