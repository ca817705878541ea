"""Quantisation: number formats, quantised layers, plans of mixed precision, and the methods that find them.

Names are loaded on first use, so that a command line that only prints help does not pay for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from fewstep.lazy import load as _load

assert __name__.startswith("fewstep."), "import fewstep.quant instead"

if TYPE_CHECKING:
    from fewstep.quant import kernels as kernels
    from fewstep.quant.allocation.allocate import allocate_bits as allocate_bits
    from fewstep.quant.allocation.allocate import fewest_bits as fewest_bits
    from fewstep.quant.apply import dequantize_ as dequantize_
    from fewstep.quant.apply import quantize_ as quantize_
    from fewstep.quant.attention.plan import AttentionPlan as AttentionPlan
    from fewstep.quant.calibration.calls import Call as Call
    from fewstep.quant.calibration.recording import record as record
    from fewstep.quant.correction import Correction as Correction
    from fewstep.quant.correction import correct_ as correct_
    from fewstep.quant.correction import fit_correction as fit_correction
    from fewstep.quant.correction import remove_correction_ as remove_correction_
    from fewstep.quant.exporters.nunchaku import save_nunchaku_lite as save_nunchaku_lite
    from fewstep.quant.exporters.torchao import to_torchao as to_torchao
    from fewstep.quant.folding import fold_smoothing_ as fold_smoothing_
    from fewstep.quant.folding import unfold_smoothing_ as unfold_smoothing_
    from fewstep.quant.formats import Format as Format
    from fewstep.quant.formats import Quantized as Quantized
    from fewstep.quant.joint import fit_cache as fit_cache
    from fewstep.quant.layer_plan import LayerPlan as LayerPlan
    from fewstep.quant.layers import QuantConv2d as QuantConv2d
    from fewstep.quant.layers import QuantLinear as QuantLinear
    from fewstep.quant.lora import add_lora_ as add_lora_
    from fewstep.quant.lora import remove_lora_ as remove_lora_
    from fewstep.quant.methods.adalog import AdaLog as AdaLog
    from fewstep.quant.methods.adaquant import AdaQuant as AdaQuant
    from fewstep.quant.methods.fpquant import FPQuant as FPQuant
    from fewstep.quant.methods.gptq import GPTQ as GPTQ
    from fewstep.quant.methods.mixdq import MixDQ as MixDQ
    from fewstep.quant.methods.mixed import MixedPrecision as MixedPrecision
    from fewstep.quant.methods.nearest import FP4 as FP4
    from fewstep.quant.methods.nearest import FP6 as FP6
    from fewstep.quant.methods.nearest import FP8 as FP8
    from fewstep.quant.methods.nearest import W4A8 as W4A8
    from fewstep.quant.methods.nearest import Binary as Binary
    from fewstep.quant.methods.nearest import Int4 as Int4
    from fewstep.quant.methods.nearest import Int8 as Int8
    from fewstep.quant.methods.svdquant import SVDQuant as SVDQuant
    from fewstep.quant.methods.temporal import TFMQ as TFMQ
    from fewstep.quant.methods.trained import BinaryDM as BinaryDM
    from fewstep.quant.methods.trained import BitsFusion as BitsFusion
    from fewstep.quant.methods.trained import EfficientDM as EfficientDM
    from fewstep.quant.methods.trained import QuEST as QuEST
    from fewstep.quant.plan import QuantPlan as QuantPlan
    from fewstep.quant.report import QuantReport as QuantReport
    from fewstep.quant.state import plan_of as plan_of
    from fewstep.quant.storage import load_ as load_
    from fewstep.quant.storage import save as save

_MODULES = {
    "allocation.allocate": ("allocate_bits", "fewest_bits"),
    "apply": ("dequantize_", "quantize_"),
    "attention.plan": ("AttentionPlan",),
    "calibration.calls": ("Call",),
    "calibration.recording": ("record",),
    "correction": ("Correction", "correct_", "fit_correction", "remove_correction_"),
    "exporters.nunchaku": ("save_nunchaku_lite",),
    "exporters.torchao": ("to_torchao",),
    "folding": ("fold_smoothing_", "unfold_smoothing_"),
    "formats": ("Format", "Quantized"),
    "joint": ("fit_cache",),
    "layer_plan": ("LayerPlan",),
    "layers": ("QuantConv2d", "QuantLinear"),
    "methods.adalog": ("AdaLog",),
    "methods.adaquant": ("AdaQuant",),
    "methods.fpquant": ("FPQuant",),
    "lora": ("add_lora_", "remove_lora_"),
    "methods.gptq": ("GPTQ",),
    "methods.mixdq": ("MixDQ",),
    "methods.mixed": ("MixedPrecision",),
    "methods.nearest": ("Binary", "FP4", "FP6", "FP8", "Int4", "Int8", "W4A8"),
    "methods.svdquant": ("SVDQuant",),
    "methods.temporal": ("TFMQ",),
    "methods.trained": ("BinaryDM", "BitsFusion", "EfficientDM", "QuEST"),
    "plan": ("QuantPlan",),
    "state": ("plan_of",),
    "report": ("QuantReport",),
    "storage": ("load_", "save"),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "FP4",
    "FP6",
    "FP8",
    "GPTQ",
    "TFMQ",
    "W4A8",
    "AdaLog",
    "AdaQuant",
    "AttentionPlan",
    "Binary",
    "BinaryDM",
    "BitsFusion",
    "Call",
    "Correction",
    "EfficientDM",
    "FPQuant",
    "Format",
    "Int4",
    "Int8",
    "LayerPlan",
    "MixDQ",
    "MixedPrecision",
    "QuEST",
    "QuantConv2d",
    "QuantLinear",
    "QuantPlan",
    "QuantReport",
    "Quantized",
    "SVDQuant",
    "add_lora_",
    "allocate_bits",
    "correct_",
    "dequantize_",
    "fewest_bits",
    "fit_cache",
    "fit_correction",
    "fold_smoothing_",
    "kernels",
    "load_",
    "plan_of",
    "quantize_",
    "record",
    "remove_correction_",
    "remove_lora_",
    "save",
    "save_nunchaku_lite",
    "to_torchao",
    "unfold_smoothing_",
]


def __getattr__(name: str) -> object:
    if name == "kernels":
        return import_module("fewstep.quant.kernels")
    return _load(__name__, _HOME, name)


def __dir__() -> list[str]:
    return list(__all__)
