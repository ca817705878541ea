"""Time embeddings apart from the rest: they see a finite set of inputs, one for each time, and nothing but times.

Source: TFMQ-DM: Temporal Feature Maintenance Quantization for Diffusion Models, 2311.16503.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from fewstep.errors import FewstepError, PlanError
from fewstep.quant.calibration.calls import Call
from fewstep.quant.calibration.inputs import LayerInputs
from fewstep.quant.layer_plan import LayerPlan
from fewstep.quant.layers.base import QuantLayer
from fewstep.quant.layers.build import layer_arrays
from fewstep.quant.methods.base import FLAT, fit
from fewstep.quant.methods.gptq import chosen
from fewstep.quant.methods.nearest import Nearest
from fewstep.quant.methods.times import input_scales, stored, time_bins
from fewstep.quant.plan import QuantPlan
from fewstep.quant.sites import Site, canonical

PARTS = ("time_embedding", "time_emb_proj", "time_embed", "timestep_embedder", "time_projection")
"""Segments of diffusers' names whose linear layers see times. ``time_emb_proj`` sees classes too where a model has some."""
ACTIVATION = "int8:tensor"


def is_temporal(site: Site) -> bool:
    """Whether a layer is part of the time embedding."""
    return _named(site.name) and not site.is_conv


def _named(name: str) -> bool:
    return any(part in PARTS for part in name.split("."))


def temporal_plan(method: Nearest, site: Site) -> LayerPlan | str:
    """A temporal layer in the method's weight format, 8-bit inputs with stored scales; why it is kept where it cannot be."""
    weight = fit(method.weight, site.shape[1])
    if weight is None:
        return f"{site.shape[1]} inputs do not divide into the groups of {method.weight}"
    return stored(LayerPlan(weight, ACTIVATION))  # type: ignore[arg-type]


def with_temporal(plan: QuantPlan, calls: Sequence[Call]) -> QuantPlan:
    """The plan with an input scale for every time that the calls are told, in the temporal layers."""
    mine = {name: layer for name, layer in plan.layers.items() if _named(name)}
    if not mine:
        raise PlanError(f"{plan.model} has no layer whose name says that it embeds times ({', '.join(PARTS)})")
    times = time_bins(calls, len(calls))
    return plan.with_layers({name: replace(layer, times=times) for name, layer in mine.items()})


def train_temporal(
    model: nn.Module,
    original: nn.Module,
    calls: Sequence[Call],
    iterations: int,
    rate: float,
    *,
    with_output: bool,
) -> dict[str, Any]:
    """Train the temporal layers, weights, biases and input scales, to give back their own outputs.

    Args:
        with_output: whether the network's output counts as well.

    Source: 2311.16503, sec. 4.2 (without), 2402.03666, sec. 4.4 (with).
    """
    from fewstep.quant.training.distil import Schedule, distil
    from fewstep.quant.training.layers import Trainable

    layers = {
        path: (original.get_submodule(path), Trainable("full"))
        for path, layer in model.named_modules()
        if isinstance(layer, QuantLayer) and _named(canonical(path))
    }
    schedule = Schedule(iterations, rate, rows=2, features=list(layers), mimic=1.0, blind=not with_output)
    return distil(model, original, layers, calls, schedule)


@dataclass(frozen=True)
class TFMQ(Nearest):
    """Time embeddings quantised too, apart from everything else.

    Their inputs have a stored scale for every calibrated time, and their weights are trained to give back what they give the
    blocks: all their outputs together, since one feeds the other. Every other layer is rounded, or has GPTQ's codes.

    Attributes:
        iterations: of the training of the embeddings.
        rate: of their weights, in steps of their grid an iteration.
        gptq: whether the other layers' codes are GPTQ's.

    Source: TFMQ-DM, 2311.16503, sec. 4.2 (reconstruction of the temporal information block) and 4.3 (finite sets).
    """

    weight: str = "int4:g64"
    activation: str | None = "int8:row"
    conv_activation: str | None = "zint8:row"
    iterations: int = field(default=200, kw_only=True)
    rate: float = field(default=0.02, kw_only=True)
    gptq: bool = field(default=False, kw_only=True)
    inputs = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.iterations < 0:
            raise FewstepError(f"iterations is {self.iterations}; give 0 or more")
        if self.split_shortcuts:
            raise FewstepError("split layers are not told times; give split_shortcuts=False")

    def kept(self, site: Site) -> str | None:
        return None if is_temporal(site) else super().kept(site)

    def decide(self, site: Site) -> LayerPlan | str:
        return temporal_plan(self, site) if is_temporal(site) else super().decide(site)

    def plan(self, model: nn.Module, calls: Sequence[Call] = ()) -> QuantPlan:
        return with_temporal(super().plan(model, calls), calls)

    def reads(self, site: Site) -> bool:
        return is_temporal(site) or (self.gptq and site.role not in FLAT)

    def arrays(self, site: Site, plan: LayerPlan, inputs: LayerInputs | None) -> dict[str, Tensor]:
        if plan.static:
            return layer_arrays(site.module, plan, extra=input_scales(site, plan, inputs))
        return layer_arrays(site.module, plan, quantized=chosen(site, plan, inputs) if self.gptq else None)

    def finish(self, model: nn.Module, original: nn.Module, calls: Sequence[Call]) -> dict[str, Any]:
        if not self.iterations:
            return {}
        return train_temporal(model, original, calls, self.iterations, self.rate, with_output=False)
