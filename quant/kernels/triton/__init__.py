"""Triton kernels, for sm_80 to sm_120: fused quantisation, integer and floating products with scales, int8 convolution.

Importing this costs nothing and needs neither Triton nor a device; the functions refuse with one sentence where they cannot
run. Codes and scales lie in memory as :mod:`fewstep.quant.formats` packs them. ``supported(capability, name)`` says what
runs where; docs/kernels.md has the layouts and what is proven of them.
"""

from typing import TYPE_CHECKING

from fewstep.lazy import load as _load

assert __name__.startswith("fewstep."), "import fewstep.quant instead"

if TYPE_CHECKING:
    from fewstep.quant.kernels.triton.attention import int8_attention as int8_attention
    from fewstep.quant.kernels.triton.convolution import int8_conv2d as int8_conv2d
    from fewstep.quant.kernels.triton.floats import fp8_linear as fp8_linear
    from fewstep.quant.kernels.triton.floats import mxfp4_linear as mxfp4_linear
    from fewstep.quant.kernels.triton.floats import mxfp8_linear as mxfp8_linear
    from fewstep.quant.kernels.triton.floats import nvfp4_linear as nvfp4_linear
    from fewstep.quant.kernels.triton.integers import int8_linear as int8_linear
    from fewstep.quant.kernels.triton.integers import w4a4_linear as w4a4_linear
    from fewstep.quant.kernels.triton.integers import w4a8_linear as w4a8_linear
    from fewstep.quant.kernels.triton.integers import w4ax_linear as w4ax_linear
    from fewstep.quant.kernels.triton.rows import MixedRows as MixedRows
    from fewstep.quant.kernels.triton.rows import QuantizedRows as QuantizedRows
    from fewstep.quant.kernels.triton.rows import mixed_order as mixed_order
    from fewstep.quant.kernels.triton.rows import quantize_mixed as quantize_mixed
    from fewstep.quant.kernels.triton.rows import quantize_rows as quantize_rows
    from fewstep.quant.kernels.triton.support import supported as supported
    from fewstep.quant.kernels.triton.tuning import tune as tune

_MODULES = {
    "attention": ("int8_attention",),
    "convolution": ("int8_conv2d",),
    "floats": ("fp8_linear", "mxfp4_linear", "mxfp8_linear", "nvfp4_linear"),
    "integers": ("int8_linear", "w4a4_linear", "w4a8_linear", "w4ax_linear"),
    "rows": ("MixedRows", "QuantizedRows", "mixed_order", "quantize_mixed", "quantize_rows"),
    "support": ("supported",),
    "tuning": ("tune",),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "MixedRows",
    "QuantizedRows",
    "fp8_linear",
    "int8_attention",
    "int8_conv2d",
    "int8_linear",
    "mixed_order",
    "mxfp4_linear",
    "mxfp8_linear",
    "nvfp4_linear",
    "quantize_mixed",
    "quantize_rows",
    "supported",
    "tune",
    "w4a4_linear",
    "w4a8_linear",
    "w4ax_linear",
]


def __getattr__(name: str) -> object:
    return _load(__name__, _HOME, name)


def __dir__() -> list[str]:
    return list(__all__)
