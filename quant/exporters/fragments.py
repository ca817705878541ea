"""Matrices in the order in which a warp's lanes hold them for tensor-core products: nunchaku's memory layouts.

A tile is what a warp reads at once. Its 32 lanes are 8 groups of 4, as in the PTX ISA's fragments of mma.m16n8k64 (4 bits) and
mma.m16n8k16 (16 bits): lane 4 g + t has row g, and the columns from 8 t (4 bits) or 2 t (16 bits) on. Every function here
permutes; nothing is rounded.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROWS = 128
"""Outputs of a tile."""
COLUMNS = 128
"""Inputs must be a multiple of two steps of 64."""
RANK = 16


def weight_words(codes: Tensor) -> Tensor:
    """4-bit codes (N, K) as (N, K / 2) int8: by tile of 128 rows and step of 64 columns.

    A tile is 8 pairs of 8 rows; of a pair lane 4 g + t has four words of 8 codes, low nibble first: row g of the first and of
    the second 8 rows, each with columns 8 t.. and 32 + 8 t...
    """
    n, k = codes.shape
    # tile, pair, which 8 rows, group | step, which 32 columns, lane of the group, code of the word
    parts = (codes.int() & 15).reshape(n // ROWS, 8, 2, 8, k // 64, 2, 4, 8)
    words = parts.permute(0, 4, 1, 3, 6, 2, 5, 7)
    pairs = words[..., 0::2] | (words[..., 1::2] << 4)
    return pairs.contiguous().to(torch.uint8).view(torch.int8).reshape(n, k // 2)


def scale_rows(scale: Tensor) -> Tensor:
    """16-bit scales (N, G) as (G, N), by tile of 128 rows: a lane has those of the four rows whose results it holds.

    Those are, of its pair of 8 rows, rows 2 t and 2 t + 1 of both. Vectors (N,) such as biases come as (N, 1).
    """
    n, groups = scale.shape
    parts = scale.reshape(n // ROWS, 8, 2, 4, 2, groups)  # tile, pair, which 8 rows, lane of the group, row | group
    return parts.permute(0, 5, 1, 3, 2, 4).reshape(groups, n).contiguous()


def micro_scale_rows(scale: Tensor) -> Tensor:
    """NVFP4's E4M3 scales (N, K / 16), as bytes, as (K / 16, N): four scales of a row together, as the instruction takes them."""
    n, groups = scale.shape
    parts = scale.reshape(n // ROWS, 4, 4, 8, groups // 4, 4)  # tile, 32 rows, 8 rows, row | step, scale of the step
    return parts.permute(0, 4, 3, 2, 1, 5).reshape(groups, n).contiguous()


def low_rank(matrix: Tensor, *, down: bool) -> Tensor:
    """A branch's 16-bit matrix in fragments of 16 x 16: up (N, r) as it is, down (r, K) with its shape turned to (K, r).

    The fragment of (16, 16) is four of 8 x 8; lane 4 g + t has columns 2 t and 2 t + 1 of row g of each.
    """
    rows, columns = matrix.shape
    parts = matrix.reshape(rows // 16, 2, 8, columns // 16, 2, 4, 2)
    order = (3, 0) if down else (0, 3)  # down-projections go along K first
    out = parts.permute(*order, 2, 5, 1, 4, 6)
    return out.reshape(*((columns, rows) if down else (rows, columns))).contiguous()
