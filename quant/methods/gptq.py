"""GPTQ: columns are rounded one after the other, and what is left of each error is put into the columns to come.

Source: GPTQ, 2210.17323, algorithm 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.quant.calibration.inputs import LayerInputs
from fewstep.quant.formats import Format, Minifloat, Quantized, Sign
from fewstep.quant.layer_plan import LayerPlan
from fewstep.quant.layers.build import layer_arrays
from fewstep.quant.methods.base import FLAT, rounded_parts
from fewstep.quant.methods.nearest import Nearest
from fewstep.quant.methods.trial import Trial
from fewstep.quant.sites import Site


@dataclass(frozen=True)
class GPTQ(Nearest):
    """Codes chosen by GPTQ on inputs rounded as they will be; the nearest ones where those are better on the sample.

    Attributes:
        damping: what is added to the diagonal of X^T X, as a part of its mean.
    """

    weight: str = "int4:g64"
    activation: str | None = "int8:row"
    conv_activation: str | None = "zint8:row"
    damping: float = 0.01
    inputs = True

    def reads(self, site: Site) -> bool:
        return site.role not in FLAT

    def arrays(self, site: Site, plan: LayerPlan, inputs: LayerInputs | None) -> dict[str, Tensor]:
        if plan.splits:
            return rounded_parts(site.module, plan)
        return layer_arrays(site.module, plan, quantized=chosen(site, plan, inputs, self.damping))


def chosen(site: Site, plan: LayerPlan, inputs: LayerInputs | None, damping: float = 0.01) -> Quantized | None:
    """GPTQ's codes of a layer's weight, or the nearest where those are better on the sample; None where it cannot tell."""
    grouped = site.is_conv and getattr(site.module, "groups", 1) > 1
    if inputs is None or grouped or not takes(plan.weight):
        return None
    trial = Trial(site.module, plan, inputs.sample, limit=4096)
    rounded = trial.inputs()
    found = gptq(trial.weight, plan.weight, trial.gram(rounded), damping=damping)
    nearest = plan.weight.encode(trial.weight)
    return min((found, nearest), key=lambda codes: trial.error(rounded, codes.decode()))


def takes(format: Format) -> bool:
    """Whether :func:`gptq` can choose codes of a format: signs have no scale before their codes."""
    return not isinstance(format.element, Sign) and (format.scale != "e8m0" or isinstance(format.element, Minifloat))


def gptq(matrix: Tensor, format: Format, gram: Tensor, *, damping: float = 0.01, block: int = 128) -> Quantized:
    """Codes of ``matrix`` that make sum ||(W - Q) X^T||^2 small, with the scales that rounding to the nearest would use.

    Args:
        matrix: (N, K).
        format: of integers or floats.
        gram: (K, K) float64, X^T X of the inputs as they will be.
        damping: what is added to its diagonal, as a part of its mean.
        block: columns between two updates of all columns to come.

    Returns:
        (N, K).
    """
    n, k = matrix.shape
    scale, zero, tensor_scale = format.scales(matrix)
    factor = _factor(gram, damping).to(matrix.device)
    rest, chosen = matrix.double().clone(), torch.empty_like(matrix)
    width = k // format.groups(k)
    for start in range(0, k, block):
        end = min(start + block, k)
        errors = torch.zeros(n, end - start, dtype=torch.float64, device=matrix.device)
        for j in range(start, end):
            g = j // width
            column = rest[:, j : j + 1].float()
            local = Format(format.element, "row", 0, "f32")
            s = scale[:, g : g + 1] * (1.0 if tensor_scale is None else tensor_scale)
            z = None if zero is None else zero[:, g : g + 1]
            rounded = local.round(column, s, z)[:, 0]
            chosen[:, j] = rounded
            errors[:, j - start] = (rest[:, j] - rounded.double()) / factor[j, j]
            rest[:, j + 1 : end] -= errors[:, j - start, None] * factor[j, j + 1 : end]
        rest[:, end:] -= errors @ factor[start:end, end:]
    return format.encode(chosen, scale, zero, tensor_scale)


def _factor(gram: Tensor, damping: float) -> Tensor:
    """The upper Cholesky factor of the inverse of the damped Gram matrix; columns that were never seen are as rounded."""
    gram = gram.clone()
    diagonal = gram.diagonal()
    dead = diagonal == 0
    diagonal[dead] = 1.0
    diagonal += damping * diagonal.mean()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
    upper: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return upper
