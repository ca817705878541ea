"""torchao's kernels and tensor subclasses, through codes of ours: int8 products, and weights alone in integers or E4M3.

Chosen only by name. On GPUs its int8 product is torch's own, which the backend ``torch`` calls directly; on CPUs it is
slower than decoding.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from fewstep.quant.backends.base import Backend
from fewstep.quant.formats import E4M3, Format, Integer, Quantized

_WORKFLOWS = "torchao.quantization.quantize_.workflows"


class TorchAO(Backend):
    """``int8:row`` by ``int8:row``, and float inputs by ``intN`` in rows or groups, ``int8`` or ``e4m3`` in rows."""

    name: ClassVar[str] = "torchao"
    formats: ClassVar[tuple[tuple[str | None, str], ...]] = (
        ("int8:row", "int8:row"),
        (None, "int8:row"),
        (None, "int4:g64"),
        (None, "fp8"),
    )

    def missing(self, device: torch.device) -> str | None:
        if device.type not in ("cpu", "cuda"):
            return "torchao has kernels for CPUs and NVIDIA GPUs"
        return _import_problem()

    def refuses(self, activation: Format | None, weight: Format) -> str | None:
        element = weight.element
        whole = weight.granularity == "row"
        if activation is None:
            if isinstance(element, Integer) and element.kind == "int" and (whole or weight.group):
                return None
            return (
                None if whole and element == E4M3 else "torchao stores weights as integers or E4M3, without zero points"
            )
        if all(isinstance(f.element, Integer) and f.element.kind == "int" and f.granularity == "row"
               for f in (activation, weight)):  # fmt: skip
            return None
        return "its products of other codes are for the newest GPUs, and other backends have them"

    def pack(self, weight: Quantized) -> Tensor:
        """The tensor subclass that torchao itself would make, of our codes and scales."""
        _, k = weight.shape
        element = weight.format.element
        scale = weight.scale.float()
        made: Tensor
        if element == E4M3:
            codes = weight.codes.view(torch.float8_e4m3fn)
            made = _class("float8.float8_tensor", "Float8Tensor")(
                codes, scale, block_size=[1, k], act_quant_kwargs=None, dtype=torch.float32
            )
            return made
        assert isinstance(element, Integer)
        if not weight.format.group:
            made = _class("int8.int8_tensor", "Int8Tensor")(weight.codes, scale, [1, k], torch.float32)
            return made
        zeros = torch.zeros_like(scale, dtype=torch.int8)
        made = _class("intx.intx_unpacked_to_int8_tensor", "IntxUnpackedToInt8Tensor")(
            weight.codes,
            scale,
            zeros,
            getattr(torch, f"int{element.bits}"),
            (1, k // scale.shape[1]),
            torch.float32,
            None,
        )
        return made

    def product(self, activation: Quantized, packed: Any) -> Tensor:
        multiply = importlib.import_module("torchao.kernel.intmm").int_scaled_matmul
        scale: Tensor = packed.scale
        out: Tensor = multiply(activation.codes.contiguous(), packed.qdata.t(), activation.scale.contiguous())
        return out * scale.reshape(1, -1)

    def floats(self, x: Tensor, packed: Any) -> Tensor:
        out: Tensor = F.linear(x.float(), packed)
        return out


def _class(module: str, name: str) -> Any:
    return getattr(importlib.import_module(f"{_WORKFLOWS}.{module}"), name)


@cache
def _import_problem() -> str | None:
    try:
        for module, name in (
            ("int8.int8_tensor", "Int8Tensor"),
            ("intx.intx_unpacked_to_int8_tensor", "IntxUnpackedToInt8Tensor"),
            ("float8.float8_tensor", "Float8Tensor"),
        ):
            _class(module, name)
    except ModuleNotFoundError:
        return "torchao is not installed, or too old (0.16 at least); pip install 'fewstep[quant]'"
    except Exception as error:  # what a wheel built for another torch raises
        return f"torchao cannot be imported: {type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return None
