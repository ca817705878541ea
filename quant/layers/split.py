"""One layer as a sum of layers over parts of its input channels, each with formats' scales of its own.

Source: Q-Diffusion, 2302.04304, sec. 4.2: a UNet's skip connections join features of very different range.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fewstep.quant.layer_plan import LayerPlan
from fewstep.quant.layers.base import QuantLayer


class QuantSplit(nn.Module):
    """sum_i part_i(x[:, a_i : b_i]); only the first part has the bias."""

    def __init__(self, plan: LayerPlan, parts: Sequence[QuantLayer]) -> None:
        super().__init__()
        self.plan = plan
        self.parts = nn.ModuleList(parts)
        self.axis = -1 if parts[0].shape[1:] == parts[0].shape[1:2] else 1
        self.bounds = [0, *itertools.accumulate(part.shape[1] for part in parts)]

    def forward(self, input: Tensor) -> Tensor:
        outs = [
            part(input.narrow(self.axis, a, b - a))
            for part, (a, b) in zip(self.parts, itertools.pairwise(self.bounds), strict=True)
        ]
        return torch.stack(outs).sum(0) if len(outs) > 2 else outs[0] + outs[1]

    @property
    def bias(self) -> Tensor | None:
        return getattr(self.parts[0], "bias", None)

    @property
    def weight(self) -> Tensor:
        """As :attr:`QuantLayer.weight`, of all parts."""
        return torch.cat([part.weight for part in self.parts], dim=1)  # type: ignore[misc]
