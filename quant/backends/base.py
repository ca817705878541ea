"""What a backend is: something that multiplies matrices of codes, and says which codes, where."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from fewstep.quant.formats import Format, Quantized

if TYPE_CHECKING:
    from fewstep.quant.layers.conv import QuantConv2d
    from fewstep.quant.layers.linear import QuantLinear


class Backend(ABC):
    """Multiplies codes; every backend gives what ``reference`` gives on the same codes.

    Attributes:
        name: as users write it.
        formats: pairs of activation and weight formats (None: activations stay floats) that it is for, as a table shows
            them. Each pair is probed before it is used.
    """

    name: ClassVar[str]
    formats: ClassVar[tuple[tuple[str | None, str], ...]]

    @abstractmethod
    def missing(self, device: torch.device) -> str | None:
        """Why it cannot run on ``device`` at all, None where it can."""

    @abstractmethod
    def refuses(self, activation: Format | None, weight: Format) -> str | None:
        """Why it has no product of these formats, None where it has."""

    def refuses_shape(self, n: int, k: int) -> str | None:
        """Why it cannot multiply by an (N, K) weight, None where it can."""
        return None

    @abstractmethod
    def pack(self, weight: Quantized) -> Any:
        """The weight as its kernel wants it; made once a layer."""

    @abstractmethod
    def product(self, activation: Quantized, packed: Any) -> Tensor:
        """decode(activation) decode(weight)^T, (M, N) float32."""

    def floats(self, x: Tensor, packed: Any) -> Tensor:
        """x decode(weight)^T of inputs (M, K) that stay floats, (M, N); for backends that take such."""
        raise NotImplementedError(f"{self.name} multiplies codes by codes")

    def refuses_conv(self, layer: QuantConv2d) -> str | None:
        """Why it cannot compute this convolution, None where it can."""
        return f"{self.name} has no convolution"

    def linear(self, layer: QuantLinear | QuantConv2d, flat: Tensor) -> Tensor:
        """The layer's output of inputs (M, K); a 1 x 1 convolution is a linear layer of its pixels."""
        packed = layer.remember(self.name, lambda: self.pack(layer.quantized_weight()))
        if layer.plan.activation is None:
            return layer.finish(self.floats(flat, packed), flat)
        return layer.finish(self.product(layer.encode_input(layer.prepare(flat)), packed), flat)

    def conv2d(self, layer: QuantConv2d, x: Tensor) -> Tensor:
        """The layer's output of inputs (B, C, H, W)."""
        raise NotImplementedError(f"{self.name} refused every convolution")
