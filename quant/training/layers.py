"""A layer whose weight is rounded in every forward pass and trained through the rounding."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewstep.quant.formats import Format, Quantized, Sign
from fewstep.quant.formats.blocks import blocks
from fewstep.quant.layers.base import QuantLayer
from fewstep.quant.methods.ranges import restorable
from fewstep.quant.methods.steps import rounded_through, through
from fewstep.quant.views import images, pixels, weight_matrix, weight_tensor


@dataclass(frozen=True)
class Trainable:
    """What of a layer is trained.

    Attributes:
        weight: ``full``, every number; ``low rank``, a product of two thin matrices that is added before rounding and so
            merges into the codes (QALoRA); ``none``.
        rank: of that product.
        scales: whether the weight's scales are trained too.
        bias: whether the bias is.
        inputs: whether stored scales of inputs are, those of every time (EfficientDM's temporal step sizes).
    """

    weight: Literal["full", "low rank", "none"] = "full"
    rank: int = 32
    scales: bool = True
    bias: bool = True
    inputs: bool = True


class TrainedLayer(nn.Module):
    """Rounds W + delta with trained scales, and the inputs as the plan says, gradients passed straight through.

    Smoothing and a shift of the inputs are not known to it.

    Source: EfficientDM, 2310.03270, eq. 5 (low rank); LSQ, 1902.08153 (scales).
    """

    def __init__(self, layer: nn.Module, quantized: QuantLayer, what: Trainable) -> None:
        super().__init__()
        weight = layer.weight
        assert isinstance(weight, Tensor)
        self.plan, self.what, self.shape = quantized.plan, what, tuple(weight.shape)
        self.geometry: Any = copy.copy(layer)
        self.geometry._parameters = {}
        start = quantized.quantized_weight()
        self.start = start
        self.base = _agreeing(weight_matrix(weight.detach()).float(), start)
        n, k = self.base.shape
        self.stretch = nn.Parameter(
            torch.zeros_like(start.scale), requires_grad=what.scales and start.format.scale != "e8m0"
        )
        bias = quantized._parameters["bias"]
        self.bias = nn.Parameter(
            torch.zeros(n, device=weight.device) if bias is None else bias.detach().float().clone()
        )
        self.bias.requires_grad_(what.bias)
        self.moment = quantized.moment
        self.zeros, self.first_scale = (
            None if value is None else value.detach() for value in (quantized.input_zero, quantized.input_scale)
        )
        self.input_stretch: nn.Parameter | None = None
        if self.first_scale is not None and what.inputs:
            self.input_stretch = nn.Parameter(torch.zeros_like(self.first_scale))
        self.a: nn.Parameter | None = None
        self.b: nn.Parameter | None = None
        self.delta: nn.Parameter | None = None
        if what.weight == "full":
            self.delta = nn.Parameter(torch.zeros_like(self.base))
        elif what.weight == "low rank":
            rank = min(what.rank, n, k)
            generator = torch.Generator().manual_seed(0)
            self.a = nn.Parameter((torch.randn(rank, k, generator=generator) / k**0.5).to(weight.device))
            self.b = nn.Parameter(torch.zeros(n, rank, device=weight.device))

    @property
    def step(self) -> float:
        """A mean step of the grid, the natural unit of a weight's change."""
        total = self.start.tensor_scale
        return float(self.start.scale.mean()) * (1.0 if total is None else float(total))

    def merged(self) -> Tensor:
        """The weight matrix before rounding."""
        if self.delta is not None:
            return self.base + self.delta
        return self.base if self.a is None or self.b is None else self.base + self.b @ self.a

    def rounded(self) -> Tensor:
        """The weight matrix after rounding, with its gradients."""
        scale = self.start.scale * self.stretch.exp()
        if isinstance(self.plan.weight.element, Sign):
            return signs_through(self.merged(), self.plan.weight, scale)
        return rounded_through(self.merged(), self.plan.weight, scale, self.start.zero, self.start.tensor_scale)

    def input_scales(self) -> Tensor | None:
        """Stored scales of the inputs with their gradients, (T, G) or (1, 1)."""
        if self.first_scale is None or self.input_stretch is None:
            return self.first_scale
        return self.first_scale * self.input_stretch.exp()

    def rounded_input(self, matrix: Tensor) -> Tensor:
        """Inputs (M, K) as the plan has them."""
        act, scale, zero = self.plan.activation, self.input_scales(), self.zeros
        if act is None:
            return matrix
        if not self.plan.times or scale is None:
            return rounded_through(matrix, act, scale, zero)
        assert self.moment is not None
        return rounded_through(matrix, act, self.moment.pick(scale), None if zero is None else self.moment.pick(zero))

    def forward(self, input: Tensor) -> Tensor:
        weight, act = self.rounded(), self.plan.activation
        x = input.float()
        if len(self.shape) == 2:
            flat = x.reshape(-1, self.shape[1])
            return F.linear(self.rounded_input(flat), weight, self.bias).reshape(*input.shape[:-1], -1).to(input.dtype)
        if act is not None:
            x = images(self.rounded_input(pixels(x, self.shape)), x.shape)
        out = self.geometry._conv_forward(x, weight_tensor(weight, self.shape), self.bias)
        assert isinstance(out, Tensor)
        return out.to(input.dtype)

    @torch.no_grad()
    def finished(self) -> tuple[Quantized, Tensor]:
        """Codes with the trained scales, and the bias."""
        scale, format = self.start.scale, self.plan.weight
        if self.what.weight == "none" and not self.what.scales:
            return self.start, self.bias.detach()
        if self.stretch.requires_grad:
            scale = restorable(scale * self.stretch.exp(), format)
        return format.encode(self.merged(), scale, self.start.zero, self.start.tensor_scale), self.bias.detach()


def _agreeing(matrix: Tensor, start: Quantized) -> Tensor:
    """The float weights where the codes are theirs, and what the codes stand for where others were chosen."""
    chosen = start.decode()
    nearest = start.format.encode(matrix, start.scale, start.zero, start.tensor_scale).decode()
    return torch.where(nearest == chosen, matrix, chosen)


def signs_through(matrix: Tensor, format: Format, scale: Tensor) -> Tensor:
    """A sum of signs with gradients to its scales, and to the weights within [-1, 1].

    Source: BinaryDM, 2404.05662, eq. 6 and 7.
    """
    groups = blocks(matrix, format.groups(matrix.shape[1]))
    rest, total = groups.detach(), torch.zeros_like(groups)
    for base in range(scale.shape[-1]):
        s = scale[..., base].unsqueeze(-1)
        sign = torch.where(rest >= 0, 1.0, -1.0)
        total = total + s * sign
        rest = rest - s.detach() * sign
    # of the weights only: the scales have theirs above
    clipped = groups.clamp(-1, 1)
    return (total + through(clipped, clipped.detach()) - clipped.detach()).reshape(matrix.shape)
