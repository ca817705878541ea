"""DPM-Solver-v3's empirical model statistics, estimated from trajectories."""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.errors import FewstepError
from fewstep.samplers.convert import conversion
from fewstep.samplers.learn.teaching.problem import Problem
from fewstep.samplers.solvers.ems import ModelStatistics


def ems(
    problem: Problem, *, samples: int = 32, probes: int = 2, scalar: bool = False, seed: int = 0
) -> ModelStatistics:
    """l, s and b of a model at the teacher's lambdas, from its own trajectories.

        l = E diag(sigma d eps / dx), by Hutchinson's estimator: v * (J' v) with random signs v
        s, b = the least-squares line of df/dlambda on f = (sigma eps - l x) / alpha over samples; df/dlambda is the
               difference quotient along the trajectories

    Args:
        samples: trajectories to use. The paper has about a thousand data points; a number a dimension is noisy with few,
            so with less than 256 take ``scalar``.
        probes: draws of v for every sample and time.
        scalar: one l, s and b for all dimensions: the plan's coefficients are then plain numbers of a far smaller variance.

    Returns:
        For :class:`~fewstep.samplers.EMS`. Learned at this guidance, resolution and noise schedule, and for these only.

    Raises:
        FewstepError: fewer than four finite lambdas, or fewer than two samples.

    Source: DPM-Solver-v3, 2310.13268, section 3.1 and appendix on estimating the statistics.
    """
    some = problem.take(slice(0, samples))
    usable = [i for i in range(len(some.lam)) if bool(some.lam[i].isfinite())]
    if len(usable) < 4 or len(some) < 2:
        raise FewstepError(
            f"statistics need at least four finite lambdas and two samples, got {len(usable)} and {len(some)}"
        )
    lam = some.lam[usable]
    randomness = torch.Generator().manual_seed(seed)
    slopes, scaled = [], []
    for i in usable:
        slope, eps = _slope(some, i, probes, randomness)
        slopes.append(slope.mean() if scalar else slope.mean(0))
        scaled.append(eps)
    linear = torch.stack(slopes)
    alpha, sigma = problem.schedule.alpha_sigma(lam)
    f = torch.stack([
        (sigma[k] * scaled[k] - linear[k] * some.states[i].double()) / alpha[k] for k, i in enumerate(usable)
    ])  # fmt: skip
    # at fixed l: l varies with lambda too, and f is what the solver integrates
    change = torch.stack(torch.gradient(f, spacing=(lam,), dim=0))[0]
    over = tuple(range(1, f.ndim)) if scalar else (1,)
    mean_f, mean_c = f.mean(over, keepdim=True), change.mean(over, keepdim=True)
    variance = (f - mean_f).square().mean(over).clamp(min=1e-12)
    s = ((f - mean_f) * (change - mean_c)).mean(over) / variance
    b = mean_c.squeeze(1) - s * mean_f.squeeze(1) if not scalar else mean_c.reshape(-1) - s * mean_f.reshape(-1)
    return ModelStatistics(
        lam, linear, s, b * (0 if scalar else 1), {**problem.about, "samples": len(some), "probes": probes}
    )


def _slope(problem: Problem, i: int, probes: int, randomness: torch.Generator) -> tuple[Tensor, Tensor]:
    """(diag(sigma d eps / dx) of every sample by Hutchinson's estimator, eps), (n, ...) float64, at the teacher's state i."""
    schedule, at = problem.schedule, problem.lam[i]
    alpha, sigma = schedule.alpha_sigma(at)
    p, q = (float(v) for v in conversion(schedule.prediction, "noise", alpha, sigma, schedule.sigma_data))
    time, scale = float(schedule.model_time(schedule.t(at))), float(schedule.in_scale(sigma))
    x = problem.states[i].detach().clone().requires_grad_()
    with torch.enable_grad():
        eps = p * x + q * problem.network(x * scale, time, problem.which)
        total = torch.zeros_like(eps, dtype=torch.float64)
        for k in range(probes):
            sign = torch.randint(0, 2, x.shape, generator=randomness).to(x) * 2 - 1
            (back,) = torch.autograd.grad(eps, x, sign, retain_graph=k + 1 < probes)
            total = total + (sign * back).double()
    return float(sigma) * total / probes, eps.detach().double()
