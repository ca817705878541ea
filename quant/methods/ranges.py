"""Scales that clip a little, where the many small numbers gain more than the few large ones lose."""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.quant.formats import Format, Quantized, Sign
from fewstep.quant.formats.blocks import blocks


def clipped(matrix: Tensor, format: Format, *, shrink: float = 0.2, grid: int = 20, power: float = 2.0) -> Quantized:
    """Codes with the scale of each row or group that has the least error among absmax, and parts of it down to ``shrink``.

    Args:
        matrix: (N, K).
        power: of the error; 2.4 weighs large numbers more, as Q-Diffusion does for activations.
    """
    if isinstance(format.element, Sign) or format.scale == "e8m0":
        return format.encode(matrix)  # their scales are the best, or powers of two
    scale, zero, tensor_scale = format.scales(matrix)
    best = scale.clone()
    least = torch.full_like(scale, float("inf"))
    for i in range(grid + 1):
        factor = 1 - (1 - shrink) * i / grid
        tried = restorable(scale * factor, format)
        error = (format.round(matrix, tried, zero, tensor_scale) - matrix).abs().pow(power)
        error = blocks(error, format.groups(matrix.shape[1])).sum(-1)
        if format.granularity == "tensor":
            error = error.sum().reshape(1, 1)
        better = error < least
        best, least = torch.where(better, tried, best), torch.where(better, error, least)
    return format.encode(matrix, best, zero, tensor_scale)


def restorable(scale: Tensor, format: Format) -> Tensor:
    """Scales as the format can store them."""
    from fewstep.quant.formats.scales import rounded

    return rounded(scale, format.scale)
