"""How far an error of each network call moves the sample: what training weighs calls by."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from fewstep.errors import FewstepError
from fewstep.quant.calibration.calls import Call, Recording
from fewstep.samplers.convert import conversion
from fewstep.samplers.schedule import NoiseSchedule, f64


def schedule_of(calls: Sequence[Call]) -> NoiseSchedule | None:
    """The noise process of the pipeline that was recorded; None for other calls, and for a process that has no table."""
    if not isinstance(calls, Recording):
        return None
    try:
        return NoiseSchedule.from_config(calls.runs.pipe.scheduler.config)
    except FewstepError:
        return None


def reach(schedule: NoiseSchedule, times: Sequence[float]) -> list[float]:
    """By how much a unit error of the output at each time moves a clean sample of unit variance, to first order.

        |sigma_s alpha_t - sigma_t alpha_s| |q_s| / sigma_s / sqrt(alpha_t^2 + sigma_t^2)

    A first-order step from s to t moves X_t by the first three factors, q_s being what the guess of x0 changes by for one
    unit of the output (alpha = 0 is no singularity then, but for eps). The root is what the rest of the flow shrinks a
    disturbance of X_t by where the data have unit variance.

    Args:
        times: what the network is told, in the order of the calls; a repeated time takes the step of its last call.
    """
    marginal = schedule.at(schedule.t_from_model_time(f64(list(times))))
    alpha, sigma = marginal.alpha, marginal.sigma
    _, q = conversion(schedule.prediction, "data", alpha, sigma, schedule.sigma_data)
    found = []
    for i, time in enumerate(times):
        after = next((j for j in range(i + 1, len(times)) if times[j] != time), None)
        a, s = float(alpha[i]), float(sigma[i])
        b, t = (1.0, 0.0) if after is None else (float(alpha[after]), float(sigma[after]))
        found.append(abs(s * b - t * a) * abs(float(q[i])) / (max(s, 1e-12) * math.hypot(b, t)))
    return found


def call_weights(calls: Sequence[Call], powers: Sequence[float]) -> list[float]:
    """What the error of each call's output is multiplied with; sum of (weight^2 power) over the calls is their number.

    Args:
        calls: of a recording: by :func:`reach`; others are all alike, relative to their own size.
        powers: mean square of the float network's output at each call.
    """
    schedule, times = schedule_of(calls), [call.timestep for call in calls]
    if schedule is None or not all(map(math.isfinite, times)):
        return [1 / math.sqrt(max(power, 1e-30)) for power in powers]
    try:
        weights = torch.tensor(reach(schedule, times), dtype=torch.float64)
    except FewstepError:  # eps at alpha = 0
        weights = torch.full((len(calls),), math.nan, dtype=torch.float64)
    mean = float((weights.square() * torch.tensor(powers, dtype=torch.float64)).mean())
    if not (math.isfinite(mean) and mean > 0):
        return [1 / math.sqrt(max(power, 1e-30)) for power in powers]
    return (weights / math.sqrt(mean)).tolist()
