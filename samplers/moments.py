"""Exponential moments: the integrals that every exponential integrator is made of.

    M_k(h, r) = integral_0^h e^{r (u - h)} u^k / k! du

r = 1 is the data-prediction ODE (J_k), r = -1 the noise-prediction ODE (K_k), r = 1 + eta the SDE whose reverse noise
has rate eta. The recursion M_k = (h^k/k! - M_{k-1}) / r loses all digits for small h (a relative error of 2e-6 at
h = 1e-3 for k = 2, even in float64), so small |r h| takes the series instead.
"""

from __future__ import annotations

import math

from fewstep.samplers.scalar import Scalar, expm1, value

_SERIES_BELOW = 2.0  # |r h|; there the recursion is still good to 1e-15 and 32 terms of the series are exact
_TERMS = 32


def exponential_moments(h: Scalar, count: int, r: float) -> list[Scalar]:
    """[M_0, ..., M_{count-1}] at step size ``h`` > 0 (float, or 0-d float64 tensor for gradients).

    ``h = inf`` is allowed for ``count = 1`` and r > 0: M_0 = 1/r, the limit of a step to sigma = 0.
    """
    moments: list[Scalar] = [-expm1(-r * h) / r]
    if abs(r * value(h)) < _SERIES_BELOW:
        return [*moments, *(_series(h, k, r) for k in range(1, count))]
    for k in range(1, count):
        moments.append((h**k / math.factorial(k) - moments[-1]) / r)
    return moments


def _series(h: Scalar, k: int, r: float) -> Scalar:
    """h^(k+1) sum_n (-r h)^n / (n+k+1)!, by Horner's rule."""
    total: Scalar = 0.0
    for n in reversed(range(_TERMS)):
        total = total * (-r * h) + 1 / math.factorial(n + k + 1)
    return total * h ** (k + 1)
