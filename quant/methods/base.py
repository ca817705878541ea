"""Method: how a plan is made, and what the arrays of its layers are. The executor in :mod:`fewstep.quant.apply` does the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from fewstep.quant.calibration.calls import Call
from fewstep.quant.calibration.inputs import LayerInputs
from fewstep.quant.formats import Format, Integer, Minifloat
from fewstep.quant.layer_plan import LayerPlan
from fewstep.quant.layers.build import layer_arrays, split_parts
from fewstep.quant.plan import QuantPlan, make_plan
from fewstep.quant.sites import Site

SKIPPED = ("edge", "embedding")
"""Roles that every method keeps: few of the weights, and the most of the damage."""
FLAT = ("modulation",)
"""Roles whose inputs are a vector a sample: nothing is gained by quantising that, so only their weights are."""


@dataclass(frozen=True)
class Method:
    """Base of the configs. A frozen value; ``settings()`` goes into the plan's provenance."""

    inputs: ClassVar[bool] = False
    """Whether :meth:`arrays` reads what layers see, so that calibration is needed."""

    def reads(self, site: Site) -> bool:
        """Whether :meth:`arrays` looks at what this layer sees, where there is calibration data."""
        return self.inputs

    def plan(self, model: nn.Module, calls: Sequence[Call] = ()) -> QuantPlan:
        """The formats of a model's layers.

        Raises:
            PlanError: where no layer would be quantised.
        """
        return make_plan(model, self.decide, type(self).__name__, self.settings())

    def decide(self, site: Site) -> LayerPlan | str:
        """One layer's plan, or why it is kept."""
        raise NotImplementedError

    def arrays(self, site: Site, plan: LayerPlan, inputs: LayerInputs | None) -> dict[str, Tensor]:
        """The quantised layer's arrays; nearest rounding unless a method knows better."""
        if plan.splits:
            return rounded_parts(site.module, plan)
        return layer_arrays(site.module, plan)

    def finish(self, model: nn.Module, original: nn.Module, calls: Sequence[Call]) -> dict[str, Any]:
        """Called with the quantised and the float network before anyone else sees them; findings for the report."""
        return {}

    def settings(self) -> dict[str, Any]:
        return {"config": type(self).__name__, **{k: jsonable(v) for k, v in asdict(self).items()}}


def jsonable(value: Any) -> Any:
    """A setting as JSON."""
    if isinstance(value, tuple | list):
        return [jsonable(item) for item in value]
    if isinstance(value, dict):
        return {str(key): jsonable(item) for key, item in value.items()}
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def rounded_parts(layer: nn.Module, plan: LayerPlan) -> dict[str, Tensor]:
    """Arrays of a split layer, each part rounded on its own."""
    from dataclasses import replace

    whole = replace(plan, splits=())
    return {
        f"{i}.{name}": value
        for i, part in enumerate(split_parts(layer, plan.splits))
        for name, value in layer_arrays(part, whole).items()
    }


def fit(format: Format | str, channels: int, least: int = 8) -> Format | None:
    """``format`` with groups that divide ``channels``: as they are, or for integers the largest smaller ones.

    None where there is none of at least ``least`` columns. Blocks of MX and NVFP4 have the size that hardware knows.
    """
    format = Format.parse(format)
    if not format.group or channels % format.group == 0:
        return format
    if isinstance(format.element, Minifloat) and format.scale in ("e4m3", "e8m0"):
        return None
    group = next((g for g in range(format.group, least - 1, -1) if channels % g == 0), None)
    return None if group is None else format.grouped(group)


def storage_of(format: Format) -> Format:
    """What the weights of layers that take no quantised inputs are stored as: the same width, in groups of 64 where narrow."""
    if isinstance(format.element, Integer) and format.element.bits <= 6 and not format.group:
        return format.grouped(64)
    return format
