"""int8 convolution of NHWC images as a matrix product whose left matrix is never written down (implicit GEMM)."""

# Triton's language looks like Python but has other types.
# mypy: ignore-errors
# pyright: reportOperatorIssue=false, reportArgumentType=false
# ruff: noqa: ANN001, ANN201

import triton
import triton.language as tl

from fewstep.quant.kernels.triton.jit.tiles import finish, load_rows, tile_of


@triton.jit
def int8_conv(
    x, sx, w, sw, bias, out, M, N, C, HEIGHT, WIDTH, OUT_H, OUT_W,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    EVEN: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """out[m, o] = sx[image of m] sw[o] sum_{i,j,c} x[b, y STRIDE + i DILATION - PAD, ..., c] w[o, i, j, c] + bias[o].

    A row m of the result is a pixel (b, y, x) of the output; M = B OUT_H OUT_W. Outside the image the code is 0, which is
    the value 0, since the codes are symmetric. ``EVEN``: C is a multiple of BLOCK_K.
    """
    pid_m, pid_n = tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, BAND)
    m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    image = m // (OUT_H * OUT_W)
    top = (m // OUT_W) % OUT_H * STRIDE_H - PAD_H
    left = m % OUT_W * STRIDE_W - PAD_W
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    chunks = tl.cdiv(C, BLOCK_K)
    for step in range(KERNEL_H * KERNEL_W * chunks):  # one loop for taps and channels: loads run ahead through both
        tap = step // chunks
        first = step % chunks * BLOCK_K
        row = top + tap // KERNEL_W * DILATION_H
        column = left + tap % KERNEL_W * DILATION_W
        mask = ((m < M) & (row >= 0) & (row < HEIGHT) & (column >= 0) & (column < WIDTH))[:, None]
        channel = first + tl.arange(0, BLOCK_K)
        if not EVEN:
            mask = mask & (channel[None, :] < C)
        pixel = x + ((image.to(tl.int64) * HEIGHT + row) * WIDTH + column) * C
        codes = tl.load(pixel[:, None] + channel[None, :], mask=mask, other=0)
        weights = load_rows(w + tap * C, n, first, N, C, KERNEL_H * KERNEL_W * C, BLOCK_K, EVEN)
        acc = tl.dot(codes, tl.trans(weights), acc, out_dtype=tl.int32)
    rows = tl.load(sx + image, m < M, 0.0)
    columns = tl.load(sw + n, n < N, 0.0)
    acc = acc.to(tl.float32) * rows[:, None] * columns[None, :]
    finish(acc, out, out, bias, out, m, n, M, N, 0, N, HAS_BIAS, 0)
