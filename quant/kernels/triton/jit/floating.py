"""Y = Q_a Q_w^T with scales, low rank and bias, for FP8 with a scale per row and for MXFP8, MXFP4 and NVFP4."""

# Triton's language looks like Python but has other types.
# mypy: ignore-errors
# pyright: reportAssignmentType=false
# ruff: noqa: ANN001, ANN201

import triton
import triton.language as tl

from fewstep.quant.kernels.triton.jit.codes import e2m1_decode, e4m3_decode, e8m0_decode
from fewstep.quant.kernels.triton.jit.tiles import finish, load_rows, tile_of


@triton.jit
def fp8_gemm(
    a, sa, w, sw, projected, up, bias, out, M, N, K, R, stride_a, stride_w, stride_out,
    EMULATE: tl.constexpr, EVEN: tl.constexpr, HAS_BIAS: tl.constexpr, RANK: tl.constexpr, ACCURATE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """E4M3 codes, one float32 scale for each row of A and of W. ``EMULATE``: bytes, decoded to float16, which is exact.

    ``ACCURATE``: sm_90 adds in accumulators of some 14 bits; take their sums over to float32 after each BLOCK_K columns.
    Without it ``max_num_imprecise_acc`` has to be None: 0 makes Triton convert to float16 and forgo the FP8 units.
    """
    pid_m, pid_n = tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, BAND)
    m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        x = load_rows(a, m, k, M, K, stride_a, BLOCK_K, EVEN)
        y = load_rows(w, n, k, N, K, stride_w, BLOCK_K, EVEN)
        if EMULATE:
            acc = tl.dot(e4m3_decode(x), tl.trans(e4m3_decode(y)), acc)
        else:
            acc = tl.dot(x, tl.trans(y), acc, max_num_imprecise_acc=BLOCK_K if ACCURATE else None)
    rows = tl.load(sa + m, m < M, 0.0)
    columns = tl.load(sw + n, n < N, 0.0)
    acc = acc * rows[:, None] * columns[None, :]
    finish(acc, projected, up, bias, out, m, n, M, N, R, stride_out, HAS_BIAS, RANK)


@triton.jit
def decode_scales(scales, NV: tl.constexpr):
    """float32 of the scales' bytes; of E4M3, only here, NaN too."""
    if NV:
        return tl.where(scales == 127, float("nan"), e4m3_decode(scales).to(tl.float32))
    return e8m0_decode(scales)


@triton.jit
def decode_blocks(codes, scales, FOUR_BITS: tl.constexpr, NV: tl.constexpr, WIDE: tl.constexpr):
    """[R, K] values of codes and their block scales, exact: 4 significant bits at most, and 6 of NVFP4."""
    if FOUR_BITS:
        low = e2m1_decode(codes & 15)
        high = e2m1_decode(codes >> 4)
        values = tl.reshape(tl.join(low, high), (codes.shape[0], codes.shape[1] * 2)).to(tl.float32)
    else:
        values = e4m3_decode(codes).to(tl.float32)
    scale = decode_scales(scales, NV)
    BLOCK: tl.constexpr = values.shape[1] // scales.shape[1]
    grouped = tl.reshape(values, (values.shape[0], scales.shape[1], BLOCK)) * scale[:, :, None]
    return tl.reshape(grouped, (values.shape[0], values.shape[1])).to(WIDE)


@triton.jit
def block_scaled_gemm(
    a, sa, w, sw, alpha, projected, up, bias, out, M, N, K, R, stride_a, stride_sa, stride_w, stride_sw, stride_out,
    FORMAT: tl.constexpr, WIDE: tl.constexpr, EVEN: tl.constexpr, HAS_BIAS: tl.constexpr, RANK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """Codes with a scale for each block of 32 (E8M0) or 16 (``nvfp4``, E4M3) along K; ``alpha``: NVFP4's float32 factor.

    ``WIDE``: None where tensor cores take all this as it is. Otherwise a data type that holds the values: codes and scales
    are bytes, decoded here, since Triton's own fallback spills, and its interpreter takes E4M3 scales for E8M0.
    """
    NV: tl.constexpr = FORMAT == "nvfp4"
    FOUR_BITS: tl.constexpr = FORMAT != "mxfp8"
    PER_BYTE: tl.constexpr = 2 if FOUR_BITS else 1
    BLOCK: tl.constexpr = 16 if NV else 32
    KIND: tl.constexpr = "e2m1" if FOUR_BITS else "e4m3"
    pid_m, pid_n = tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, BAND)
    m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        x = load_rows(a, m, k // PER_BYTE, M, K // PER_BYTE, stride_a, BLOCK_K // PER_BYTE, EVEN)
        y = load_rows(w, n, k // PER_BYTE, N, K // PER_BYTE, stride_w, BLOCK_K // PER_BYTE, EVEN)
        x_scale = load_rows(sa, m, k // BLOCK, M, K // BLOCK, stride_sa, BLOCK_K // BLOCK, EVEN)
        y_scale = load_rows(sw, n, k // BLOCK, N, K // BLOCK, stride_sw, BLOCK_K // BLOCK, EVEN)
        if WIDE is None:
            acc = tl.dot_scaled(x, x_scale, KIND, tl.trans(y), y_scale, KIND, acc)
        else:
            y_values = decode_blocks(y, y_scale, FOUR_BITS, NV, WIDE)
            acc = tl.dot(decode_blocks(x, x_scale, FOUR_BITS, NV, WIDE), tl.trans(y_values), acc)
    if NV:
        acc = acc * tl.load(alpha)
    finish(acc, projected, up, bias, out, m, n, M, N, R, stride_out, HAS_BIAS, RANK)
