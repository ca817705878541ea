"""Attention within a band: every query sees the keys at most ``window`` positions away.

Queries go in blocks; a block sees one run of keys, and a small mask cuts the band out of it. So the cost falls with the
window, in plain tensors on any device, and the logarithm of the softmax's denominator is at hand. On CUDA a fused kernel
with a block mask is faster: this is the reference.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tokens:
    """What a sequence is made of: ``prefix`` tokens of text, then ``frames`` frames of equal size, one after the other.

    The position of a token is its place in its frame, so a window is the same in all frames. Text sees everything, and
    everything sees it.
    """

    prefix: int = 0
    frames: int = 1


PLAIN = Tokens()
"""One image, or any sequence by its index."""


def banded(
    q: Tensor, k: Tensor, v: Tensor, window: int, scale: float | None = None, tokens: Tokens = PLAIN
) -> tuple[Tensor, Tensor]:
    """softmax over |i - j| <= window.

    Args:
        q, k, v: (B, heads, N, D).
        window: positions to either side.
        scale: of the scores; 1 / sqrt(D) where left out.
        tokens: what the N tokens are.

    Returns:
        the output (B, heads, N, D) in v's dtype, and the log-sum-exp of the scores in the band,
        (B, heads, N) in float32 or better.
    """
    scale = 1 / math.sqrt(q.shape[3]) if scale is None else scale
    begin, frames = tokens.prefix, tokens.frames
    count = (q.shape[2] - begin) // frames
    window = min(window, count - 1)
    block = max(16, min(window, count))
    blocks = -(-count // block)
    run = block + 2 * window
    end = blocks * block - count
    qb = _runs(q[:, :, begin:], frames, 0, end, block, block)
    kb, vb = (_runs(t[:, :, begin:], frames, window, window + end, run, block) for t in (k, v))
    scores = _wide(qb @ kb.mT) * scale
    # key number m of block b is at position b * block - window + m, query number n at b * block + n
    offset = torch.arange(run, device=q.device) - window
    near = (offset - torch.arange(block, device=q.device)[:, None]).abs() <= window
    where = torch.arange(blocks, device=q.device)[:, None] * block + offset
    seen = (near & ((where >= 0) & (where < count))[:, None]).repeat_interleave(frames, 1).repeat_interleave(frames, 2)
    # rows of padded queries may see nothing; a finite number keeps their softmax defined
    scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
    text_k, text_v = k[:, :, None, :begin], v[:, :, None, :begin]
    scores = torch.cat([_wide(qb @ text_k.mT) * scale, scores], -1)
    weights = scores.softmax(-1).to(v.dtype)
    out = _unrun(weights[..., :begin] @ text_v + weights[..., begin:] @ vb, frames, count)
    lse = _unrun(scores.logsumexp(-1, keepdim=True), frames, count)
    if begin:
        text = _wide(q[:, :, :begin] @ k.mT) * scale
        out = torch.cat([text.softmax(-1).to(v.dtype) @ v, out], 2)
        lse = torch.cat([text.logsumexp(-1, keepdim=True), lse], 2)
    return out, lse[..., 0]


def full_logsumexp(q: Tensor, k: Tensor, scale: float | None = None, block: int = 1024) -> Tensor:
    """log-sum-exp of all scores, (B, heads, N) in float32 or better, in blocks of queries so that memory stays linear."""
    scale = 1 / math.sqrt(q.shape[3]) if scale is None else scale
    return torch.cat([(_wide(part @ k.mT) * scale).logsumexp(-1) for part in torch.split(q, block, 2)], 2)


def _runs(x: Tensor, frames: int, before: int, after: int, size: int, step: int) -> Tensor:
    """(B, heads, frames n, D) to (B, heads, blocks, size frames, D): runs of ``size`` positions, padded with zeros."""
    batch, heads, tokens, width = x.shape
    x = x.reshape(batch, heads, frames, tokens // frames, width).transpose(2, 3)
    x = torch.nn.functional.pad(x, (0, 0, 0, 0, before, after))
    runs = x.unfold(2, size, step)  # (B, heads, blocks, frames, D, size)
    return runs.permute(0, 1, 2, 5, 3, 4).flatten(3, 4)


def _unrun(x: Tensor, frames: int, count: int) -> Tensor:
    """(B, heads, blocks, block frames, D) to (B, heads, frames count, D)."""
    batch, heads, blocks, tokens, width = x.shape
    x = x.reshape(batch, heads, blocks * tokens // frames, frames, width)[:, :, :count]
    return x.transpose(2, 3).flatten(2, 3)


def _wide(scores: Tensor) -> Tensor:
    return scores.to(torch.promote_types(scores.dtype, torch.float32))
