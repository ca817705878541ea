"""What every matrix product shares: which tile a program makes, and what is added to it before it is stored."""

# Triton's language looks like Python but has other types.
# mypy: ignore-errors
# ruff: noqa: ANN001, ANN201

import triton
import triton.language as tl


@triton.jit
def tile_of(pid, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BAND: tl.constexpr):
    """Row and column of a program's tile; ``BAND`` rows of tiles share the columns of W while these are in L2."""
    columns = tl.cdiv(N, BLOCK_N)
    band = pid // (BAND * columns)
    height = min(tl.cdiv(M, BLOCK_M) - band * BAND, BAND)
    inside = pid % (BAND * columns)
    return band * BAND + inside % height, inside // height


@triton.jit
def load_rows(base, rows, first, limit_rows, width, stride, BLOCK: tl.constexpr, EVEN: tl.constexpr):
    """[rows, BLOCK] from column ``first`` on; zeros outside. ``EVEN``: no column is beyond ``width``."""
    k = first + tl.arange(0, BLOCK)
    mask = rows[:, None] < limit_rows
    if not EVEN:
        mask = mask & (k[None, :] < width)
    return tl.load(base + rows.to(tl.int64)[:, None] * stride + k[None, :], mask=mask, other=0.0)


@triton.jit
def finish(
    acc, projected, up, bias, out, m, n, M, N, R, stride_out, HAS_BIAS: tl.constexpr, RANK: tl.constexpr
):  # fmt: skip
    """``out = acc + projected @ up.T + bias`` for rows ``m`` and columns ``n``; ``projected`` [M, R], ``up`` [N, R]."""
    if RANK:
        r = tl.arange(0, RANK)
        a = tl.load(projected + m.to(tl.int64)[:, None] * R + r[None, :], (m[:, None] < M) & (r[None, :] < R), 0.0)
        b = tl.load(up + n[None, :] * R + r[:, None], (n[None, :] < N) & (r[:, None] < R), 0.0)
        acc = tl.dot(a, b, acc, input_precision="tf32x3")
    if HAS_BIAS:
        acc += tl.load(bias + n, n < N, 0.0).to(tl.float32)[None, :]
    place = out + m.to(tl.int64)[:, None] * stride_out + n[None, :]
    tl.store(place, acc.to(out.dtype.element_ty), mask=(m[:, None] < M) & (n[None, :] < N))
