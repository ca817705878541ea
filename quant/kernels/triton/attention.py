"""Attention in 8 bits, after SageAttention: int8 Q K^T of smoothed keys, float16 P V."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fewstep.errors import FewstepError
from fewstep.quant.attention.plan import AttentionPlan
from fewstep.quant.attention.reference import rounded_tokens, rounded_values, smoothed
from fewstep.quant.kernels.triton.launch import FLOATS, config, launch, ready

LARGEST_HEAD = 256


def int8_attention(
    query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan | None = None, scale: float | None = None
) -> Tensor:
    """softmax(scale Q K^T) V; queries and keys in int8 with a scale a block of tokens, P and V in float16, sums in float32.

    Codes are those of :func:`fewstep.quant.attention.quantized_attention`, found by torch before the kernel. P is rounded
    relative to the largest score so far, where the reference has the largest of all: results agree to float16's steps.

    Args:
        query: (B, H, L, D) float32, float16 or bfloat16, D at most 256.
        key, value: (B, H, S, D) and (B, H, S, E).
        plan: ``qk="int8"`` and ``pv="float16"``; its blocks are multiples of the tile's.
        scale: of the scores, 1 / sqrt(D) where left out.

    Returns:
        (B, H, L, E) in the dtype of ``query``.

    Raises:
        FewstepError: for formats, shapes, dtypes or devices that it does not take; without Triton.

    Source: SageAttention, 2410.02367, algorithm 1.
    """
    plan = plan or AttentionPlan()
    capability = ready("int8_attention", query)
    if (plan.qk, plan.pv) != ("int8", "float16"):
        raise FewstepError(f"the Triton kernel computes int8 QK and float16 PV, not {plan}")
    if query.ndim != 4 or query.dtype not in FLOATS:
        raise FewstepError(
            f"queries of {query.dtype} and shape {tuple(query.shape)}; floats of (B, H, L, D) are needed"
        )
    batch, heads, tokens, dim = query.shape
    if key.shape[:2] != (batch, heads) or key.shape[3] != dim or value.shape[:3] != key.shape[:3]:
        raise FewstepError(
            f"keys of {tuple(key.shape)} and values of {tuple(value.shape)}; ({batch}, {heads}, S, {dim}) and (.., S, E)"
        )
    if max(dim, value.shape[3]) > LARGEST_HEAD:
        raise FewstepError(f"heads of {max(dim, value.shape[3])} numbers; at most {LARGEST_HEAD} fit in a tile")
    if not key.shape[2]:
        raise FewstepError("there are no keys to attend to")
    tile = config("attention", capability)
    if plan.blocks[0] % tile.block_m or plan.blocks[1] % tile.block_n:
        raise FewstepError(f"blocks of {plan.blocks} tokens; multiples of {(tile.block_m, tile.block_n)} are needed")
    scale = 1 / math.sqrt(dim) if scale is None else scale
    sides = [
        rounded_tokens(x, block, "int8")
        for x, block in zip(
            (query.float() * (scale * math.log2(math.e)), smoothed(key, plan)), plan.blocks, strict=True
        )
    ]
    codes = [side.to(torch.int8).contiguous() for side, _ in sides]
    # One scale a block is all that the kernel reads.
    steps = [s[..., ::block, 0].contiguous() for (_, s), block in zip(sides, plan.blocks, strict=True)]
    values, step, _ = rounded_values(value, plan)
    out = torch.empty(batch, heads, tokens, value.shape[3], dtype=query.dtype, device=query.device)
    if out.numel():
        from fewstep.quant.kernels.triton.jit.attention import int8_attention as kernel

        launch(
            kernel, -(-tokens // tile.block_m) * batch * heads, query.device, tile,
            codes[0], steps[0], codes[1], steps[1], values.half().contiguous(), step.reshape(1), out, tokens, key.shape[2],
            tokens * dim, key.shape[2] * dim, key.shape[2] * value.shape[3],
            D=dim, E=value.shape[3], WIDE_D=_wide(dim), WIDE_E=_wide(value.shape[3]),
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCKS_Q=plan.blocks[0], BLOCKS_K=plan.blocks[1],
        )  # fmt: skip
    return out


def _wide(size: int) -> int:
    """The power of two, at least 32, that a tile has for a head of this size."""
    return max(32, 1 << (size - 1).bit_length())
