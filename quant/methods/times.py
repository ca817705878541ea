"""Stored scales of inputs: one for all calls, or one for each of some times."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fewstep.errors import FewstepError
from fewstep.quant.calibration.calls import Call
from fewstep.quant.calibration.inputs import LayerInputs
from fewstep.quant.formats import Format
from fewstep.quant.layer_plan import LayerPlan
from fewstep.quant.plan import QuantPlan
from fewstep.quant.sites import Site
from fewstep.quant.views import pixels

SHRINK = tuple(1 - 0.05 * i for i in range(15))
"""Parts of the range that are tried."""


def time_bins(calls: Sequence[Call], count: int) -> tuple[float, ...]:
    """``count`` times, ascending, that the calls' times are nearest to: all of them, or the means of so many in a row.

    Raises:
        FewstepError: for calls that are told no time.
    """
    found = sorted({call.timestep for call in calls if math.isfinite(call.timestep)})
    if not found or any(not math.isfinite(call.timestep) for call in calls):
        raise FewstepError("input scales by time need calibration calls that are told their time, see quant.record")
    count = min(count, len(found))
    edges = [round(i * len(found) / count) for i in range(count + 1)]
    return tuple(sum(found[a:b]) / (b - a) for a, b in itertools.pairwise(edges))


def stored(plan: LayerPlan, times: Sequence[float] = ()) -> LayerPlan:
    """A layer's plan with one stored scale for the whole input, or one for each time."""
    if plan.activation is None:
        return plan
    whole = replace(plan.activation, granularity="tensor", group=0, scale="f32")
    return replace(plan, activation=whole, static=True, times=tuple(times))


def with_times(plan: QuantPlan, calls: Sequence[Call], count: int) -> QuantPlan:
    """The plan with scales by time in every layer that stores its input scale."""
    if not count:
        return plan
    times = time_bins(calls, count)
    return plan.with_layers({n: replace(layer, times=times) for n, layer in plan.layers.items() if layer.static})


def input_scales(site: Site, plan: LayerPlan, inputs: LayerInputs | None, *, clip: bool = False) -> dict[str, Tensor]:
    """``input_scale`` (T, 1) and, where the format has them, ``input_zero``; (1, 1) where the plan names no times.

    Args:
        clip: whether the range is the part of the largest one with the least squared error on the sample.

    Raises:
        FewstepError: without calibration.
    """
    if inputs is None:
        raise FewstepError("stored input scales follow from calibration; give some, see quant.record")
    assert plan.activation is not None
    found = []
    for i in range(max(1, len(plan.times))):
        mine = [c for c, time in enumerate(inputs.times) if not plan.times or _nearest(plan.times, time) == i]
        mine = mine or list(range(len(inputs.low)))
        ends = torch.stack([inputs.low[mine].min(), inputs.high[mine].max()]).float().reshape(1, 2)
        found.append(
            _clipped(_rows(site, inputs, mine), plan.activation, ends) if clip else _scale(plan.activation, ends)
        )
    scale = torch.cat([s for s, _ in found])
    zeros = [z for _, z in found if z is not None]
    device = site.weight.device
    return {"input_scale": scale.to(device)} | ({"input_zero": torch.cat(zeros).to(device)} if zeros else {})


def _scale(format: Format, ends: Tensor) -> tuple[Tensor, Tensor | None]:
    scale, zero, _ = format.scales(ends)
    return scale, zero


def _clipped(rows: Tensor, format: Format, ends: Tensor) -> tuple[Tensor, Tensor | None]:
    tried = [_scale(format, ends * part) for part in SHRINK]
    return min(tried, key=lambda pair: float((format.round(rows, *pair) - rows).square().sum()))


def _rows(site: Site, inputs: LayerInputs, calls: Sequence[int], limit: int = 512) -> Tensor:
    """Sampled rows (M, K) of some calls."""
    starts = [sum(inputs.counts[:i]) for i in range(len(inputs.counts))]
    rows = torch.cat([inputs.sample[starts[c] : starts[c] + inputs.counts[c]] for c in calls])
    rows = pixels(rows, site.shape) if site.is_conv else rows
    return rows if len(rows) <= limit else rows[torch.linspace(0, len(rows) - 1, limit).long()]


def _nearest(times: Sequence[float], time: float) -> int:
    return min(range(len(times)), key=lambda i: abs(times[i] - time))
