"""A plan that somebody made, executed by rounding to the nearest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from fewstep.errors import PlanError
from fewstep.quant.calibration.calls import Call
from fewstep.quant.methods.base import Method
from fewstep.quant.plan import QuantPlan


@dataclass(frozen=True)
class MixedPrecision(Method):
    """Every layer in the formats of ``plan``, a :class:`QuantPlan` or the path of one, rounded to the nearest.

    Branches, smoothing and stored input scales need a method that finds them; a plan that has some is refused.
    """

    table: QuantPlan | str | Path

    def plan(self, model: nn.Module, calls: Sequence[Call] = ()) -> QuantPlan:
        plan = self.table if isinstance(self.table, QuantPlan) else QuantPlan.load(self.table)
        for name, layer in plan.layers.items():
            if layer.rank or layer.smooth or layer.static or layer.first_token:
                raise PlanError(
                    f"{name} is planned as {layer}; give the method that calibrates that, a plan alone cannot"
                )
        return plan

    def settings(self) -> dict[str, Any]:
        return {"config": "MixedPrecision"}
