"""Where the steps go: the published rules for placing N noise levels between the largest and the smallest.

All return float64 values, noisiest first. Sigmas are in diffusers' convention (rho for vp and ve, sigma for flow).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from fewstep.errors import GridError, unknown
from fewstep.samplers.schedule import f64

SPACINGS = ("linspace", "leading", "trailing")

AYS_SIGMAS: dict[str, tuple[float, ...]] = {
    "sd": (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152),
    "sdxl": (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113),
    "svd": (700.0, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034),
}
"""Align Your Steps' published 10-step lists (2404.14507; NVIDIA's quick-start page), without the final 0."""


def ramp(n: int) -> Tensor:
    """n points from 0 to 1."""
    return torch.linspace(0, 1, n, dtype=torch.float64, device="cpu")


def karras(high: float, low: float, n: int, rho: float = 7.0) -> Tensor:
    """sigma_i = (high^(1/rho) + i/(n-1) (low^(1/rho) - high^(1/rho)))^rho (2206.00364, eq. 5)."""
    a, b = high ** (1 / rho), low ** (1 / rho)
    return torch.pow(a + ramp(n) * (b - a), rho)


def exponential(high: float, low: float, n: int) -> Tensor:
    """Uniform in log sigma. For vp and ve this is uniform in lambda, which Lu et al. call logSNR (2206.00927)."""
    return torch.exp(math.log(high) + ramp(n) * (math.log(low) - math.log(high)))


def beta(high: float, low: float, n: int, a: float = 0.6, b: float = 0.6) -> Tensor:
    """Quantiles of a Beta(a, b) distribution between low and high (Beta sampling is all you need, 2407.12173)."""
    from scipy.stats import beta as distribution

    return low + f64(distribution.ppf(1 - ramp(n).numpy(), a, b).tolist()) * (high - low)


def ays(family: str, n: int) -> Tensor:
    """Align Your Steps' list for ``family`` (sd, sdxl, svd), log-linearly interpolated to n sigmas."""
    if family not in AYS_SIGMAS:
        raise GridError(unknown("Align Your Steps list", family, AYS_SIGMAS))
    known = f64(AYS_SIGMAS[family]).log()
    at = ramp(n) * (len(known) - 1)
    i = at.floor().clamp(max=len(known) - 2).long()
    return torch.exp(known[i] + (at - i) * (known[i + 1] - known[i]))


def timesteps(total: int, n: int, spacing: str, *, dpm: bool, offset: int = 0, last: int | None = None) -> Tensor:
    """n integer training indices, noisiest first, exactly as diffusers spaces them (2305.08891, table 2).

    Args:
        total: number of training timesteps.
        n: number of steps.
        spacing: ``linspace``, ``leading`` or ``trailing``.
        dpm: diffusers has two conventions. The DPM-Solver family (also UniPC, DEIS) lays n + 1 knots and leaves the
            cleanest out; DDIM, PNDM and Euler lay n.
        offset: ``steps_offset``, used by ``leading`` only.
        last: number of usable training timesteps where ``lambda_min_clipped`` cuts the noisiest off. ``trailing`` keeps
            its stride of total / n then, so fewer than n timesteps come out.

    Raises:
        GridError: unknown spacing, or more steps than training timesteps.
    """
    if spacing not in SPACINGS:
        raise GridError(unknown("timestep_spacing", spacing, SPACINGS))
    usable = total if last is None else last
    knots = n + 1 if dpm else n
    if knots > usable:
        raise GridError(f"{n} steps do not fit on {usable} training timesteps; use at most {usable - (knots - n)}")
    # numpy on purpose: which way a tie such as 499.5 rounds depends on how linspace and arange add up
    if spacing == "linspace":
        values = np.linspace(0, usable - 1, knots).round()[::-1][:n] if knots > 1 else np.array([usable - 1.0])
    elif spacing == "leading":
        values = (np.arange(knots) * (usable // knots))[::-1][:n] + offset
    else:
        values = np.arange(usable, 0, -total / n).round() - 1
        values = values[values >= 0]  # for some n rounding makes one too many, which diffusers keeps as timestep -1
    return f64(values.tolist())
