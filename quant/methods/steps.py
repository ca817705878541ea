"""Rounding that can be trained through: straight-through estimates, and learned choices between neighbours."""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.quant.formats import Format, Integer, Minifloat, Quantized, Sign
from fewstep.quant.formats.blocks import blocks


def through(value: Tensor, rounded: Tensor) -> Tensor:
    """``rounded`` with the gradient of ``value``. Source: 1308.3432."""
    return value + (rounded - value).detach()


def rounded_through(
    x: Tensor,
    format: Format,
    scale: Tensor | None = None,
    zero: Tensor | None = None,
    tensor_scale: Tensor | None = None,
) -> Tensor:
    """``format.round(x)`` with a gradient: to x inside the range and none outside; to the scale as LSQ has it.

    Source: Learned Step Size Quantization, 1902.08153, eq. 3.
    """
    if isinstance(format.element, Sign):
        clipped = x.clamp(-1, 1) if scale is None else x
        return through(clipped, format.round(x, scale))
    groups = blocks(x, format.groups(x.shape[1]))
    if scale is None:
        scale, zero, tensor_scale = format.scales(x.detach())
    whole = scale if tensor_scale is None else scale * tensor_scale
    scaled = groups / whole.unsqueeze(-1)
    offset = 0.0 if zero is None else zero.unsqueeze(-1)
    element = format.element
    low = float(element.low) if isinstance(element, Integer) else -element.max if element.signed else 0.0
    high = float(element.high) if isinstance(element, Integer) else element.max
    inside = (scaled + offset).clamp(low, high)
    values = through(inside, element.round(inside.detach())) - offset
    return (values * whole.unsqueeze(-1)).reshape(x.shape)


def neighbours(element: Integer | Minifloat, scaled: Tensor) -> tuple[Tensor, Tensor]:
    """The largest value of the grid that is not above, and the smallest that is not below, each number; within the range."""
    if isinstance(element, Integer):
        inside = scaled.clamp(element.low, element.high)
        return inside.floor(), inside.ceil()
    values = element.decode(torch.arange(2**element.bits, dtype=torch.uint8))
    grid = torch.unique(values[values.isfinite()]).to(scaled.device)
    inside = scaled.clamp(float(grid[0]), float(grid[-1])).contiguous()
    above = torch.bucketize(inside, grid)
    high = grid[above]
    low = torch.where(high == inside, high, grid[(above - 1).clamp(min=0)])
    return low, high


class LearnedRounding:
    """Each weight goes to the grid's value below or above it: low + h(v) (high - low), h a stretched sigmoid of a learned v.

    Source: AdaRound, 2004.10568, eq. 21 to 24; for floats Low-Bitwidth Floating Point Quantization, 2408.06995, sec. 4.2,
    where the distance of the neighbours depends on the number's binade.
    """

    def __init__(self, matrix: Tensor, format: Format, quantized: Quantized) -> None:
        assert isinstance(format.element, Integer | Minifloat)
        self.format, self.quantized, self.shape = format, quantized, matrix.shape
        scale = quantized.scale if quantized.tensor_scale is None else quantized.scale * quantized.tensor_scale
        self.scale = scale.unsqueeze(-1)
        self.offset = 0.0 if quantized.zero is None else quantized.zero.unsqueeze(-1)
        groups = blocks(matrix, format.groups(matrix.shape[1]))
        scaled = groups / self.scale + self.offset
        self.low, self.high = neighbours(format.element, scaled)
        gap = self.high - self.low
        part = torch.where(gap > 0, (scaled - self.low) / gap.clamp(min=1e-12), 0.5).clamp(0.01, 0.99)
        self.v = torch.log((part + 0.1) / (1.1 - part)).requires_grad_(True)  # h(v) is the part, so it starts unrounded

    def share(self) -> Tensor:
        """h(v), from 0 to 1."""
        return (1.2 * torch.sigmoid(self.v) - 0.1).clamp(0, 1)

    def weight(self) -> Tensor:
        """The weight in between."""
        values = self.low + self.share() * (self.high - self.low)
        return ((values - self.offset) * self.scale).reshape(self.shape)

    def undecided(self, beta: float) -> Tensor:
        """sum 1 - |2 h - 1|^beta: 0 when each is at a neighbour."""
        return (1 - (2 * self.share() - 1).abs().pow(beta)).sum()

    @torch.no_grad()
    def decided(self) -> Quantized:
        """Codes of the nearer neighbours."""
        values = torch.where(self.share() > 0.5, self.high, self.low)
        matrix = ((values - self.offset) * self.scale).reshape(self.shape)
        q = self.quantized
        return self.format.encode(matrix, q.scale, q.zero, q.tensor_scale)
