"""AdaQuant: weights, scales and biases of one layer trained on a few of its inputs, to give its output back.

    min over V, s_w, b:  || W X - Q(W + V; s_w) Q(X) - b ||^2

Source: Improving Post Training Neural Quantization: Layer-wise Calibration and Integer Programming, 2006.10518, sec. 3.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.quant.calibration.inputs import LayerInputs
from fewstep.quant.formats import Quantized, Sign
from fewstep.quant.layer_plan import LayerPlan
from fewstep.quant.layers.build import layer_arrays
from fewstep.quant.methods.base import FLAT, rounded_parts
from fewstep.quant.methods.nearest import Nearest
from fewstep.quant.methods.ranges import clipped, restorable
from fewstep.quant.methods.steps import rounded_through
from fewstep.quant.methods.trial import Trial
from fewstep.quant.sites import Site


@dataclass(frozen=True)
class AdaQuant(Nearest):
    """Layer by layer, by Adam on weights and scales; biases in closed form. Keeps the start where training did not help.

    Attributes:
        steps: of Adam for each layer.
        rate: of the weights, in units of a step of the grid; of the scales, relative.
        tune_bias: whether the mean of the output's error goes into the bias.
    """

    weight: str = "int4:g64"
    activation: str | None = "int8:row"
    steps: int = 100
    rate: float = 0.05
    tune_bias: bool = True
    inputs = True

    def reads(self, site: Site) -> bool:
        return site.role not in FLAT

    def arrays(self, site: Site, plan: LayerPlan, inputs: LayerInputs | None) -> dict[str, Tensor]:
        if plan.splits:
            return rounded_parts(site.module, plan)
        if inputs is None or isinstance(plan.weight.element, Sign):
            return layer_arrays(site.module, plan)
        trial = Trial(site.module, plan, inputs.sample)
        codes = tuned(trial, self.steps, self.rate)
        bias: Tensor | None = site.module.bias
        if self.tune_bias:
            mean = output_shift(trial, codes).to(site.weight)
            bias = mean if bias is None else bias.detach() + mean
        return layer_arrays(site.module, plan, quantized=codes, bias=bias)


def output_shift(trial: Trial, codes: Quantized) -> Tensor:
    """(N,): the mean of what is missing from each output channel, which a bias can give back."""
    missing = trial.target - trial.product(trial.inputs(), codes.decode())
    return missing.mean((0, 2, 3)) if trial.is_conv else missing.mean(0)


def tuned(trial: Trial, steps: int, rate: float) -> Quantized:
    """Codes whose output error is least along the training, the clipped start included."""
    format, rounded = trial.plan.weight, trial.inputs()
    start = clipped(trial.weight, format)
    nearest = format.encode(trial.weight)
    best = min((start, nearest), key=lambda codes: trial.error(rounded, codes.decode()))
    found, least = best, trial.error(rounded, best.decode())
    step = float(best.scale.mean()) * (1.0 if best.tensor_scale is None else float(best.tensor_scale))
    with torch.enable_grad():
        weight = trial.weight.clone().requires_grad_(True)
        stretch = torch.zeros_like(best.scale).requires_grad_(True)
        optimizer = torch.optim.Adam([{"params": [weight], "lr": rate * step}, {"params": [stretch], "lr": rate * 0.1}])
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))  # codes must come to rest
        for i in range(steps):
            scale = best.scale * stretch.exp()
            out = trial.product(rounded, rounded_through(weight, format, scale, best.zero, best.tensor_scale))
            loss = (out - trial.target).square().sum() / max(trial.energy, 1e-30)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            decay.step()
            if i % 10 == 9 or i == steps - 1:
                with torch.no_grad():
                    scale = restorable(best.scale * stretch.exp(), format) if format.scale != "e8m0" else best.scale
                    codes = format.encode(weight, scale, best.zero, best.tensor_scale)
                    error = trial.error(rounded, codes.decode())
                    if error < least:
                        found, least = codes, error
    return found
