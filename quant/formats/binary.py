"""Signs with scales: a number as a sum of signs, each base with a scale a row or group.

    W ~ s_1 sign(W) + s_2 sign(W - s_1 sign(W)) + ...,   s_i = mean |residual i|

Source: BinaryDM, 2404.05662, eq. 6 (two bases); XNOR-Net, 1603.05279, eq. 6 (one, and why the mean is the best scale).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.quant.formats.elements import Sign
from fewstep.quant.formats.scales import ScaleType, rounded


def encode(x: Tensor, element: Sign, kind: ScaleType, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Greedy bases of the last dimension of ``x``.

    Args:
        x: (..., K).
        element: how many bases.
        kind: what the scales are stored as; each is rounded before the next base is fitted to what is left.
        scale: (..., bases) to keep; the means where it is left out.

    Returns:
        codes (..., K) uint8, bit i set where base i is +1; scales (..., bases) float32.
    """
    rest = x.float()
    codes = torch.zeros(x.shape, dtype=torch.uint8, device=x.device)
    scales = []
    for base in range(element.bases):
        s = rounded(rest.abs().mean(-1), kind) if scale is None else scale[..., base].float()
        positive = rest >= 0
        codes |= positive.to(torch.uint8) << base
        rest = rest - torch.where(positive, 1.0, -1.0) * s.unsqueeze(-1)
        scales.append(s)
    return codes, torch.stack(scales, dim=-1)


def decode(codes: Tensor, scale: Tensor) -> Tensor:
    """(..., K) float32 of codes (..., K) and scales (..., bases)."""
    value = torch.zeros(codes.shape, dtype=torch.float32, device=codes.device)
    for base in range(scale.shape[-1]):
        sign = ((codes >> base) & 1).float() * 2 - 1
        value = value + sign * scale[..., base].float().unsqueeze(-1)
    return value
