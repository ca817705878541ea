"""Exponential moments against decimal series of 120 digits, quadrature, and their own recursions."""

import math
from decimal import Decimal, getcontext

import pytest
import torch
from scipy.integrate import quad

from fewstep.samplers.moments import _SERIES_BELOW, exponential_moments
from fewstep.samplers.schedule import f64

RATES = (1.0, -1.0, 2.0, 1.5)
STEPS = (1e-8, 1e-6, 1e-4, 1e-3, 1e-2, 0.1, 0.5, 0.99, 1.0, 1.3, 1.34, 1.9, 2.0, 2.1, 3.0, 5.0, 10.0, 20.0)
COUNT = 6
EPS = torch.finfo(torch.float64).eps

# Conditioning, with x = |r h| and m_k = |r|^(k+1) M_k = x^k/k! -+ m_(k-1). From x = 2 on the recursion is used: its
# absolute errors add up to at most 2 eps sum_j max(x^j/j!, m_j) < 30 eps at x = 2, where m_5 > 0.06; larger x is
# better.
# Below, the series' magnitudes sum up to at most 5 times its value.
TOLERANCE = 500 * EPS


def exact(h, k, r):
    """sum_n (-r)^n h^(n+k+1) / (n+k+1)!, all digits: e^40 = 1e17 of cancellation cannot hurt 120 digits."""
    getcontext().prec = 120
    h, r = Decimal(h), Decimal(r)
    term = h ** (k + 1) / math.factorial(k + 1)
    total, n = term, 0
    while abs(term) > abs(total) * Decimal(10) ** -60:
        n += 1
        term = term * (-r) * h / (n + k + 1)
        total += term
    return total


def moments(h, r, count=COUNT):
    return [m.item() for m in exponential_moments(f64(h), count, r)]


@pytest.mark.parametrize("r", RATES)
@pytest.mark.parametrize("h", STEPS)
def test_moments_have_all_digits(h, r):
    for k, m in enumerate(moments(h, r)):
        assert abs(Decimal(m) / exact(h, k, r) - 1) < TOLERANCE, k


@pytest.mark.parametrize("r", RATES)
@pytest.mark.parametrize("h", [0.01, 0.5, 1.7, 3.0, 6.0])
def test_moments_are_the_integrals_that_they_are_named_for(h, r):
    for k, m in enumerate(moments(h, r)):
        value, error = quad(
            lambda u, k=k: math.exp(r * (u - h)) * u**k / math.factorial(k), 0, h, epsabs=0, epsrel=1e-12
        )
        assert abs(m - value) <= 2 * error + TOLERANCE * abs(value)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("h", [0.3, 1.0, 4.0])
def test_sde_recursion(h, eta):
    """S_0 = 1 - e^{-(1+eta)h}, S_k = h^k/k! - S_{k-1}/(1+eta), where S_k = (1+eta) M_k at rate 1 + eta."""
    s = [(1 + eta) * m for m in moments(h, 1 + eta)]
    assert s[0] == pytest.approx(-math.expm1(-(1 + eta) * h), rel=4 * EPS)
    for k in range(1, COUNT):
        # both sides are of the size of S_{k-1}, so that is what the rounding is relative to
        assert abs(s[k] - (h**k / math.factorial(k) - s[k - 1] / (1 + eta))) <= TOLERANCE * s[k - 1]


@pytest.mark.parametrize("h", [0.3, 1.0, 4.0])
def test_noise_recursion(h):
    """K_0 = e^h - 1, K_k = K_{k-1} - h^k/k!."""
    moment = moments(h, -1.0)
    assert moment[0] == pytest.approx(math.expm1(h), rel=4 * EPS)
    for k in range(1, COUNT):
        assert abs(moment[k] - (moment[k - 1] - h**k / math.factorial(k))) <= TOLERANCE * moment[k - 1]


@pytest.mark.parametrize("r", RATES)
def test_series_and_recursion_meet(r):
    h = _SERIES_BELOW / abs(r)
    below, above = math.nextafter(h, 0), math.nextafter(h, math.inf)
    for low, high in zip(moments(below, r), moments(above, r), strict=True):
        assert high == pytest.approx(low, rel=TOLERANCE)


@pytest.mark.parametrize("r", RATES)
@pytest.mark.parametrize("h", [1e-4, 0.3, 0.9, 1.9, 2.5, 5.0])
def test_derivatives_are_exact(h, r):
    """d/dh of integral_0^h e^{r(u-h)} u^k/k! du is h^k/k! - r M_k; it is subtracted here, hence relative to h^k/k!."""
    x = f64(h).requires_grad_()
    for k, m in enumerate(exponential_moments(x, COUNT, r)):
        (slope,) = torch.autograd.grad(m, x, retain_graph=True)
        size = h**k / math.factorial(k) + abs(r * m.item())
        assert abs(slope.item() - (h**k / math.factorial(k) - r * m.item())) <= TOLERANCE * size


def test_a_step_to_no_noise_has_a_zeroth_moment():
    for r in (1.0, 2.0):
        assert moments(math.inf, r, 1) == [1 / r]


@pytest.mark.parametrize("r", RATES)
def test_small_steps_tend_to_the_taylor_terms(r):
    for k, m in enumerate(moments(1e-12, r)):
        assert m / (1e-12 ** (k + 1) / math.factorial(k + 1)) == pytest.approx(1, rel=1e-11)
