"""Columns in groups that share a scale."""

from __future__ import annotations

from torch import Tensor


def blocks(x: Tensor, groups: int) -> Tensor:
    """(R, K) as (R, groups, K / groups)."""
    return x.reshape(x.shape[0], groups, -1)
