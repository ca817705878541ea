"""The beta schedules that diffusers' configs can name, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fewstep.errors import FewstepError, unknown


def _linear(n: int, start: float, end: float) -> Tensor:
    return torch.linspace(start, end, n, dtype=torch.float64, device="cpu")


def _scaled_linear(n: int, start: float, end: float) -> Tensor:
    """Linear in sqrt(beta): Stable Diffusion."""
    return _linear(n, math.sqrt(start), math.sqrt(end)) ** 2


def _sigmoid(n: int, start: float, end: float) -> Tensor:
    """GeoDiff's schedule."""
    return torch.sigmoid(_linear(n, -6, 6)) * (end - start) + start


def _from_alpha_bar(alpha_bar: Callable[[Tensor], Tensor], n: int) -> Tensor:
    """beta_i = 1 - alpha_bar((i+1)/n) / alpha_bar(i/n), capped at 0.999 (2102.09672, section 3.2)."""
    t = torch.arange(n + 1, dtype=torch.float64, device="cpu") / n
    bar = alpha_bar(t)
    return (1 - bar[1:] / bar[:-1]).clamp(max=0.999)


def _cosine(n: int, start: float, end: float) -> Tensor:
    del start, end
    return _from_alpha_bar(lambda t: torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2, n)


def _exp(n: int, start: float, end: float) -> Tensor:
    del start, end
    return _from_alpha_bar(lambda t: torch.exp(-12 * t), n)


def _laplace(n: int, start: float, end: float) -> Tensor:
    del start, end

    def alpha_bar(t: Tensor) -> Tensor:
        lam = -0.5 * torch.copysign(torch.ones_like(t), 0.5 - t) * torch.log(1 - 2 * torch.abs(0.5 - t) + 1e-6)
        return torch.sqrt(torch.exp(lam) / (1 + torch.exp(lam)))

    return _from_alpha_bar(alpha_bar, n)


BETA_SCHEDULES: dict[str, Callable[[int, float, float], Tensor]] = {
    "linear": _linear,
    "scaled_linear": _scaled_linear,
    "squaredcos_cap_v2": _cosine,
    "sigmoid": _sigmoid,
    "laplace": _laplace,
    "exp": _exp,
}


def betas(name: str, n: int, start: float, end: float) -> Tensor:
    """``n`` float64 betas of the schedule ``name``; ``start`` and ``end`` are ignored by those given by alpha_bar."""
    if name not in BETA_SCHEDULES:
        raise FewstepError(unknown("beta schedule", name, BETA_SCHEDULES))
    return BETA_SCHEDULES[name](n, start, end)
