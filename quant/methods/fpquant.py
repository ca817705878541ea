"""Small floats whose split into exponent and mantissa, and whose range, are searched for each layer; rounding learned.

Source: Low-Bitwidth Floating Point Quantization for Efficient High-Quality Diffusion Models, 2408.06995.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.errors import FewstepError
from fewstep.quant.calibration.calls import Call
from fewstep.quant.calibration.inputs import LayerInputs, gather
from fewstep.quant.formats import E4M3, E5M2, Format, Minifloat
from fewstep.quant.layer_plan import LayerPlan
from fewstep.quant.layers.build import layer_arrays
from fewstep.quant.methods.base import FLAT, SKIPPED, rounded_parts
from fewstep.quant.methods.nearest import Nearest
from fewstep.quant.methods.ranges import clipped
from fewstep.quant.methods.steps import LearnedRounding
from fewstep.quant.methods.trial import Trial
from fewstep.quant.plan import QuantPlan
from fewstep.quant.sites import Site, sites
from fewstep.quant.views import pixels, weight_matrix

HARDWARE = {8: (E4M3, E5M2), 6: (Minifloat(3, 2), Minifloat(2, 3)), 4: (Minifloat(2, 1),)}
"""The splits that tensor cores multiply."""


@dataclass(frozen=True)
class FPQuant(Nearest):
    """Floats of ``bits`` for weights and ``activation_bits`` for inputs.

    A real exponent bias is a scale, and is searched as the part of the largest magnitude that is kept. The split of the
    weights follows from their own error, that of the inputs from the error of calibration inputs. At 4 bits and below the
    rounding of weights is learned on the layer's output.

    Attributes:
        bits, activation_bits: of a number, 3 to 8; no quantised inputs with ``activation_bits=None``.
        group_size: channels of a weight that share a scale; 0 for a scale a row.
        hardware: only splits that hardware multiplies; else every one, for analysis.
        steps: of learned rounding, 0 to round to the nearest.
    """

    weight: str = "e2m1:row"
    activation: str | None = "e4m3:row"
    keep: tuple[str, ...] = SKIPPED
    bits: int = 4
    activation_bits: int | None = 8
    group_size: int = 64
    hardware: bool = False
    steps: int = 150
    inputs = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for value in (self.bits, self.activation_bits):
            if value is not None and not 3 <= value <= 8:
                raise FewstepError(f"a small float of {value} bits; give 3 to 8")
        grain = f"g{self.group_size}" if self.group_size else "row"
        first = splits(self.bits, self.hardware)[0]
        object.__setattr__(self, "weight", f"{first.name}:{grain}")
        object.__setattr__(
            self,
            "activation",
            None if self.activation_bits is None else f"{splits(self.activation_bits, self.hardware)[0].name}:row",
        )

    def reads(self, site: Site) -> bool:
        return site.role not in FLAT and self.steps > 0

    def plan(self, model: nn.Module, calls: Sequence[Call] = ()) -> QuantPlan:
        plan = super().plan(model, calls)
        there = [site for site in sites(model) if site.name in plan.layers]
        changes: dict[str, LayerPlan | None] = {}
        for site in there:
            layer = plan.layers[site.name]
            matrix = weight_matrix(site.weight).float()
            changes[site.name] = replace(layer, weight=best_split(matrix, layer.weight, self.bits, self.hardware))
        plan = plan.with_layers(changes)
        if self.activation_bits is None:
            return plan
        changes = {}
        quantised = [site for site in there if plan.layers[site.name].activation is not None]
        for site, inputs in gather(model, quantised, calls, rows=256):
            layer = plan.layers[site.name]
            assert layer.activation is not None
            matrix = pixels(inputs.sample, site.shape) if site.is_conv else inputs.sample
            changes[site.name] = replace(
                layer, activation=best_split(matrix, layer.activation, self.activation_bits, self.hardware, clip=False)
            )
        return plan.with_layers(changes)

    def arrays(self, site: Site, plan: LayerPlan, inputs: LayerInputs | None) -> dict[str, Tensor]:
        if plan.splits:
            return rounded_parts(site.module, plan)
        if inputs is None or self.bits > 4:
            return layer_arrays(site.module, plan, quantized=clipped(weight_matrix(site.weight).float(), plan.weight))
        trial = Trial(site.module, plan, inputs.sample, limit=512)
        return layer_arrays(site.module, plan, quantized=learned(trial, self.steps))


def splits(bits: int, hardware: bool) -> list[Minifloat]:
    """Every float of so many bits, the middle split first; E4M3 and E5M2 are those with NaN, as hardware has them."""
    if hardware:
        if bits not in HARDWARE:
            raise FewstepError(
                f"hardware multiplies floats of {', '.join(map(str, sorted(HARDWARE)))} bits, not {bits}"
            )
        return list(HARDWARE[bits])
    known = {(f.exponent, f.mantissa): f for f in (E4M3, E5M2)}
    found = [
        known.get((e, bits - 1 - e)) or Minifloat(e, bits - 1 - e)
        for e in range(1, min(6, bits))
        if 0 <= bits - 1 - e <= 6
    ]  # fmt: skip
    return sorted(found, key=lambda f: abs(f.exponent - bits / 2))


def best_split(matrix: Tensor, format: Format, bits: int, hardware: bool, clip: bool = True) -> Format:
    """The format of least squared error, each with its best clipping."""
    tried = [replace(format, element=kind) for kind in splits(bits, hardware)]

    def error(one: Format) -> float:
        rounded = clipped(matrix, one, grid=10).decode() if clip else one.round(matrix)
        return float((rounded - matrix).double().square().sum())

    return min(tried, key=error)


def learned(trial: Trial, steps: int, rate: float = 0.03, weight_of_decision: float = 0.01) -> Any:
    """Codes by learned rounding, or the nearest ones where those are better."""
    format, rounded = trial.plan.weight, trial.inputs()
    start = clipped(trial.weight, format)
    with torch.enable_grad():
        rounding = LearnedRounding(trial.weight, format, start)
        optimizer = torch.optim.Adam([rounding.v], lr=rate)
        for i in range(steps):
            warm = i < 0.2 * steps
            beta = 20 - 18 * max(0.0, (i / steps - 0.2) / 0.8)
            loss = (trial.product(rounded, rounding.weight()) - trial.target).square().sum() / max(trial.energy, 1e-30)
            if not warm:
                loss = loss + weight_of_decision * rounding.undecided(beta) / rounding.v.numel()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    candidates = (start, format.encode(trial.weight), rounding.decided())
    return min(candidates, key=lambda codes: trial.error(rounded, codes.decode()))
