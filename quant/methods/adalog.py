"""Powers for what a GELU leaves: mostly small numbers that are hardly ever negative.

Source: AdaLog: Post-Training Quantization for Vision Transformers with Adaptive Logarithm Quantizer, 2407.12951; RepQ-ViT,
2212.08254.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from torch import nn

from fewstep.errors import FewstepError
from fewstep.quant.calibration.calls import Call
from fewstep.quant.calibration.inputs import gather
from fewstep.quant.formats.elements import Element, Integer, Log
from fewstep.quant.layer_plan import LayerPlan
from fewstep.quant.methods.nearest import Nearest
from fewstep.quant.methods.svdquant import GELU_SHIFT, after_gelu
from fewstep.quant.methods.trial import Trial
from fewstep.quant.plan import QuantPlan
from fewstep.quant.sites import sites


@dataclass(frozen=True)
class AdaLog(Nearest):
    """W4A4 whose inputs behind a GELU are shifted to be positive and stored as powers, or unsigned where that is nearer.

    Each such layer takes the base with the least output error on its own inputs. Only the reference computes powers.

    Attributes:
        steps: bases that are tried, in sixteenths of an octave: 16 is log2, 8 RepQ-ViT's log sqrt 2.
    """

    weight: str = "int4:g64"
    activation: str | None = "int4:g64"
    steps: tuple[int, ...] = field(default=(2, 3, 4, 5, 6, 8, 10, 12, 16), kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.activation is None or not self.steps:
            raise FewstepError("AdaLog chooses how inputs are stored; give an activation format and steps")

    def plan(self, model: nn.Module, calls: Sequence[Call] = ()) -> QuantPlan:
        plan = super().plan(model, calls)
        mine = [s for s in sites(model) if s.name in plan.layers and after_gelu(model, s.name)]
        if not mine:
            return plan
        if not calls:
            raise FewstepError("AdaLog chooses bases by what layers see; give calibration, see quant.record")
        changes: dict[str, LayerPlan | None] = {}
        for site, inputs in gather(model, mine, calls, rows=256):
            layer = plan.layers[site.name]
            tried = []
            for choice in self.choices(layer):
                trial = Trial(site.module, choice, inputs.sample, limit=256)
                tried.append((trial.error(trial.inputs(), choice.weight.round(trial.weight)), choice))
            changes[site.name] = min(tried, key=lambda entry: entry[0])[1]
        return plan.with_layers(changes)

    def choices(self, layer: LayerPlan) -> list[LayerPlan]:
        """The layer as it is, unsigned, and with powers."""
        format = layer.activation
        if format is None or not isinstance(format.element, Integer):
            return [layer]
        bits = format.element.bits
        elements: list[Element] = [Integer(bits, "uint"), *(Log(bits, step) for step in self.steps)]
        shifted = [replace(layer, activation=replace(format, element=e), shift=GELU_SHIFT) for e in elements]
        return [layer, *shifted]
