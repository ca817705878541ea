"""The quantised linear layer, of any format and backend."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewstep.quant.backends import choose
from fewstep.quant.layer_plan import LayerPlan
from fewstep.quant.layers.base import QuantLayer


class QuantLinear(QuantLayer, nn.Linear):  # type: ignore[misc, override]
    """y = x W^T + b with W, and x where the plan says so, in a number format. Inputs (..., K), outputs (..., N)."""

    def __init__(
        self, plan: LayerPlan, shape: tuple[int, ...], arrays: Mapping[str, Tensor], dtype: torch.dtype
    ) -> None:
        super().__init__(plan, shape, arrays, dtype)
        self.out_features, self.in_features = shape

    def forward(self, input: Tensor) -> Tensor:
        flat = input.reshape(-1, self.in_features)
        out = choose(self, flat).linear(self, flat).reshape(*input.shape[:-1], -1)
        if self.first is not None and out.ndim > 2:
            out = torch.cat([self.first.to(out.dtype).expand_as(out[..., :1, :]), out[..., 1:, :]], dim=-2)
        return out

    def prepare(self, flat: Tensor) -> Tensor:
        """Inputs (M, K) as the quantiser takes them: shifted, divided by the smoothing factors, float32."""
        ready = flat.float()
        if self.plan.shift:
            ready = ready + self.plan.shift
        return ready if self.smooth is None else ready / self.smooth.float()

    def finish(self, out: Tensor, flat: Tensor) -> Tensor:
        """The product (M, N) of codes with the bias and the branch of the raw inputs added, in the inputs' dtype."""
        if self.bias is not None:
            out = out + self.bias.float()
        if self.down is not None and self.up is not None:
            out = out + F.linear(F.linear(flat.to(self.down.dtype), self.down), self.up).float()
        return out.to(flat.dtype)
