"""The quantised convolution, of any format and backend."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewstep.quant.backends import choose
from fewstep.quant.layer_plan import LayerPlan
from fewstep.quant.layers.base import QuantLayer
from fewstep.quant.views import weight_tensor

GEOMETRY = ("stride", "padding", "dilation", "groups", "padding_mode")


class QuantConv2d(QuantLayer, nn.Conv2d):  # type: ignore[misc, override]
    """conv2d with the weight, and the input where the plan says so, in a number format. Inputs (B, C, H, W)."""

    def __init__(
        self,
        plan: LayerPlan,
        shape: tuple[int, ...],
        arrays: Mapping[str, Tensor],
        dtype: torch.dtype,
        geometry: Mapping[str, Any],
    ) -> None:
        super().__init__(plan, shape, arrays, dtype)
        self.stride, self.padding, self.dilation = (geometry[name] for name in ("stride", "padding", "dilation"))
        self.groups, self.padding_mode = int(geometry["groups"]), geometry["padding_mode"]
        self.out_channels, self.in_channels = shape[0], shape[1] * self.groups
        self.kernel_size = (shape[2], shape[3])
        self._reversed_padding_repeated_twice = geometry["border"]  # what torch pads by in the modes that are not zeros

    @property
    def pointwise(self) -> bool:
        """Whether it is a linear layer of pixels, and computed as one."""
        return self.kernel_size == (1, 1) and self.groups == 1 and self.padding in (0, (0, 0), "valid")

    def forward(self, input: Tensor) -> Tensor:
        backend = choose(self, input)
        if not self.pointwise:
            return backend.conv2d(self, input)
        down, across = self.stride
        x = input[..., ::down, ::across].permute(0, 2, 3, 1)
        out = backend.linear(self, x.reshape(-1, self.in_channels))
        return out.reshape(*x.shape[:-1], -1).permute(0, 3, 1, 2)

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """conv2d of the layer's geometry."""
        out: Tensor = nn.Conv2d._conv_forward(self, x, weight, bias)
        return out

    def prepare(self, x: Tensor) -> Tensor:
        """Inputs as the quantiser takes them, divided by the smoothing factors: (B, C, H, W), or (M, C) of pixels."""
        ready = x.float()
        return ready if self.smooth is None else ready / _by_channel(self.smooth, x)

    def finish(self, out: Tensor, x: Tensor) -> Tensor:
        """The convolved codes with the bias and the branch of the raw inputs added, in the inputs' dtype."""
        if self.bias is not None:
            out = out + _by_channel(self.bias, x)
        if self.down is not None and self.up is not None and x.ndim == 2:
            out = out + F.linear(F.linear(x.to(self.down.dtype), self.down), self.up).float()
        elif self.down is not None and self.up is not None:
            down = weight_tensor(self.down, (len(self.down), *self.shape[1:]))
            branch = self.convolve(x.to(down.dtype), down)
            out = out + F.conv2d(branch, self.up[:, :, None, None]).float()
        return out.to(x.dtype)


def _by_channel(values: Tensor, x: Tensor) -> Tensor:
    """Values by channel for images or rows of pixels like ``x``."""
    return values.float() if x.ndim == 2 else values.float()[:, None, None]
