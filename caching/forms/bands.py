"""Attention within a band: every query sees the keys at most ``window`` positions away.

Queries go in blocks; a block sees one run of keys, and a small mask cuts the band out of it. So the cost falls with the
window, in plain tensors on any device, and the logarithm of the softmax's denominator is at hand. On CUDA a fused kernel
with a block mask is faster: this is the reference.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def banded(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """softmax over |i - j| <= window.

    Args:
        q, k, v: (B, heads, N, D).
        window: positions to either side.
        scale: of the scores; 1 / sqrt(D) where left out.

    Returns:
        the output (B, heads, N, D) in v's dtype, and the log-sum-exp of the scores in the band,
        (B, heads, N) in float32 or better.
    """
    count, scale = q.shape[2], 1 / math.sqrt(q.shape[3]) if scale is None else scale
    window = min(window, count - 1)
    block = max(16, min(window, count))
    blocks = -(-count // block)
    pad = blocks * block - count
    qb = torch.nn.functional.pad(q, (0, 0, 0, pad)).reshape(*q.shape[:2], blocks, block, -1)
    kb, vb = (
        torch.nn.functional.pad(t, (0, 0, window, window + pad)).unfold(2, block + 2 * window, block) for t in (k, v)
    )  # (B, heads, blocks, D, keys)
    scores = _wide(qb @ kb) * scale
    # key number m of block b is at position b * block - window + m, query number n at b * block + n
    offset = torch.arange(block + 2 * window, device=q.device) - window
    near = (offset - torch.arange(block, device=q.device)[:, None]).abs() <= window
    where = torch.arange(blocks, device=q.device)[:, None] * block + offset
    seen = near & ((where >= 0) & (where < count))[:, None]
    # rows of padded queries may see nothing; a finite number keeps their softmax defined
    scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
    out = (scores.softmax(-1).to(v.dtype) @ vb.mT).flatten(2, 3)[:, :, :count]
    return out, scores.logsumexp(-1).flatten(2, 3)[:, :, :count]


def full_logsumexp(q: Tensor, k: Tensor, scale: float | None = None, block: int = 1024) -> Tensor:
    """log-sum-exp of all scores, (B, heads, N) in float32 or better, in blocks of queries so that memory stays linear."""
    scale = 1 / math.sqrt(q.shape[3]) if scale is None else scale
    return torch.cat([(_wide(part @ k.mT) * scale).logsumexp(-1) for part in torch.split(q, block, 2)], 2)


def _wide(scores: Tensor) -> Tensor:
    return scores.to(torch.promote_types(scores.dtype, torch.float32))
