"""Products that torch itself has: FP8 by scaled_mm, int8 by _int_mm on NVIDIA GPUs."""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from fewstep.quant.backends.base import Backend
from fewstep.quant.formats import E4M3, E5M2, Format, Integer, Minifloat, Quantized

_FLOATS = {E4M3: torch.float8_e4m3fn, E5M2: torch.float8_e5m2}


class _Packed(NamedTuple):
    weight: Tensor
    """(K, N), column-major, as both kernels want it."""
    scale: Tensor
    """(1, N) or (1, 1) float32."""


class Native(Backend):
    """FP8 with one scale a row or a tensor (sm_89 and later, or any CPU); int8 (sm_80 and later)."""

    name: ClassVar[str] = "torch"
    formats: ClassVar[tuple[tuple[str | None, str], ...]] = (
        ("e4m3:row", "e4m3:row"),
        ("e4m3:tensor", "e4m3:tensor"),
        ("int8:row", "int8:row"),
    )

    def missing(self, device: torch.device) -> str | None:
        if device.type not in ("cpu", "cuda"):
            return "torch has these products for CPUs and NVIDIA GPUs"
        if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
            return "needs sm_80 or later"
        return None

    def refuses(self, activation: Format | None, weight: Format) -> str | None:
        if activation is None:
            return "torch multiplies codes by codes"
        if activation.granularity == "group" or weight.granularity == "group":
            return "torch has one scale a row or a tensor"
        both = (activation.element, weight.element)
        if both[0] in _FLOATS and both[1] in _FLOATS and E4M3 in both:
            same = activation.granularity == weight.granularity
            return None if same else "torch wants both scales by row or both by tensor"
        if all(isinstance(e, Integer) and e.signed and e.bits <= 8 for e in both):
            return None if torch.cuda.is_available() else "torch's int8 product on the CPU is a loop"
        return "torch has products of E4M3 and of int8"

    def refuses_shape(self, n: int, k: int) -> str | None:
        if n % 16 or k % 16:
            return f"torch's kernels take multiples of 16, not N={n}, K={k}"
        return None

    def pack(self, weight: Quantized) -> _Packed:
        codes = weight.codes
        if weight.format.element in _FLOATS:
            codes = codes.view(_dtype(weight.format))
        return _Packed(codes.contiguous().t(), weight.scale.reshape(1, -1).float())

    def product(self, activation: Quantized, packed: _Packed) -> Tensor:
        if not packed.weight.dtype.is_floating_point:
            rows = activation.codes.shape[0]
            codes = torch.nn.functional.pad(activation.codes, (0, 0, 0, max(0, 17 - rows)))  # cuBLAS wants more than 16
            sums: Tensor = torch.ops.aten._int_mm(codes, packed.weight)
            return sums[:rows].float() * activation.scale * packed.scale
        codes = activation.codes.view(_dtype(activation.format))
        by_tensor = activation.format.granularity == "tensor"
        if not by_tensor and activation.codes.is_cuda:
            # Row scales after the product: some builds for sm_89 and sm_120 have only the kernel with one scale.
            one = torch.ones((), device=codes.device)
            out: Tensor = torch.ops.aten._scaled_mm(codes, packed.weight, one, one, out_dtype=torch.float32)
            return out * activation.scale * packed.scale
        scale_a = activation.scale.reshape(()) if by_tensor else activation.scale.contiguous()
        scale_b = packed.scale.reshape(()) if by_tensor else packed.scale
        product: Tensor = torch.ops.aten._scaled_mm(codes, packed.weight, scale_a, scale_b, out_dtype=torch.float32)
        return product


def _dtype(format: Format) -> torch.dtype:
    assert isinstance(format.element, Minifloat)
    return _FLOATS[format.element]
