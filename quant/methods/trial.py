"""A layer on a sample of its inputs: what its output would be, were its weight and inputs rounded so or so."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewstep.quant.formats import Format
from fewstep.quant.layer_plan import LayerPlan
from fewstep.quant.views import images, pixels, weight_matrix, weight_tensor

Branch = tuple[Tensor, Tensor]


class Trial:
    """Output error of a layer's candidates: ||layer(x) - candidate(x)||^2 over a sample, biases left out.

    Attributes:
        weight: (N, K) float32, the weight matrix.
        x: the sample, (R, K) or (B, C, H, W) float32, shifted where the plan says so.
        target: the layer's output of the sample as it is, without bias.
    """

    def __init__(self, layer: nn.Module, plan: LayerPlan, sample: Tensor, limit: int = 1024) -> None:
        weight = layer.weight
        assert isinstance(weight, Tensor)
        self.plan, self.shape = plan, tuple(weight.shape)
        self.layer: Any = copy.copy(layer)
        self.weight = weight_matrix(weight.detach()).float()
        self.is_conv = weight.ndim == 4
        if not self.is_conv and len(sample) > limit:
            sample = sample[torch.linspace(0, len(sample) - 1, limit).long()]
        raw = sample.to(weight.device).float()
        self.x = raw + plan.shift
        self.raw_target = self.product(raw, self.weight)
        # The shift's share of the output goes into the bias; what is compared is the product of the shifted inputs.
        self.target = self.product(self.x, self.weight) if plan.shift else self.raw_target
        self.energy = float(self.raw_target.double().square().sum())

    @property
    def channels(self) -> int:
        return self.shape[1]

    def product(self, x: Tensor, matrix: Tensor) -> Tensor:
        """The layer with another weight matrix, without bias."""
        if not self.is_conv:
            return F.linear(x, matrix)
        out = self.layer._conv_forward(x, weight_tensor(matrix, (matrix.shape[0], *self.shape[1:])), None)
        assert isinstance(out, Tensor)
        return out

    def inputs(self, smooth: Tensor | None = None, format: Format | None = None) -> Tensor:
        """The sample divided by the factors and rounded as the plan says, or to another format."""
        format = format or self.plan.activation
        x = self.x if smooth is None else self.x / (smooth[:, None, None] if self.is_conv else smooth)
        if format is None:
            return x
        return images(format.round(pixels(x, self.shape)), x.shape) if self.is_conv else format.round(x)

    def error(
        self, rounded: Tensor, matrix: Tensor, branch: Branch | None = None, smooth: Tensor | None = None
    ) -> float:
        """||target - rounded matrix^T - (x / smooth) down^T up^T||^2."""
        out = self.product(rounded, matrix)
        if branch is not None:
            x = self.x if smooth is None else self.x / (smooth[:, None, None] if self.is_conv else smooth)
            out = out + self.product(x, branch[1] @ branch[0])
        return float((out - self.target).double().square().sum())

    def columns(self, factors: Tensor) -> Tensor:
        """A factor a channel as one a column of the weight matrix."""
        return factors.repeat(self.weight.shape[1] // factors.shape[0])

    def column_max(self) -> Tensor:
        """(C,): the largest weight of each input channel."""
        return self.weight.abs().amax(0).reshape(-1, self.channels).amax(0)

    def gram(self, rounded: Tensor) -> Tensor:
        """X^T X of the columns of the weight matrix, (K, K) float64: the Hessian of the output error by a row of weights."""
        if not self.is_conv:
            return rounded.double().T @ rounded.double()
        layer = self.layer
        k, c = self.weight.shape[1], self.channels
        patches = F.unfold(
            F.pad(rounded, layer._reversed_padding_repeated_twice), layer.kernel_size, layer.dilation, 0, layer.stride
        )  # (B, C h w, L), channels first
        rows = patches.transpose(1, 2).reshape(-1, c, k // c).transpose(1, 2).reshape(-1, k).double()
        return rows.T @ rows
