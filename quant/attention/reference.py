"""Attention in 8 bits in plain torch, on any device: what other implementations are held to."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fewstep.quant.attention.plan import AttentionPlan
from fewstep.quant.formats import E4M3, Integer, Log, Minifloat

INT8 = Integer(8)
_ROWS = 1024
"""Queries at a time, so that not all scores are there at once."""


def quantized_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: AttentionPlan,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """softmax(scale Q K^T + mask) V with Q, K, P and V rounded as the plan says.

        K' = K - mean_tokens K,   S = s_q s_k (codes_q codes_k^T),   P = 2^(S - max S),   O = P V / sum P

    The scale and log2 e are folded into Q before it is rounded. Sums of codes are exact; P and its sum are float32, and P is
    rounded before the product but not before the sum.

    Args:
        query: (B, H, L, D).
        key, value: (B, H, S, D) and (B, H, S, E).
        mask: broadcasts to (B, H, L, S); True where a key is seen, or numbers that are added to the scores.
        scale: of the scores, 1 / sqrt(D) where left out.

    Returns:
        (B, H, L, E) in the dtype of ``query``. A query that no key is seen by is NaN, as in torch.
    """
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    q_codes, q_scale = rounded_tokens(query.float() * (scale * math.log2(math.e)), plan.blocks[0], plan.qk)
    k_codes, k_scale = rounded_tokens(smoothed(key, plan), plan.blocks[1], plan.qk)
    values, v_scale, top = rounded_values(value, plan)
    added = None if mask is None else bias_of(mask).expand(*query.shape[:-1], key.shape[-2])
    outs = []
    for start in range(0, query.shape[-2], _ROWS):
        rows = slice(start, start + _ROWS)
        scores = (q_codes[..., rows, :] @ k_codes.mT) * (q_scale[..., rows, :] * k_scale.mT)
        if added is not None:
            scores = scores + added[..., rows, :]
        p = torch.exp2(scores - scores.amax(-1, keepdim=True))
        total = p.sum(-1, keepdim=True)
        outs.append(rounded_probabilities(p, plan) @ values * v_scale / (total * top))
    return torch.cat(outs, dim=-2).to(query.dtype)


def smoothed(key: Tensor, plan: AttentionPlan) -> Tensor:
    """Keys in float32, the mean over the tokens taken off: what differs between tokens gets the codes.

    Source: SageAttention, 2410.02367, eq. 5.
    """
    key = key.float()
    return key - key.mean(-2, keepdim=True) if plan.smooth else key


def rounded_tokens(x: Tensor, block: int, kind: str) -> tuple[Tensor, Tensor]:
    """Codes (as float32 values) of (..., L, D) and their scales (..., L, 1), the same within a block of tokens."""
    element: Integer | Minifloat = INT8 if kind == "int8" else E4M3
    tokens = x.shape[-2]
    padded = torch.nn.functional.pad(x, (0, 0, 0, -tokens % block))
    top = padded.reshape(*x.shape[:-2], -1, block, x.shape[-1]).abs().amax((-2, -1))
    scale = (top / element.max).clamp(min=2.0**-126)
    scale = scale.repeat_interleave(block, dim=-1)[..., :tokens, None]
    return element.round(x / scale), scale


def rounded_values(value: Tensor, plan: AttentionPlan) -> tuple[Tensor, Tensor, float]:
    """Values as float32 numbers of the plan's format, the scale of each channel, and what probabilities are multiplied by."""
    value = value.float()
    one = torch.ones((), device=value.device)
    if plan.pv == "fp8":
        scale = (value.abs().amax(-2, keepdim=True) / E4M3.max).clamp(min=2.0**-126)
        return E4M3.round(value / scale), scale, E4M3.max
    if plan.pv != "float16":
        return value, one, 1.0
    scale = (value.abs().amax() / torch.finfo(torch.float16).max).clamp(min=1)  # bfloat16 reaches further than float16
    return (value / scale).half().float(), scale, 1.0


def rounded_probabilities(p: Tensor, plan: AttentionPlan) -> Tensor:
    """Probabilities, the largest of a row being 1, as float32 numbers of the plan's format."""
    if plan.pv == "fp8":
        return E4M3.round(p * E4M3.max)
    if plan.pv.startswith("log"):
        return Log(4, 8 if plan.pv == "log4s8" else 16).round(p)
    return p.half().float() if plan.pv == "float16" else p


def bias_of(mask: Tensor) -> Tensor:
    """What a mask adds to scores in powers of two."""
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, -math.inf)
    return mask.float() * math.log2(math.e)
