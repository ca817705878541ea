"""Attention in 8 bits: codes of Q and K multiplied in int8, probabilities and values in float16, a softmax that runs along."""

# Triton's language looks like Python but has other types.
# mypy: ignore-errors
# ruff: noqa: ANN001, ANN201

import triton
import triton.language as tl


@triton.jit
def int8_attention(
    q, sq, k, sk, v, sv, out, L, S, stride_heads_q, stride_heads_k, stride_heads_v,
    D: tl.constexpr, E: tl.constexpr, WIDE_D: tl.constexpr, WIDE_E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCKS_Q: tl.constexpr, BLOCKS_K: tl.constexpr,
):  # fmt: skip
    """out[h, l] = sv sum_s 2^(S[l, s] - max S) v[s] / sum_s 2^(S[l, s] - max S), S = sq sk (q k^T).

    ``q`` (H, L, D) and ``k`` (H, S, D) int8 with float32 scales ``sq`` (H, ceil(L / BLOCKS_Q)) and ``sk`` of blocks of
    tokens; BLOCK_M divides BLOCKS_Q and BLOCK_N divides BLOCKS_K, so that a tile has one scale. ``v`` (H, S, E) float16 and
    its scale ``sv`` (1,) float32. WIDE_D and WIDE_E are D and E up to a power of two.
    """
    tiles = tl.cdiv(L, BLOCK_M)
    head = (tl.program_id(0) // tiles).to(tl.int64)
    first = tl.program_id(0) % tiles * BLOCK_M
    m = first + tl.arange(0, BLOCK_M)
    d = tl.arange(0, WIDE_D)
    e = tl.arange(0, WIDE_E)
    queries = tl.load(
        q + head * stride_heads_q + m[:, None] * D + d[None, :], mask=(m[:, None] < L) & (d[None, :] < D), other=0
    )
    step_q = tl.load(sq + head * tl.cdiv(L, BLOCKS_Q) + first // BLOCKS_Q)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, WIDE_E), tl.float32)
    for start in range(0, S, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        keys = tl.load(
            k + head * stride_heads_k + n[None, :] * D + d[:, None], mask=(n[None, :] < S) & (d[:, None] < D), other=0
        )
        step = step_q * tl.load(sk + head * tl.cdiv(S, BLOCKS_K) + start // BLOCKS_K)
        scores = tl.dot(queries, keys, out_dtype=tl.int32).to(tl.float32) * step
        scores = tl.where(n[None, :] < S, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, axis=1))
        p = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(p, axis=1)
        values = tl.load(
            v + head * stride_heads_v + n[:, None] * E + e[None, :], mask=(n[:, None] < S) & (e[None, :] < E), other=0.0
        )
        acc = tl.dot(p.to(tl.float16), values, acc * shrink[:, None], out_dtype=tl.float32)
        top = higher
    place = out + (head * L + m[:, None]) * E + e[None, :]
    result = acc / total[:, None] * tl.load(sv)
    tl.store(place, result.to(out.dtype.element_ty), mask=(m[:, None] < L) & (e[None, :] < E))
