"""Exponential moments: the integrals that every exponential integrator is made of.

    M_k(h, r) = integral_0^h e^{r (u - h)} u^k / k! du

r = 1 is the data-prediction ODE (J_k), r = -1 the noise-prediction ODE (K_k), r = 1 + eta the SDE whose reverse noise
has rate eta. The recursion M_k = (h^k/k! - M_{k-1}) / r loses all digits for small h (a relative error of 2e-6 at
h = 1e-3 for k = 2, even in float64), so small |r h| takes the series instead.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from fewstep.samplers.schedule import f64

_SERIES_BELOW = 2.0  # |r h|; there the recursion is still good to a few 1e-15 and 32 terms of the series are exact
_TERMS = 32


def exponential_moments(h: Tensor, count: int, r: float) -> list[Tensor]:
    """[M_0, ..., M_{count-1}] at step size ``h`` > 0 (0-d float64, differentiable).

    ``h = inf`` is allowed for ``count = 1`` and r > 0: M_0 = 1/r, the limit of a step to sigma = 0.
    """
    if abs(r * float(h.detach())) < _SERIES_BELOW:
        return [-torch.expm1(-r * h) / r, *(_series(h, k, r) for k in range(1, count))]
    moments = [-torch.expm1(-r * h) / r]
    for k in range(1, count):
        moments.append((h**k / math.factorial(k) - moments[-1]) / r)
    return moments


def _series(h: Tensor, k: int, r: float) -> Tensor:
    """sum_n (-r)^n h^(n+k+1) / (n+k+1)!"""
    coefficients, powers = _taylor(k, r)
    return (coefficients * h**powers).sum()


@lru_cache(maxsize=256)
def _taylor(k: int, r: float) -> tuple[Tensor, Tensor]:
    values = [(-r) ** n / math.factorial(n + k + 1) for n in range(_TERMS)]
    return f64(values), f64([float(n + k + 1) for n in range(_TERMS)])
