"""int8 products on the CPU through oneDNN: unsigned activations, signed weights, exact int32 sums.

A processor without VNNI adds pairs of products in 16 bits, where 2 * 255 * 127 does not fit and is cut off silently:
outputs are 12 % wrong. So a weight is taken only if its codes are small enough for that (7 bits: 2 * 255 * 63 fits),
unless this processor is found to add the largest codes exactly.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fewstep.quant.backends.base import Backend
from fewstep.quant.formats import Format, Integer, Quantized
from fewstep.quant.formats.format import Granularity
from fewstep.quant.views import weight_tensor

if TYPE_CHECKING:
    from fewstep.quant.layers.conv import QuantConv2d
    from fewstep.quant.layers.linear import QuantLinear

_WHOLE: tuple[Granularity, ...] = ("tensor", "row")


class _Packed(NamedTuple):
    kernel: Tensor
    scale: Tensor
    """(N,) float32."""
    zeros: Tensor
    """(N,) int64."""
    sums: Tensor
    """(N,) float32: sum of the codes of a row, by which a zero point is taken off."""


class OneDNN(Backend):
    """int8 and narrower integers with one scale a row, on x86 and ARM CPUs."""

    name: ClassVar[str] = "onednn"
    formats: ClassVar[tuple[tuple[str | None, str], ...]] = (
        ("int8:row", "int8:row"),
        ("int8:row", "int7:row"),
        ("int8:row", "int4:row"),
        ("zint8:row", "int8:row"),
        ("zint8:row", "int7:row"),
    )

    def missing(self, device: torch.device) -> str | None:
        if device.type != "cpu":
            return "oneDNN's int8 runs on the CPU"
        built: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        if not built or not hasattr(torch.ops.onednn, "qlinear_pointwise"):
            return "this torch was built without oneDNN"
        return None

    def refuses(self, activation: Format | None, weight: Format) -> str | None:
        if activation is None or not isinstance(activation.element, Integer) or not isinstance(weight.element, Integer):
            return "oneDNN multiplies integers"
        if activation.granularity not in _WHOLE or weight.granularity not in _WHOLE:
            return "oneDNN has one scale a row"
        if not weight.element.signed or weight.has_zero:
            return "oneDNN's weights are signed and without zero points"
        largest = 2 * (2**activation.element.bits - 1) * weight.element.high
        if largest > 2**15 - 1 and not adds_exactly():
            return (
                f"{activation.element.name} by {weight.element.name} saturates on this CPU, which has no VNNI; "
                "int7 weights are exact"
            )
        return None

    def pack(self, weight: Quantized) -> _Packed:
        codes = weight.codes.contiguous()
        return _Packed(torch.ops.onednn.qlinear_prepack(codes, None), *_row_scales(weight))

    def product(self, activation: Quantized, packed: _Packed) -> Tensor:
        codes, offset = _unsigned(activation)
        codes = codes.contiguous()
        return _scaled(_multiplied(codes, offset, packed.kernel, packed.scale, packed.zeros), activation, packed)

    def linear(self, layer: QuantLinear | QuantConv2d, flat: Tensor) -> Tensor:
        if layer.plan.activation != _PLAIN or layer.input_scale is not None:
            return super().linear(layer, flat)
        packed = layer.remember(self.name, lambda: self.pack(layer.quantized_weight()))
        codes, scale = _plain_codes(layer.prepare(flat).contiguous(), 1)
        return layer.finish(_multiplied(codes, 128, packed.kernel, packed.scale, packed.zeros) * scale, flat)

    def refuses_conv(self, layer: QuantConv2d) -> str | None:
        if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
            return f"oneDNN pads with zeros by numbers, not {layer.padding_mode!r} by {layer.padding!r}"
        return None

    def conv2d(self, layer: QuantConv2d, x: Tensor) -> Tensor:
        activation = layer.plan.activation
        assert activation is not None
        offset = 0 if activation.has_zero or not activation.element.signed else 2 ** (activation.element.bits - 1)
        pad = [int(p) for p in layer.padding]
        inside = [0, 0] if activation.has_zero else pad
        packed = layer.remember((self.name, x.shape), lambda: _pack_conv(layer, inside, offset, list(x.shape)))
        ready = layer.prepare(x)
        if activation == _PLAIN and layer.input_scale is None:
            codes, scale = _plain_codes(ready, (1, 2, 3))
            zero = None
        elif activation == _ZEROED and layer.input_scale is None:
            codes, scale, zero = _zeroed_codes(ready, pad)
        else:
            # A zero point is no zero: the border must be there when codes are made.
            ready = F.pad(ready, (pad[1], pad[1], pad[0], pad[0])) if activation.has_zero else ready
            q = activation.encode(ready.flatten(1), *layer.stored_input())
            codes = _unsigned(q)[0].reshape(ready.shape)
            scale, zero = q.scale[:, :, None, None], q.zero
        out = torch.ops.onednn.qconv2d_pointwise(
            codes.contiguous(memory_format=torch.channels_last), 1.0, offset, packed.kernel, packed.scale, packed.zeros,
            None, list(layer.stride), inside, list(layer.dilation), layer.groups, 1.0, 0, torch.float32, "none", [], "",
        )  # fmt: skip
        if zero is not None:
            out.sub_((zero * (packed.sums * packed.scale))[:, :, None, None])
        return layer.finish(out.mul_(scale), x)


_PLAIN, _ZEROED = Format.parse("int8:row"), Format.parse("zint8:row")


@torch.library.custom_op("fewstep::onednn_linear", mutates_args=())
def _multiplied(codes: Tensor, offset: int, kernel: Tensor, scale: Tensor, zeros: Tensor) -> Tensor:
    """(codes - offset) W^T in float32, times W's scales. An operator of its own: compilers have ideas about oneDNN's."""
    out: Tensor = torch.ops.onednn.qlinear_pointwise(
        codes, 1.0, offset, kernel, scale, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return out


@_multiplied.register_fake
def _(codes: Tensor, offset: int, kernel: Tensor, scale: Tensor, zeros: Tensor) -> Tensor:
    return codes.new_empty((codes.shape[0], scale.shape[0]), dtype=torch.float32)


def _pack_conv(layer: QuantConv2d, padding: list[int], offset: int, shape: list[int]) -> _Packed:
    weight = layer.quantized_weight()
    codes = weight_tensor(weight.codes, layer.shape).contiguous()
    scales = _row_scales(weight)
    if padding != [int(p) for p in layer.padding]:  # the input comes padded
        shape = [shape[0], shape[1], shape[2] + 2 * int(layer.padding[0]), shape[3] + 2 * int(layer.padding[1])]
    kernel = torch.ops.onednn.qconv_prepack(
        codes, scales[0], 1.0, offset, list(layer.stride), padding, list(layer.dilation), layer.groups, shape
    )
    return _Packed(kernel, *scales)


def _row_scales(weight: Quantized) -> tuple[Tensor, Tensor, Tensor]:
    rows = weight.shape[0]
    return (
        weight.scale.expand(rows, 1).reshape(rows).contiguous(),
        torch.zeros(rows, dtype=torch.int64),
        weight.codes.sum(1, dtype=torch.int64).float(),
    )


def _plain_codes(x: Tensor, dims: int | tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """``int8:row`` codes plus 128 and their scales: what :class:`Format` gives, in fewer passes over the memory."""
    top = x.abs().amax(dims, keepdim=True)
    scale = (top / 127.0).clamp_(min=2.0**-126)
    return (x / scale).round_().add_(128.0).to(torch.uint8), scale


def _zeroed_codes(x: Tensor, pad: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """``zint8:row`` codes with a border that stands for 0, scales (B, 1, 1, 1) and zero points (B, 1).

    What :class:`Format` gives, in fewer passes over the memory. The border is set on the codes, where it is the zero point: a
    quarter of the memory of padded inputs.
    """
    low, high = (end(x, (1, 2, 3), keepdim=True) for end in (torch.amin, torch.amax))
    scale = ((high.clamp_(min=0) - low.clamp_(max=0)) / 255.0).clamp_(min=2.0**-126)
    zero = (-low / scale).round_().clamp_(0, 255)
    scaled = (x / scale).add_(zero).round_().clamp_(0, 255)
    b, c, h, w = x.shape
    codes = torch.empty((b, c, h + 2 * pad[0], w + 2 * pad[1]), dtype=torch.uint8, memory_format=torch.channels_last)
    if any(pad):
        codes.copy_(zero.to(torch.uint8).expand_as(codes))
    codes[:, :, pad[0] : pad[0] + h, pad[1] : pad[1] + w] = scaled
    return codes, scale, zero.reshape(b, 1)


def _unsigned(activation: Quantized) -> tuple[Tensor, int]:
    """uint8 codes and the code that stands for 0, where it is the same for all rows."""
    kind = activation.format.element
    assert isinstance(kind, Integer)
    if not kind.signed:
        return activation.codes, 0
    offset = 2 ** (kind.bits - 1)
    return (activation.codes.to(torch.int16) + offset).to(torch.uint8), offset


def _scaled(out: Tensor, activation: Quantized, packed: _Packed) -> Tensor:
    if activation.zero is not None:
        out = out - activation.zero * (packed.sums * packed.scale)
    return out * activation.scale


@cache
def adds_exactly() -> bool:
    """Whether this CPU adds products of the largest codes (255 and 127) without cutting them off, found by doing so."""
    codes = torch.full((16, 64), 255, dtype=torch.uint8)
    weight = torch.full((16, 64), 127, dtype=torch.int8)
    ones, zeros = torch.ones(16), torch.zeros(16, dtype=torch.int64)
    try:
        packed = torch.ops.onednn.qlinear_prepack(weight, None)
        out = torch.ops.onednn.qlinear_pointwise(
            codes, 1.0, 0, packed, ones, zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )
    except RuntimeError:  # no such kernel for this processor: the probe of the backend will say so
        return False
    return bool((out == 255 * 127 * 64).all())
