"""A plan that somebody made, executed by rounding to the nearest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fewstep.errors import PlanError
from fewstep.quant.calibration.calls import Call
from fewstep.quant.calibration.inputs import LayerInputs
from fewstep.quant.layer_plan import LayerPlan
from fewstep.quant.layers.build import layer_arrays
from fewstep.quant.methods.base import FLAT, Method
from fewstep.quant.methods.gptq import chosen
from fewstep.quant.plan import QuantPlan
from fewstep.quant.sites import Site


@dataclass(frozen=True)
class MixedPrecision(Method):
    """Every layer in the formats of ``plan``, a :class:`QuantPlan` or the path of one, rounded to the nearest.

    With ``gptq`` and calibration data codes are GPTQ's instead. Branches, smoothing and stored input scales need a method that
    finds them; a plan that has some is refused.
    """

    table: QuantPlan | str | Path
    gptq: bool = False

    def reads(self, site: Site) -> bool:
        return self.gptq and site.role not in FLAT

    def plan(self, model: nn.Module, calls: Sequence[Call] = ()) -> QuantPlan:
        plan = self.table if isinstance(self.table, QuantPlan) else QuantPlan.load(self.table)
        for name, layer in plan.layers.items():
            if layer.rank or layer.smooth or layer.static or layer.first_token:
                raise PlanError(
                    f"{name} is planned as {layer}; give the method that calibrates that, a plan alone cannot"
                )
        return plan

    def arrays(self, site: Site, plan: LayerPlan, inputs: LayerInputs | None) -> dict[str, Tensor]:
        if plan.splits or not self.gptq:
            return super().arrays(site, plan, inputs)
        return layer_arrays(site.module, plan, quantized=chosen(site, plan, inputs))

    def settings(self) -> dict[str, Any]:
        return {"config": "MixedPrecision", "gptq": self.gptq}
