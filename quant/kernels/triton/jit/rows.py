"""Quantisation of rows, with the smoothing division before it and the low-rank down-projection beside it."""

# Triton's language looks like Python but has other types.
# mypy: ignore-errors
# pyright: reportArgumentType=false, reportAssignmentType=false, reportPossiblyUnboundVariable=false
# ruff: noqa: ANN001, ANN201

import triton
import triton.language as tl

from fewstep.quant.kernels.triton.jit.codes import (
    e2m1_encode,
    e4m3_decode,
    e4m3_encode,
    e8m0_ceil,
    e8m0_decode,
    finite_or_inf,
    pack_nibbles,
    rint,
    scale_of,
)


@triton.jit
def largest(FORMAT: tl.constexpr):
    """The largest value of the codes of ``FORMAT``."""
    if FORMAT == "int8":
        return 127.0
    elif FORMAT == "int4":
        return 7.0
    elif FORMAT == "uint4":
        return 15.0
    elif FORMAT == "fp8" or FORMAT == "mxfp8":
        return 448.0
    else:
        tl.static_assert(FORMAT == "nvfp4" or FORMAT == "mxfp4")
        return 6.0


@triton.jit
def magnitude(values, FORMAT: tl.constexpr):
    """What the scale has to cover: negative numbers have no unsigned code and saturate at 0."""
    values = finite_or_inf(values)
    return tl.maximum(values, 0.0) if FORMAT == "uint4" else tl.abs(values)


@triton.jit
def encode(x, FORMAT: tl.constexpr):
    """Values in units of their scale -> codes, saturating. int8 or E4M3 bytes, or two 4-bit codes a byte."""
    TOP: tl.constexpr = largest(FORMAT)
    if FORMAT == "uint4":
        return pack_nibbles(rint(tl.clamp(x, 0.0, TOP)).to(tl.int32))
    x = tl.clamp(x, -TOP, TOP)
    if FORMAT == "int8":
        return rint(x).to(tl.int8)
    elif FORMAT == "int4":
        return pack_nibbles(rint(x).to(tl.int32))
    elif FORMAT == "fp8" or FORMAT == "mxfp8":
        return e4m3_encode(x)
    else:
        return pack_nibbles(e2m1_encode(x))


@triton.jit
def scale_and_divisor(absmax, total, FORMAT: tl.constexpr, HALF: tl.constexpr):
    """The scale as it is stored, and the float32 that divides the values. ``total``: NVFP4's scale of the tensor.

    NVFP4 has a factor in place of the divisor, as everywhere where its codes are made: (1 / total) / scale.
    """
    TOP: tl.constexpr = largest(FORMAT)
    if FORMAT == "mxfp8" or FORMAT == "mxfp4":
        byte = e8m0_ceil(tl.div_rn(absmax, TOP + tl.zeros_like(absmax)))
        return byte.to(tl.uint8), e8m0_decode(byte)
    elif FORMAT == "nvfp4":
        total += tl.zeros_like(absmax)
        wanted = tl.div_rn(tl.div_rn(absmax, TOP + tl.zeros_like(absmax)), total)
        byte = tl.maximum(e4m3_encode(tl.minimum(wanted, 448.0)).to(tl.int32), 8)  # 2^-6, the least that is used
        factor = tl.div_rn(tl.div_rn(1.0 + tl.zeros_like(absmax), total), e4m3_decode(byte).to(tl.float32))
        return tl.where(wanted == float("inf"), 127, byte).to(tl.uint8), factor
    else:
        scale = scale_of(absmax, TOP, HALF)
        return scale, scale


@triton.jit
def load_tile(x, smooth, rows, places, M, K, stride_x, SHIFT: tl.constexpr, HAS_SMOOTH: tl.constexpr):
    """A tile as it is stored, for the low-rank branch, and its smoothed float32 values. ``places``: columns, < K if any."""
    mask = (rows[:, None] < M) & (places[None, :] < K)
    raw = tl.load(x + rows.to(tl.int64)[:, None] * stride_x + places[None, :], mask=mask, other=0.0)
    values = raw.to(tl.float32)
    if SHIFT != 0.0:  # adding 0 would lose the sign of -0
        values = tl.where(mask, values + SHIFT, 0.0)
    if HAS_SMOOTH:
        lam = tl.load(smooth + places, mask=places < K, other=1.0).to(tl.float32)
        values = tl.div_rn(values, tl.broadcast_to(lam[None, :], values.shape))
    return raw, values


@triton.jit
def project(raw, down, places, K, R, stride_down, projected, RANK: tl.constexpr):
    """``projected + raw @ down.T`` for the columns ``places``; ``down`` [R, K] has the data type of ``raw``."""
    r = tl.arange(0, RANK)
    mask = (places[:, None] < K) & (r[None, :] < R)
    tile = tl.load(down + places[:, None] + r[None, :] * stride_down, mask=mask, other=0.0)
    return tl.dot(raw, tile, projected, input_precision="tf32x3")


@triton.jit
def store_projected(projected, out, rows, M, R, RANK: tl.constexpr):
    r = tl.arange(0, RANK)
    place = out + rows.to(tl.int64)[:, None] * R + r[None, :]
    tl.store(place, projected.to(out.dtype.element_ty), mask=(rows[:, None] < M) & (r[None, :] < R))


@triton.jit
def store_codes(values, codes, rows, first, M, K, FORMAT: tl.constexpr, BLOCK_K: tl.constexpr):
    """Encode ``values`` [BLOCK_M, BLOCK_K], the columns from ``first`` on, into rows of contiguous codes."""
    tile = encode(values, FORMAT)
    PER_BYTE: tl.constexpr = BLOCK_K // tile.shape[1]
    width = K // PER_BYTE
    k = first // PER_BYTE + tl.arange(0, BLOCK_K // PER_BYTE)
    mask = (rows[:, None] < M) & (k[None, :] < width)
    tl.store(codes + rows.to(tl.int64)[:, None] * width + k[None, :], tile, mask=mask)


@triton.jit
def quantize_groups(
    values, codes, scales, rows, first, M, K, total,
    FORMAT: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Codes and scales of a tile of whole groups along K; ``scales`` is [M, K / GROUP]."""
    GROUPS: tl.constexpr = BLOCK_K // GROUP
    HALF: tl.constexpr = scales.dtype.element_ty == tl.float16
    grouped = tl.reshape(values, (BLOCK_M, GROUPS, GROUP))
    scale, divisor = scale_and_divisor(tl.max(magnitude(grouped, FORMAT), axis=2), total, FORMAT, HALF)
    divisor = tl.broadcast_to(divisor[:, :, None], (BLOCK_M, GROUPS, GROUP))
    scaled = grouped * divisor if FORMAT == "nvfp4" else tl.div_rn(grouped, divisor)
    store_codes(tl.reshape(scaled, (BLOCK_M, BLOCK_K)), codes, rows, first, M, K, FORMAT, BLOCK_K)
    g = first // GROUP + tl.arange(0, GROUPS)
    mask = (rows[:, None] < M) & (g[None, :] < K // GROUP)
    tl.store(scales + rows.to(tl.int64)[:, None] * (K // GROUP) + g[None, :], scale, mask=mask)


@triton.jit
def quantize_rows(
    x, smooth, down, static, codes, scales, projected, M, K, R, stride_x, stride_down,
    FORMAT: tl.constexpr, GROUP: tl.constexpr, SHIFT: tl.constexpr, HAS_SMOOTH: tl.constexpr, STATIC: tl.constexpr,
    RANK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M rows, all of K. ``GROUP`` 0: one scale a row, for which the row is read twice.

    ``static`` holds the rows' scales if ``STATIC``, NVFP4's scale of the tensor otherwise. ``RANK`` 0: no projection.
    """
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    accumulated = tl.zeros((BLOCK_M, RANK if RANK else 1), tl.float32)
    if GROUP == 0:
        if STATIC:
            scale = tl.load(static + rows, mask=rows < M, other=1.0)
        else:
            absmax = tl.zeros((BLOCK_M,), tl.float32)
            for first in range(0, K, BLOCK_K):
                places = first + tl.arange(0, BLOCK_K)
                raw, values = load_tile(x, smooth, rows, places, M, K, stride_x, SHIFT, HAS_SMOOTH)
                absmax = tl.maximum(absmax, tl.max(magnitude(values, FORMAT), axis=1))
            scale = scale_of(absmax, largest(FORMAT), scales.dtype.element_ty == tl.float16)
        tl.store(scales + rows, scale, mask=rows < M)
        divisor = tl.broadcast_to(scale[:, None], (BLOCK_M, BLOCK_K))
    else:
        total = tl.load(static) if FORMAT == "nvfp4" else 1.0
    for first in range(0, K, BLOCK_K):
        places = first + tl.arange(0, BLOCK_K)
        raw, values = load_tile(x, smooth, rows, places, M, K, stride_x, SHIFT, HAS_SMOOTH)
        if RANK:
            accumulated = project(raw, down, places, K, R, stride_down, accumulated, RANK)
        if GROUP == 0:
            store_codes(tl.div_rn(values, divisor), codes, rows, first, M, K, FORMAT, BLOCK_K)
        else:
            quantize_groups(values, codes, scales, rows, first, M, K, total, FORMAT, GROUP, BLOCK_M, BLOCK_K)
    if RANK:
        store_projected(accumulated, projected, rows, M, R, RANK)


@triton.jit
def quantize_mixed(
    x, order, smooth, down, codes8, scales8, codes4, scales4, projected, M, K, K8, R, stride_x, stride_down,
    GROUP: tl.constexpr, HAS_SMOOTH: tl.constexpr, RANK: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Columns in the order ``order`` [K]: the first K8 in int8, the others in int4, groups of GROUP in both.

    ``smooth`` and ``down`` keep the order of ``x``. K8 and K are multiples of GROUP.
    """
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    accumulated = tl.zeros((BLOCK_M, RANK if RANK else 1), tl.float32)
    for first in range(0, K8, GROUP):
        places = tl.load(order + first + tl.arange(0, GROUP))
        raw, values = load_tile(x, smooth, rows, places, M, K, stride_x, 0.0, HAS_SMOOTH)
        if RANK:
            accumulated = project(raw, down, places, K, R, stride_down, accumulated, RANK)
        quantize_groups(values, codes8, scales8, rows, first, M, K8, 1.0, "int8", GROUP, BLOCK_M, GROUP)
    for first in range(0, K - K8, GROUP):
        places = tl.load(order + K8 + first + tl.arange(0, GROUP))
        raw, values = load_tile(x, smooth, rows, places, M, K, stride_x, 0.0, HAS_SMOOTH)
        if RANK:
            accumulated = project(raw, down, places, K, R, stride_down, accumulated, RANK)
        quantize_groups(values, codes4, scales4, rows, first, M, K - K8, 1.0, "int4", GROUP, BLOCK_M, GROUP)
    if RANK:
        store_projected(accumulated, projected, rows, M, R, RANK)
