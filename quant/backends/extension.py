"""W4A4 on the 4-bit tensor cores of sm_80 to sm_89, by the CUDA C++ kernel that nvcc builds when it is first asked for."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from fewstep.quant.backends.base import Backend
from fewstep.quant.formats import Format, Integer, Quantized
from fewstep.quant.kernels.cuda.compiler import supported
from fewstep.quant.kernels.cuda.w4a4 import STEP, w4a4_product

if TYPE_CHECKING:
    from fewstep.quant.layers.conv import QuantConv2d
    from fewstep.quant.layers.linear import QuantLinear


class Extension(Backend):
    """``int4`` or ``uint4`` inputs by ``int4`` weights, groups a multiple of 64 columns or whole rows.

    Inputs are quantised by Triton's kernel where there is one, which makes X A^T beside the codes; the branch's other half is a
    matrix product of torch's added to the result. In the kernel, without tensor cores, it would take longer than the codes'
    own product: 32 directions are as many multiplications as 2048 columns are at 64 times the rate.

    Attributes:
        emulate: run the kernel's source on the CPU, slowly, as the tests do.
    """

    name: ClassVar[str] = "cuda"
    formats: ClassVar[tuple[tuple[str | None, str], ...]] = (("int4:g64", "int4:g64"), ("uint4:g64", "int4:g64"))

    def __init__(self, emulate: bool = False) -> None:
        self.emulate = emulate

    def missing(self, device: torch.device) -> str | None:
        if self.emulate:
            return None
        if device.type != "cuda":
            return "4-bit tensor cores are those of NVIDIA GPUs, sm_80 to sm_89"
        usable, why = supported(torch.cuda.get_device_capability(device), "w4a4")
        return None if usable else why

    def refuses(self, activation: Format | None, weight: Format) -> str | None:
        if activation is None:
            return "it multiplies codes by codes"
        a, w = activation.element, weight.element
        if not isinstance(a, Integer) or not isinstance(w, Integer) or (w.kind, w.bits, a.bits) != ("int", 4, 4):
            return "it multiplies 4 bits by 4 bits"
        if a.kind not in ("int", "uint"):
            return "its codes have no zero points"
        sizes = {f.group for f in (activation, weight) if f.group}
        if "tensor" in (activation.granularity, weight.granularity) or len(sizes) > 1 or any(s % STEP for s in sizes):
            return f"it takes a scale a row, or the same groups of a multiple of {STEP} columns"
        return None

    def refuses_shape(self, n: int, k: int) -> str | None:
        return f"it takes {STEP} columns at a time, K={k} is no multiple" if k % STEP else None

    def pack(self, weight: Quantized) -> dict[str, Tensor]:
        return weight.packed()

    def product(self, activation: Quantized, packed: Any) -> Tensor:
        kept = activation.packed()
        return self._product(kept["codes"], kept["scale"], packed, activation.format)

    def linear(self, layer: QuantLinear | QuantConv2d, flat: Tensor) -> Tensor:
        format = layer.plan.activation
        assert format is not None
        if not flat.is_cuda or find_spec("triton") is None or layer.plan.static:
            return super().linear(layer, flat)
        from fewstep.quant.kernels.triton import quantize_rows

        packed = layer.remember(self.name, lambda: self.pack(layer.quantized_weight()))
        rows = quantize_rows(flat, format, smooth=layer.smooth, shift=layer.plan.shift, down=layer.down)
        out = self._product(rows.codes, rows.scale, packed, format)
        if layer.bias is not None:
            out += layer.bias.float()
        if rows.projected is not None and layer.up is not None:
            out += torch.nn.functional.linear(rows.projected, layer.up).float()
        return out.to(flat.dtype)

    def _product(self, codes: Tensor, scale: Tensor, packed: dict[str, Tensor], format: Format) -> Tensor:
        assert isinstance(format.element, Integer)
        signed = format.element.signed
        return w4a4_product(
            codes.view(torch.uint8), scale, packed["codes"], packed["scale"], signed=signed, emulate=self.emulate
        )
