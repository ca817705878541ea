"""Training inputs made the other way round: what the float network drew, with noise that is known added to it again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from fewstep.errors import FewstepError
from fewstep.quant.calibration.calls import Call, Recording
from fewstep.quant.training.judge import float_latents
from fewstep.quant.training.weights import schedule_of
from fewstep.samplers.convert import conversion
from fewstep.samplers.schedule import f64

_SAMPLES = ("sample", "hidden_states")


def noised(model: nn.Module, original: nn.Module, calls: Sequence[Call]) -> tuple[Recording, list[Tensor]]:
    """The recorded calls with x_t = alpha x0 + sigma eps of fresh noise, and what a perfect network would say to them.

    x0 is what the sampler ended with for the same sample. Rows of one sample share the noise.

    Raises:
        FewstepError: for calls that are no recording of a pipeline, or of a noise process that is not known.

    Source: the loss of BitsFusion's stage II, 2406.04333, sec. 4.2.
    """
    schedule = schedule_of(calls)
    if schedule is None or not isinstance(calls, Recording):
        raise FewstepError("stage II adds noise as the sampler's process does; give calibration from quant.record")
    clean = float_latents(model, original, calls.runs)
    generator = torch.Generator().manual_seed(calls.runs.seeds[0])
    made, targets = [], []
    for call in calls:
        assert call.samples is not None
        marginal = schedule.at(schedule.t_from_model_time(f64([call.timestep])))
        alpha, sigma = marginal.alpha, marginal.sigma
        p, q = (float(v) for v in conversion(schedule.prediction, "noise", alpha, sigma, schedule.sigma_data))
        if abs(q) < 1e-6:
            continue  # the output says nothing about the noise here
        rows = torch.tensor(call.samples)
        eps = torch.randn(clean.shape, generator=generator)[rows]
        x = float(alpha) * clean[rows] + float(sigma) * eps
        made.append(with_sample(call, float(schedule.in_scale(sigma)) * x))
        targets.append((eps - p * x) / q)
    return Recording(made, calls.runs), targets


def with_sample(call: Call, x: Tensor) -> Call:
    """The same call of another sample.

    Raises:
        FewstepError: where the call has none of that shape.
    """
    named = next((name for name in _SAMPLES if isinstance(call.kwargs.get(name), Tensor)), "")
    found = call.args[0] if call.args else call.kwargs.get(named)
    if not isinstance(found, Tensor) or found.shape != x.shape:
        raise FewstepError(f"the network takes no sample of shape {tuple(x.shape)}, which its sampler ends with")
    x = x.to(found)
    return replace(call, args=(x, *call.args[1:])) if call.args else replace(call, kwargs={**call.kwargs, named: x})
