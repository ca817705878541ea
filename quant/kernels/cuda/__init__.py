"""CUDA C++ kernels for what Triton cannot say: 4-bit tensor cores (sm_80 to sm_89) and binary ones, for codes of any width.

Optional. Installing builds nothing: the first call compiles its source with nvcc and keeps the library in the user's cache.
``emulate=True`` compiles the same source for the CPU, where its indices and arithmetic are tested.
"""

from typing import TYPE_CHECKING

assert __name__.startswith("fewstep."), "import fewstep.quant instead"

if TYPE_CHECKING:
    from fewstep.quant.kernels.cuda.bitserial import BitPlanes as BitPlanes
    from fewstep.quant.kernels.cuda.bitserial import bit_planes as bit_planes
    from fewstep.quant.kernels.cuda.bitserial import bitserial_product as bitserial_product
    from fewstep.quant.kernels.cuda.bitserial import plane_products as plane_products
    from fewstep.quant.kernels.cuda.compiler import build as build
    from fewstep.quant.kernels.cuda.compiler import supported as supported
    from fewstep.quant.kernels.cuda.w4a4 import w4a4_product as w4a4_product

_MODULES = {
    "bitserial": ("BitPlanes", "bit_planes", "bitserial_product", "plane_products"),
    "compiler": ("build", "supported"),
    "w4a4": ("w4a4_product",),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = ["BitPlanes", "bit_planes", "bitserial_product", "build", "plane_products", "supported", "w4a4_product"]


def __getattr__(name: str) -> object:
    if name in _HOME:
        import importlib

        return getattr(importlib.import_module(f"fewstep.quant.kernels.cuda.{_HOME[name]}"), name)
    raise AttributeError(f"module 'fewstep.quant.kernels.cuda' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return list(__all__)
