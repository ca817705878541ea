"""Plain torch on any device: decode both and multiply. What every other backend is held to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from fewstep.quant.backends.base import Backend
from fewstep.quant.formats import Format, Quantized
from fewstep.quant.views import images, pixels, weight_tensor

if TYPE_CHECKING:
    from fewstep.quant.layers.conv import QuantConv2d
    from fewstep.quant.layers.linear import QuantLinear


class Reference(Backend):
    """Every format, everywhere; faster than the full-precision layer nowhere."""

    name: ClassVar[str] = "reference"
    formats: ClassVar[tuple[tuple[str | None, str], ...]] = ((None, "any"), ("any", "any"))

    def missing(self, device: torch.device) -> str | None:
        return None

    def refuses(self, activation: Format | None, weight: Format) -> str | None:
        return None

    def pack(self, weight: Quantized) -> Tensor:
        return weight.decode()

    def product(self, activation: Quantized, packed: Any) -> Tensor:
        return F.linear(activation.decode(), packed)

    def refuses_conv(self, layer: QuantConv2d) -> str | None:
        return None

    def linear(self, layer: QuantLinear | QuantConv2d, flat: Tensor) -> Tensor:
        if layer.plan.activation is None:
            dtype = flat.dtype  # the product in the model's own precision, as the layer was before
            return layer.finish(F.linear(flat, layer.decoded.to(dtype)), flat)
        return layer.finish(F.linear(layer.round_input(layer.prepare(flat)), layer.decoded), flat)

    def conv2d(self, layer: QuantConv2d, x: Tensor) -> Tensor:
        weight = weight_tensor(layer.decoded, layer.shape)
        if layer.plan.activation is None:
            return layer.finish(layer.convolve(x, weight.to(x.dtype)), x)
        rounded = images(layer.round_input(pixels(layer.prepare(x), layer.shape)), x.shape)
        return layer.finish(layer.convolve(rounded, weight), x)
