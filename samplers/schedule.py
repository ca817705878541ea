"""Noise schedules: what the noise level is at a time, for every family of diffusion model in one notation.

    x_t = alpha(t) x0 + sigma(t) eps,    lambda(t) = log(alpha(t) / sigma(t)),    rho(t) = sigma(t) / alpha(t) = exp(-lambda(t))

A family says how lambda splits into (alpha, sigma); a schedule adds how time maps to lambda:

    vp    alpha^2 + sigma^2 = 1      DDPM, Stable Diffusion            DiscreteVP, ContinuousVP
    ve    alpha = 1                  EDM                               EDM
    flow  alpha = 1 - sigma          rectified flow, SD3, Flux, Sana   Flow

Everything is float64 on the host and differentiable.
"""

from __future__ import annotations

import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fewstep.errors import FewstepError, unknown

Family = Literal["vp", "ve", "flow"]
Prediction = Literal["epsilon", "sample", "v_prediction", "flow_prediction", "edm", "edm_v"]
PREDICTIONS: tuple[str, ...] = ("epsilon", "sample", "v_prediction", "flow_prediction", "edm", "edm_v")


def f64(value: Tensor | float | Sequence[float]) -> Tensor:
    """``value`` as a float64 tensor on the host, whatever the default dtype and device are; gradients are kept."""
    if isinstance(value, Tensor):
        return value.to(device="cpu", dtype=torch.float64)
    return torch.tensor(value, dtype=torch.float64, device="cpu")


class Marginal(NamedTuple):
    """The marginal at a time: ``x_t = alpha x0 + sigma eps``, and the derivatives with respect to that time."""

    alpha: Tensor
    sigma: Tensor
    lam: Tensor
    d_alpha: Tensor
    d_sigma: Tensor
    d_lam: Tensor


def alpha_sigma(family: Family, lam: Tensor) -> tuple[Tensor, Tensor]:
    """(alpha, sigma) at log-SNR/2 ``lam``; ``lam = +inf`` gives (1, 0), ``-inf`` gives (0, 1) where the family has one."""
    if family == "vp":
        return torch.exp(0.5 * logsigmoid(2 * lam)), torch.exp(0.5 * logsigmoid(-2 * lam))
    if family == "flow":
        return torch.exp(logsigmoid(lam)), torch.exp(logsigmoid(-lam))
    return torch.ones_like(lam), torch.exp(-lam)


class NoiseSchedule(ABC):
    """A map between a model's own continuous time t and lambda; noise grows with t.

    Concrete: :class:`DiscreteVP`, :class:`ContinuousVP`, :class:`EDM`, :class:`Flow`; usually made by
    :meth:`from_config`. Immutable.
    """

    family: Family
    prediction: Prediction
    """What the network predicts; it travels with the schedule because a plan needs both."""
    sigma_data: float = 1.0
    """Standard deviation of the data in EDM's preconditioning (2206.00364, table 1); unused elsewhere."""
    reverting: bool = False
    """Whether noise is added around a constant tensor mu: x_t = alpha x0 + (1 - alpha) mu + sigma eps."""

    @abstractmethod
    def lam(self, t: Tensor) -> Tensor:
        """lambda at times ``t`` (any shape, float64)."""

    @abstractmethod
    def t(self, lam: Tensor) -> Tensor:
        """The inverse of :meth:`lam`. Beyond the clean end (``lam = inf``) it gives :attr:`t_clean`."""

    @abstractmethod
    def d_lam(self, t: Tensor) -> Tensor:
        """d lambda / d t at times ``t``; at a knot of a tabulated schedule, the derivative towards more noise."""

    @abstractmethod
    def model_time(self, t: Tensor) -> Tensor:
        """The number that the network is fed for time ``t``, e.g. an index, or 1/4 log sigma for EDM."""

    @abstractmethod
    def t_from_model_time(self, tau: Tensor) -> Tensor:
        """The inverse of :meth:`model_time`."""

    @property
    @abstractmethod
    def t_range(self) -> tuple[float, float]:
        """(noisiest, cleanest) time of the training range."""

    @property
    @abstractmethod
    def t_clean(self) -> float:
        """The time that stands for sigma = 0."""

    @property
    def knots(self) -> Tensor:
        """Increasing lambdas between which :meth:`t` is smooth; empty where it is smooth everywhere."""
        return f64([])

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What defines this schedule, as JSON; equal schedules have equal identities."""

    # -- derived ---------------------------------------------------------------------------------------------------
    def alpha_sigma(self, lam: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) at ``lam``, infinite ones included."""
        return alpha_sigma(self.family, lam)

    def slopes(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """(d alpha / d lambda, d sigma / d lambda) where (alpha, sigma) are these."""
        if self.family == "vp":
            return alpha * sigma**2, -sigma * alpha**2
        if self.family == "flow":
            return alpha * sigma, -alpha * sigma
        return torch.zeros_like(sigma), -sigma

    def at(self, t: Tensor | float | Sequence[float]) -> Marginal:
        """alpha, sigma, lambda at times ``t`` and their derivatives with respect to t."""
        t = f64(t)
        lam, d_lam = self.lam(t), self.d_lam(t)
        alpha, sigma = self.alpha_sigma(lam)
        d_alpha, d_sigma = self.slopes(alpha, sigma)
        return Marginal(alpha, sigma, lam, d_alpha * d_lam, d_sigma * d_lam, d_lam)

    def lam_from_sigma(self, sigma: Tensor) -> Tensor:
        """lambda of a sigma in diffusers' convention: rho = sigma/alpha for vp and ve, sigma itself for flow."""
        return torch.log1p(-sigma) - torch.log(sigma) if self.family == "flow" else -torch.log(sigma)

    def sigma_from_lam(self, lam: Tensor) -> Tensor:
        """The inverse of :meth:`lam_from_sigma`."""
        return torch.exp(logsigmoid(-lam)) if self.family == "flow" else torch.exp(-lam)

    @property
    def sigma_range(self) -> tuple[float, float]:
        """(largest, smallest) training sigma in diffusers' convention."""
        hi, lo = self.sigma_from_lam(self.lam(f64(self.t_range))).tolist()
        return hi, lo

    @property
    def scales_input(self) -> bool:
        """Whether :meth:`in_scale` is anything but 1."""
        return self.family == "ve"

    def in_scale(self, sigma: Tensor) -> Tensor:
        """Factor on the state before the network: EDM's c_in = 1/sqrt(sigma^2 + sigma_data^2), else 1."""
        return torch.rsqrt(sigma**2 + self.sigma_data**2) if self.family == "ve" else torch.ones_like(sigma)

    def init_scale(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Factor on standard normal noise that gives the first state (data taken as unit variance for vp)."""
        return torch.sqrt(alpha**2 + sigma**2) if self.family == "vp" else sigma

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of :meth:`identity`, shortened to 16 hexadecimal digits."""
        text = json.dumps(self.identity(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @staticmethod
    def from_config(config: Mapping[str, Any]) -> NoiseSchedule:
        """The schedule of any diffusers scheduler's ``config`` (also a plain dict).

        Reads the beta schedules that diffusers can name, ``trained_betas``, ``rescale_betas_zero_snr``, EDM configs,
        continuous-sigma Euler configs (Stable Video Diffusion) and flow matching in both of diffusers' spellings.

        Raises:
            FewstepError: the config names a beta schedule or a prediction type that does not exist, or a scheduler
                whose process is none of the families.
        """
        from fewstep.samplers.config import schedule_from_config

        return schedule_from_config(config)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, NoiseSchedule) and self.fingerprint == other.fingerprint

    def __hash__(self) -> int:
        return hash(self.fingerprint)


def _check_prediction(prediction: str, allowed: Sequence[str]) -> None:
    if prediction not in allowed:
        raise FewstepError(unknown("prediction type", prediction, allowed))


@dataclass(frozen=True, eq=False)
class DiscreteVP(NoiseSchedule):
    """Variance preserving, tabulated at T training indices; between them log rho is linear in the index.

    That interpolation is the one diffusers uses to place Karras sigmas (``_sigma_to_t``); time is the index, so the
    network is fed a possibly fractional t in [0, T-1]. With zero terminal SNR the last entry has lambda = -inf.
    """

    log_rho: Tensor
    """(T,) float64, increasing: log(sigma/alpha) of the training indices."""
    prediction: Prediction = "epsilon"
    family: Family = field(default="vp", init=False)

    def __post_init__(self) -> None:
        _check_prediction(self.prediction, ("epsilon", "sample", "v_prediction"))
        if len(self.log_rho) < 2 or not bool(self.log_rho[:-1].isfinite().all()):
            raise FewstepError(
                "a table of noise levels needs at least two, and only its last may have zero signal; "
                f"got {len(self.log_rho)} from log rho = {self.log_rho[0].item():g} on"
            )
        if not bool((self.log_rho.diff() > 0).all()):
            at = int((~(self.log_rho.diff() > 0)).nonzero()[0])
            raise FewstepError(f"noise must grow with the training index; it does not from index {at} to {at + 1}")

    def __repr__(self) -> str:
        least, most = self.log_rho[[0, -1]].exp().tolist()
        levels = f"{len(self.log_rho)} noise levels, sigma/alpha {least:.4g} to {most:.4g}"
        return f"DiscreteVP({levels}, predicts {self.prediction})"

    @staticmethod
    def from_betas(
        betas: Tensor | Sequence[float],
        prediction: Prediction = "epsilon",
        zero_snr: bool = False,
        snr_shift: float = 1.0,
    ) -> DiscreteVP:
        """From per-step betas: alpha_bar_t = prod(1 - beta).

        ``snr_shift`` divides the signal-to-noise ratio (CogVideoX's ``snr_shift_scale``), then ``zero_snr`` applies
        2305.08891, algorithm 1.
        """
        bar = torch.cumprod(1 - f64(betas), 0)
        root = (bar / (snr_shift + (1 - snr_shift) * bar)).sqrt()
        if zero_snr:
            root = (root - root[-1]) * root[0] / (root[0] - root[-1])
        bar = root**2
        return DiscreteVP(0.5 * (torch.log1p(-bar) - torch.log(bar)), prediction)

    def lam(self, t: Tensor) -> Tensor:
        i = t.detach().floor().clamp(0, len(self.log_rho) - 2).long()
        low, high = self.log_rho[i], self.log_rho[i + 1]
        w = t - i
        inside = low + torch.where(torch.isinf(high) & (w == 0), torch.zeros_like(w), w * (high - low))
        value = torch.where(torch.isinf(high) & (w == 1), high, inside)
        return torch.where(t <= self.t_clean, torch.full_like(t, math.inf), -value)

    def t(self, lam: Tensor) -> Tensor:
        target = -lam
        i = (torch.searchsorted(self.log_rho, target.detach().contiguous(), right=True) - 1).clamp(
            0, len(self.log_rho) - 2
        )
        low, high = self.log_rho[i], self.log_rho[i + 1]
        value = i + torch.where(torch.isinf(high), torch.zeros_like(target), (target - low) / (high - low))
        value = value.clamp(0, len(self.log_rho) - 1)  # the network knows no index outside the table
        value = torch.where(target >= self.log_rho[-1], torch.full_like(target, len(self.log_rho) - 1.0), value)
        return torch.where(torch.isinf(lam) & (lam > 0), torch.full_like(value, self.t_clean), value)

    def d_lam(self, t: Tensor) -> Tensor:
        i = t.detach().floor().clamp(0, len(self.log_rho) - 2).long()
        return -(self.log_rho[i + 1] - self.log_rho[i])

    def model_time(self, t: Tensor) -> Tensor:
        return t

    def t_from_model_time(self, tau: Tensor) -> Tensor:
        return tau

    @property
    def t_range(self) -> tuple[float, float]:
        return len(self.log_rho) - 1.0, 0.0

    @property
    def t_clean(self) -> float:
        return -1.0  # one index before the first noise level: DDIM's "previous timestep" of the last step

    @property
    def knots(self) -> Tensor:
        return -self.log_rho[self.log_rho.isfinite()].flip(0)

    def identity(self) -> dict[str, Any]:
        # the table at float32: betas whose last float64 bits differ between machines are the same schedule
        digest = hashlib.sha256(torch.exp(-2 * self.log_rho).to(torch.float32).numpy().tobytes()).hexdigest()
        return {"kind": "DiscreteVP", "steps": len(self.log_rho), "table": digest, "prediction": self.prediction}


@dataclass(frozen=True, eq=False)
class ContinuousVP(NoiseSchedule):
    """Variance preserving with rho as its time and 1/4 log rho fed to the network (Stable Video Diffusion)."""

    rho_min: float = 0.002
    rho_max: float = 700.0
    prediction: Prediction = "v_prediction"
    family: Family = field(default="vp", init=False)

    def __post_init__(self) -> None:
        _check_prediction(self.prediction, ("epsilon", "sample", "v_prediction"))
        _check_range(self.rho_min, self.rho_max)

    def lam(self, t: Tensor) -> Tensor:
        return -torch.log(t)

    def t(self, lam: Tensor) -> Tensor:
        return torch.exp(-lam)

    def d_lam(self, t: Tensor) -> Tensor:
        return -1 / t

    def model_time(self, t: Tensor) -> Tensor:
        return 0.25 * torch.log(t)

    def t_from_model_time(self, tau: Tensor) -> Tensor:
        return torch.exp(4 * tau)

    @property
    def t_range(self) -> tuple[float, float]:
        return self.rho_max, self.rho_min

    @property
    def t_clean(self) -> float:
        return 0.0

    def identity(self) -> dict[str, Any]:
        return {"kind": type(self).__name__, "range": [self.rho_min, self.rho_max], "prediction": self.prediction}


@dataclass(frozen=True, eq=False)
class EDM(ContinuousVP):
    """Variance exploding with EDM's preconditioning (2206.00364, table 1): time is sigma, the network sees 1/4 log sigma."""

    rho_max: float = 80.0
    prediction: Prediction = "edm"
    sigma_data: float = 0.5
    family: Family = field(default="ve", init=False)

    def __post_init__(self) -> None:
        _check_prediction(self.prediction, ("edm", "edm_v", "epsilon", "sample"))
        _check_range(self.rho_min, self.rho_max)

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), "sigma_data": self.sigma_data}


@dataclass(frozen=True, eq=False)
class Flow(NoiseSchedule):
    """Rectified flow: time is sigma in (0, 1], the network is fed ``num_train_timesteps * sigma``.

    The timestep shift (SD3's static one, Flux' ``mu``) is a property of grids, not of the process; it is kept here as
    the default that :class:`~fewstep.samplers.Grid`'s constructors apply, once.
    """

    num_train_timesteps: int = 1000
    shift: float = 1.0
    shift_terminal: float | None = None
    prediction: Prediction = "flow_prediction"
    dynamic: bool = False
    """Whether the shift came with the resolution (mu); diffusers' ``linspace`` then ends at 1/T, else at the shifted 1/T."""
    family: Family = field(default="flow", init=False)

    def __post_init__(self) -> None:
        _check_prediction(self.prediction, ("flow_prediction", "epsilon", "sample"))
        if not self.shift > 0:
            raise FewstepError(f"flow shift must be positive, got {self.shift}")

    def shifted(self, sigma: Tensor) -> Tensor:
        """sigma' = s sigma / (1 + (s - 1) sigma), then stretched to end at ``shift_terminal`` when that is set."""
        sigma = self._shift(sigma)
        if self.shift_terminal and sigma[-1] < 1:  # a single sigma = 1 has nothing to stretch
            sigma = 1 - (1 - sigma) * (1 - self.shift_terminal) / (1 - sigma[-1])
        return sigma

    def _shift(self, sigma: Tensor) -> Tensor:
        return self.shift * sigma / (1 + (self.shift - 1) * sigma)

    @property
    def linspace_end(self) -> float:
        """The last of diffusers' default sigmas, before they are shifted (again)."""
        last = 1 / self.num_train_timesteps
        return last if self.dynamic else self._shift(f64(last)).item()

    def lam(self, t: Tensor) -> Tensor:
        return torch.log1p(-t) - torch.log(t)

    def t(self, lam: Tensor) -> Tensor:
        return torch.exp(logsigmoid(-lam))

    def d_lam(self, t: Tensor) -> Tensor:
        return -1 / (t * (1 - t))

    def model_time(self, t: Tensor) -> Tensor:
        return t * self.num_train_timesteps

    def t_from_model_time(self, tau: Tensor) -> Tensor:
        return tau / self.num_train_timesteps

    @property
    def t_range(self) -> tuple[float, float]:
        return 1.0, 1.0 / self.num_train_timesteps

    @property
    def t_clean(self) -> float:
        return 0.0

    def identity(self) -> dict[str, Any]:
        # the shift is left out: a plan made on a shifted grid runs on the same model under any shift
        return {"kind": "Flow", "steps": self.num_train_timesteps, "prediction": self.prediction}


def _check_range(low: float, high: float) -> None:
    if not 0 < low < high:
        raise FewstepError(f"the sigma range needs 0 < sigma_min < sigma_max, got sigma_min={low}, sigma_max={high}")
