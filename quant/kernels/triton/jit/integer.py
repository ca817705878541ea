"""Y = s_a s_w (Q_a Q_w^T) + low rank + bias for integer codes: W8A8, W4A8, W4A4, and tiles of both A8 and A4."""

# Triton's language looks like Python but has other types.
# mypy: ignore-errors
# pyright: reportArgumentType=false
# ruff: noqa: ANN001, ANN201

import triton
import triton.language as tl

from fewstep.quant.kernels.triton.jit.codes import unpack_nibbles
from fewstep.quant.kernels.triton.jit.tiles import finish, load_rows, tile_of


@triton.jit
def codes_tile(
    base, rows, k, limit_rows, width, stride, BITS: tl.constexpr, SIGNED: tl.constexpr, BLOCK: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """[rows, BLOCK] int8 from column ``k`` on, of codes of ``BITS`` bits. ``width``: columns that there are."""
    if BITS == 8:
        return load_rows(base, rows, k, limit_rows, width, stride, BLOCK, EVEN)
    else:
        return unpack_nibbles(load_rows(base, rows, k // 2, limit_rows, width // 2, stride, BLOCK // 2, EVEN), SIGNED)


@triton.jit
def add_products(
    acc, a, sa, w, sw, m, n, M, N, K, W_FIRST, W_K, stride_a, stride_sa_m, stride_sa_g, stride_w, stride_sw_n, stride_sw_g,
    A_BITS: tl.constexpr, A_SIGNED: tl.constexpr, W_BITS: tl.constexpr, GROUP: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """Add K columns of A, against those of W from ``W_FIRST`` on: int32 sums, or float32 after each group of BLOCK_K."""
    for k in range(0, K, BLOCK_K):
        x = codes_tile(a, m, k, M, K, stride_a, A_BITS, A_SIGNED, BLOCK_K, EVEN)
        y = codes_tile(w, n, W_FIRST + k, N, W_K, stride_w, W_BITS, True, BLOCK_K, EVEN)
        if GROUP:
            g = k // GROUP
            rows = tl.load(sa + m * stride_sa_m + g * stride_sa_g, m < M, 0.0).to(tl.float32)
            columns = tl.load(sw + n * stride_sw_n + (W_FIRST // GROUP + g) * stride_sw_g, n < N, 0.0).to(tl.float32)
            products = tl.dot(x, tl.trans(y), out_dtype=tl.int32).to(tl.float32)
            acc += products * rows[:, None] * columns[None, :]
        else:
            acc = tl.dot(x, tl.trans(y), acc, out_dtype=tl.int32)
    return acc


@triton.jit
def int_gemm(
    a8, sa8, a4, sa4, w, sw, projected, up, bias, out, M, N, K8, K4, R,
    stride_a8, stride_sa8_m, stride_sa8_g, stride_a4, stride_sa4_m, stride_sa4_g, stride_w, stride_sw_n, stride_sw_g,
    stride_out,
    HAS8: tl.constexpr, HAS4: tl.constexpr, A_SIGNED: tl.constexpr, W_BITS: tl.constexpr, GROUP: tl.constexpr,
    EVEN: tl.constexpr, HAS_BIAS: tl.constexpr, RANK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """One program: one BLOCK_M x BLOCK_N tile of [M, N]. A holds K8 columns of int8 codes and K4 of packed int4 codes.

    W [N, K8 + K4] has its columns in the same order. ``GROUP`` 0: one scale a row in A and in W, and not both parts.
    Otherwise BLOCK_K = GROUP, K8 and K4 are multiples of it, and a stride 0 stands for one scale a row.
    """
    pid_m, pid_n = tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, BAND)
    m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32 if GROUP else tl.int32)
    if HAS8:
        acc = add_products(
            acc, a8, sa8, w, sw, m, n, M, N, K8, 0, K8 + K4,
            stride_a8, stride_sa8_m, stride_sa8_g, stride_w, stride_sw_n, stride_sw_g,
            8, True, W_BITS, GROUP, BLOCK_K, EVEN,
        )  # fmt: skip
    if HAS4:
        acc = add_products(
            acc, a4, sa4, w, sw, m, n, M, N, K4, K8, K8 + K4,
            stride_a4, stride_sa4_m, stride_sa4_g, stride_w, stride_sw_n, stride_sw_g,
            4, A_SIGNED, W_BITS, GROUP, BLOCK_K, EVEN,
        )  # fmt: skip
    if GROUP == 0:
        if HAS8:
            rows = tl.load(sa8 + m * stride_sa8_m, m < M, 0.0).to(tl.float32)
        else:
            rows = tl.load(sa4 + m * stride_sa4_m, m < M, 0.0).to(tl.float32)
        columns = tl.load(sw + n * stride_sw_n, n < N, 0.0).to(tl.float32)
        acc = acc.to(tl.float32) * rows[:, None] * columns[None, :]
    finish(acc, projected, up, bias, out, m, n, M, N, R, stride_out, HAS_BIAS, RANK)
