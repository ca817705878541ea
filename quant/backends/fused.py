"""The project's Triton kernels: quantisation, product, low-rank branch and bias in two launches."""

from __future__ import annotations

import importlib
from dataclasses import replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from fewstep.quant.backends.base import Backend
from fewstep.quant.formats import E4M3, Format, Integer, Quantized

if TYPE_CHECKING:
    from fewstep.quant.layers.conv import QuantConv2d
    from fewstep.quant.layers.linear import QuantLinear

KERNELS = "fewstep.quant.kernels.triton"
_BLOCKS = {"mxfp8": "mxfp8_linear", "mxfp4": "mxfp4_linear", "nvfp4": "nvfp4_linear"}
_GROUPS = (32, 64, 128)
_AS_MXFP8 = "mxfp6"
"""Its numbers all are E4M3 numbers, so its codes are written anew and multiplied as such, exactly; a byte each."""


class Fused(Backend):
    """Grouped and whole-row integers, FP8 by row, MX and NVFP4, int8 convolutions; on NVIDIA GPUs from sm_80 on."""

    name: ClassVar[str] = "triton"
    formats: ClassVar[tuple[tuple[str | None, str], ...]] = (
        ("int4:g64", "int4:g64"),
        ("int8:row", "int4:g64"),
        ("int8:row", "int8:row"),
        ("fp8", "fp8"),
        ("mxfp8", "mxfp8"),
        ("mxfp6", "mxfp6"),
        ("nvfp4", "nvfp4"),
    )

    def missing(self, device: torch.device) -> str | None:
        if device.type != "cuda":
            return "Triton compiles for GPUs"
        if find_spec("triton") is None or find_spec(KERNELS) is None:
            return "Triton is not installed; pip install 'fewstep[quant]'"
        return None

    def refuses(self, activation: Format | None, weight: Format) -> str | None:
        kernel = _kernel(activation, weight)
        if kernel is None:
            return f"no Triton kernel multiplies {activation} by {weight}"
        usable, why = _call("supported", torch.cuda.get_device_capability(), kernel)
        if not usable:
            return str(why)
        # Emulated block formats save memory but no time; another backend may have the real thing.
        return None

    def refuses_shape(self, n: int, k: int) -> str | None:
        return f"its rows of codes are read 16 at a time, K={k} is no multiple" if k % 16 else None

    def pack(self, weight: Quantized) -> dict[str, Any]:
        weight = _widened(weight)
        return {"format": weight.format, **weight.packed()}

    def product(self, activation: Quantized, packed: dict[str, Any]) -> Tensor:
        activation = _widened(activation)
        kept = activation.packed()
        rows = _call(
            "QuantizedRows", format=activation.format, columns=activation.shape[1], codes=kept["codes"].view(torch.uint8),
            scale=kept["scale"], tensor_scale=activation.tensor_scale, projected=None, dtype=torch.float32,
        )  # fmt: skip
        kernel = _kernel(activation.format, packed["format"])
        assert kernel is not None
        more = (packed["tensor_scale"],) if "tensor_scale" in packed else ()
        out = _call(kernel, rows, packed["codes"], packed["scale"], *more, out_dtype=torch.float32)
        assert isinstance(out, Tensor)
        return out

    def linear(self, layer: QuantLinear | QuantConv2d, flat: Tensor) -> Tensor:
        plan = layer.plan
        assert plan.activation is not None
        if plan.static or (plan.rank and plan.rank > 128) or str(plan.weight) == _AS_MXFP8:
            return super().linear(layer, flat)
        kernel = _kernel(plan.activation, plan.weight)
        assert kernel is not None
        options: dict[str, Any] = {"smooth": layer.smooth, "down": layer.down, "up": layer.up}
        if kernel in ("int8_linear", "w4a8_linear", "w4a4_linear"):
            options["activation"] = plan.activation
        if plan.shift:
            if kernel != "w4a4_linear":
                return super().linear(layer, flat)
            options["shift"] = plan.shift
        more = (layer.tensor_scale,) if layer.tensor_scale is not None else ()
        out = _call(kernel, flat, layer.codes, layer.scale, *more, layer.bias, **options)
        assert isinstance(out, Tensor)
        return out

    def refuses_conv(self, layer: QuantConv2d) -> str | None:
        plan = layer.plan
        whole = plan.activation is not None and str(plan.activation) == "int8:row" and str(plan.weight) == "int8:row"
        if not whole or plan.static or plan.rank or plan.smooth or layer.groups > 1 or layer.padding_mode != "zeros":
            return "its convolution takes int8 by row with scales found as it runs, without groups, branch or smoothing"
        return None if not isinstance(layer.padding, str) else "its convolution pads by numbers"

    def conv2d(self, layer: QuantConv2d, x: Tensor) -> Tensor:
        n, _, h, w = layer.shape
        codes = layer.codes.view(n, h, w, -1)
        out = _call("int8_conv2d", x, codes, layer.scale, layer.bias, stride=layer.stride, padding=layer.padding,
                    dilation=layer.dilation)  # fmt: skip
        assert isinstance(out, Tensor)
        return out


def _kernel(activation: Format | None, weight: Format) -> str | None:
    """Which kernel multiplies these formats."""
    if activation is None:
        return None
    if str(activation) == str(weight) == _AS_MXFP8:
        return "mxfp8_linear"
    if str(activation) == str(weight) and str(weight) in _BLOCKS:
        return _BLOCKS[str(weight)]
    if activation.element == E4M3 and str(activation) == str(weight) == "fp8":
        return "fp8_linear"
    a, w = activation.element, weight.element
    if not isinstance(a, Integer) or not isinstance(w, Integer) or w.kind != "int" or activation.has_zero:
        return None
    if "tensor" in (activation.granularity, weight.granularity):
        return None
    groups = {f.group for f in (activation, weight) if f.group}
    if len(groups) > 1 or not groups <= set(_GROUPS) or (activation.group and not weight.group):
        return None
    by_width = {(8, 8): "int8_linear", (8, 4): "w4a8_linear", (4, 4): "w4a4_linear"}
    return by_width.get((a.bits, w.bits)) if a.kind == "int" or a.bits == 4 else None


def _widened(q: Quantized) -> Quantized:
    if str(q.format) != _AS_MXFP8:
        return q
    values = q.format.element.decode(q.codes)  # type: ignore[union-attr]
    return replace(q, format=Format.parse("mxfp8"), codes=E4M3.encode(values))


def _call(name: str, *args: Any, **options: Any) -> Any:
    return getattr(importlib.import_module(KERNELS), name)(*args, **options)
