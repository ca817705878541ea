"""Attention within a band by FlexAttention: one fused kernel over the blocks of the band, with its denominator.

On CUDA it is compiled; elsewhere torch computes all scores and masks them, which is right and saves nothing.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask, flex_attention

from fewstep.caching.forms.bands import PLAIN, Tokens


def flexed(
    q: Tensor, k: Tensor, v: Tensor, window: int, scale: float | None = None, tokens: Tokens = PLAIN
) -> tuple[Tensor, Tensor]:
    """What :func:`~fewstep.caching.forms.bands.banded` computes, to the kernel's rounding."""
    mask = _mask(q.shape[2], window, tokens, q.device)
    attend = _compiled() if q.is_cuda else flex_attention
    made: tuple[Tensor, Any] = attend(q, k, v, block_mask=mask, scale=scale, return_aux=AuxRequest(lse=True))
    return made[0], made[1].lse


@lru_cache(maxsize=8)
def _mask(count: int, window: int, tokens: Tokens, device: torch.device) -> BlockMask:
    begin = tokens.prefix
    places = (count - begin) // tokens.frames

    def seen(batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        near = ((i - begin) % places - (j - begin) % places).abs() <= window
        return (i < begin) | (j < begin) | near

    return create_block_mask(seen, None, None, count, count, device=device)


@lru_cache(maxsize=1)
def _compiled() -> Any:
    return torch.compile(flex_attention, dynamic=False)
