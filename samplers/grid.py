"""A grid: the times at which a solver evaluates the network, as a value."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fewstep.artifact import read_json, write_json
from fewstep.errors import ArtifactError, GridError, unknown
from fewstep.samplers import spacing
from fewstep.samplers.scalar import Scalar, value
from fewstep.samplers.schedule import DiscreteVP, Flow, NoiseSchedule, f64
from fewstep.samplers.spacing import timesteps as spaced_timesteps
from fewstep.samplers.spelling import parse_call

Rule = Callable[[float, float, int], Tensor]
"""(largest, smallest, N) -> N sigmas."""
Terminal = Literal["zero", "sigma_min"]
NAMES = (
    *spacing.SPACINGS, "karras", "exponential", "beta", "lu", "uniform_lambda",
    "ays", *(f"ays:{family}" for family in spacing.AYS_SIGMAS),
)  # fmt: skip
"""Names that :meth:`Grid.named` and the schedulers' ``grid=`` accept, beside a path to a saved grid."""
_OPTIONS = {"karras": ("rho", "low"), "exponential": ("low",), "lu": ("low",), "beta": ("a", "b", "low")}
"""What can be given to a name: ``karras(rho=5, low=0.1)``."""


def parse_grid(name: str) -> tuple[str, dict[str, float]]:
    """(rule, options) of a grid's name: ``karras(rho=5, low=0.1)`` and the plain ones; a path is its own rule.

    Raises:
        GridError: unknown name or option, or an option that is no positive number.
    """
    if name in NAMES or name.endswith(".json"):
        return name, {}
    rule, options = parse_call(name, "grid") if "(" in name else (name, {})
    if rule not in _OPTIONS:
        if rule in NAMES:
            raise GridError(f"the grid {rule} takes no options, got {name!r}")
        raise GridError(unknown("grid", rule, (*NAMES, "a path ending in .json")))
    for key, number in options.items():
        if key not in _OPTIONS[rule]:
            raise GridError(unknown(f"option of the grid {rule}", key, _OPTIONS[rule]))
        if isinstance(number, bool) or not isinstance(number, (int, float)) or not number > 0:
            raise GridError(f"{key} of the grid {rule} is a positive number, got {number!r}")
    return rule, options


class Point(NamedTuple):
    """One time of a grid."""

    t: Scalar
    alpha: Scalar
    sigma: Scalar
    lam: Scalar

    @property
    def rho(self) -> Scalar:
        return self.sigma / self.alpha if value(self.alpha) else math.inf

    @property
    def pure_noise(self) -> bool:
        """Whether alpha = 0 (flow time 1, zero terminal SNR): eps says nothing about where to go from here, x0 does."""
        return value(self.lam) == -math.inf

    @property
    def clean(self) -> bool:
        """Whether sigma = 0."""
        return value(self.lam) == math.inf


@dataclass(frozen=True, eq=False)
class Grid:
    """N + 1 strictly decreasing noise levels and the N times that the network is told.

    The first N levels are where the network is evaluated, the last is where the trajectory ends (often sigma = 0).
    Built by the constructors below; a grid that a user gives is taken as it is and never shifted again.

    All tensors are float64 on the host. A grid whose tensors require gradients stays differentiable through
    ``Solver.compile`` and the executor.
    """

    t: Tensor
    """(N+1,) times of the schedule."""
    lam: Tensor
    """(N+1,) lambda = log(alpha/sigma); the last is +inf where the trajectory ends at sigma = 0."""
    model_time: Tensor
    """(N,) what the network is fed; usually ``schedule.model_time(t)``, but it may differ (LD3, Time-Shift)."""
    schedule: NoiseSchedule
    name: str = "custom"

    def __post_init__(self) -> None:
        for what, values in (("lambda", self.lam), ("model time", self.model_time)):
            if values.ndim != 1:
                raise GridError(f"a grid's {what} is a list of numbers, got shape {tuple(values.shape)}")
            if bool(values.isnan().any()):
                raise GridError(f"{what} at index {int(values.isnan().nonzero()[0])} is NaN")
        if len(self.lam) < 2 or len(self.model_time) != len(self.lam) - 1 or len(self.t) != len(self.lam):
            raise GridError(
                "a grid of N steps has N + 1 times and N model times, N >= 1; "
                f"got {len(self.t)} times, {len(self.lam)} lambdas and {len(self.model_time)} model times"
            )
        falls = self.lam.detach().diff() > 0
        if not bool(falls.all()):
            i = int((~falls).nonzero()[0])
            sigmas = self.noise_levels.tolist()
            kind = "repeats" if sigmas[i + 1] == sigmas[i] else "increases"
            raise GridError(
                f"noise must strictly decrease; it {kind} at index {i + 1}: "
                f"sigma {sigmas[i]:.6g} is followed by {sigmas[i + 1]:.6g}"
            )

    # -- what is asked of a grid --------------------------------------------------------------------------------------
    @property
    def steps(self) -> int:
        """N, the number of intervals."""
        return len(self.model_time)

    @property
    def alpha(self) -> Tensor:
        """(N+1,) alpha of x_t = alpha x0 + sigma eps."""
        return self.schedule.alpha_sigma(self.lam)[0]

    @property
    def sigma(self) -> Tensor:
        """(N+1,) sigma of x_t = alpha x0 + sigma eps."""
        return self.schedule.alpha_sigma(self.lam)[1]

    @property
    def noise_levels(self) -> Tensor:
        """(N+1,) sigmas in diffusers' convention: sigma/alpha for vp and ve, sigma for flow."""
        return self.schedule.sigma_from_lam(self.lam)

    def points(self) -> list[Point]:
        """The N + 1 times with their alpha, sigma and lambda: floats, or tensors where the grid carries gradients."""
        columns = (self.t, self.alpha, self.sigma, self.lam)
        rows = zip(*(c.unbind() if self.lam.requires_grad else c.tolist() for c in columns), strict=True)
        return [Point(*row) for row in rows]

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Point]:
        return iter(self.points())

    def tail(self, begin: int) -> Grid:
        """The grid from step ``begin`` on (image to image)."""
        if not 0 <= begin < self.steps:
            raise GridError(f"begin index {begin} is outside a grid of {self.steps} steps (0 to {self.steps - 1})")
        return Grid(self.t[begin:], self.lam[begin:], self.model_time[begin:], self.schedule, self.name)

    def with_model_time(self, model_time: Tensor | Sequence[float]) -> Grid:
        """The same grid, but the network is told ``model_time`` (N numbers)."""
        return Grid(self.t, self.lam, f64(model_time), self.schedule, f"{self.name}+model_time")

    def __repr__(self) -> str:
        return str(self)  # a notebook shows it; the arrays are attributes

    def __str__(self) -> str:
        rows = [f"Grid {self.name}: {self.steps} steps, {self.schedule.family}"]
        for i, (lam, sigma) in enumerate(zip(self.lam.tolist(), self.noise_levels.tolist(), strict=True)):
            time = f"{self.model_time[i].item():>10.4f}" if i < self.steps else " " * 10
            rows.append(f"  {i:>3} model_time {time}  sigma {sigma:>12.6g}  lambda {lam:>9.4f}")
        return "\n".join(rows)

    # -- constructors from given values -------------------------------------------------------------------------------
    @classmethod
    def lambdas(cls, schedule: NoiseSchedule, lam: Tensor | Sequence[float], *, name: str = "custom") -> Grid:
        """From N + 1 increasing lambdas; the last may be ``math.inf`` (sigma = 0)."""
        lam = f64(lam)
        t = schedule.t(lam)
        return cls(t, lam, schedule.model_time(t[:-1]), schedule, name)

    @classmethod
    def sigmas(
        cls,
        schedule: NoiseSchedule,
        sigmas: Tensor | Sequence[float],
        *,
        terminal: Terminal = "zero",
        name: str = "sigmas",
    ) -> Grid:
        """From decreasing sigmas in diffusers' convention (rho for vp and ve, sigma for flow), taken as they are.

        A list that does not end at 0 gets its end from ``terminal``: 0, or the smallest training sigma.

        Raises:
            GridError: a value that is NaN, negative, above 1 for flow, repeated or increasing, named with its index.
        """
        values = f64(sigmas).reshape(-1)
        ok = (values >= 0) & (values <= (1 if schedule.family == "flow" else math.inf))
        if not bool(ok.all()):
            i = int((~ok).nonzero()[0])
            allowed = "between 0 and 1 for flow matching" if schedule.family == "flow" else "at least 0"
            raise GridError(f"sigma at index {i} is {values[i].item()}; sigmas must be numbers {allowed}")
        return cls.lambdas(schedule, schedule.lam_from_sigma(_close(schedule, values, terminal)), name=name)

    @classmethod
    def timesteps(
        cls,
        schedule: NoiseSchedule,
        timesteps: Tensor | Sequence[float],
        *,
        terminal: Terminal = "zero",
        name: str = "timesteps",
    ) -> Grid:
        """From N decreasing model times (training indices, possibly fractional), taken as they are.

        Raises:
            GridError: a time outside the training range, repeated or increasing, named with its index.
        """
        tau = f64(timesteps).reshape(-1)
        hi, lo = schedule.model_time(f64(schedule.t_range)).tolist()
        lo = min(lo, 0.0)
        margin = 1e-6 * max(1.0, abs(hi))  # what float32 makes of an end
        inside = (tau <= hi + margin) & (tau >= lo - margin)
        if not bool(inside.all()):
            i = int((~inside).nonzero()[0])
            raise GridError(f"timestep at index {i} is {tau[i].item()}; this model's lie between {lo:g} and {hi:g}")
        t = schedule.t_from_model_time(tau.clamp(lo, hi))
        lam = torch.cat([schedule.lam(t), _terminal_lam(schedule, terminal)])
        return cls(torch.cat([t, schedule.t(lam[-1:])]), lam, tau, schedule, name)

    # -- constructors by rule -----------------------------------------------------------------------------------------
    @classmethod
    def uniform_t(
        cls,
        schedule: NoiseSchedule,
        n: int,
        *,
        spacing: str = "trailing",
        convention: Literal["dpm", "ddim"] = "dpm",
        offset: int = 0,
        terminal: Terminal = "zero",
        lambda_min_clipped: float = -math.inf,
    ) -> Grid:
        """Uniform in the model's time: diffusers' ``timestep_spacing`` to the letter.

        ``linspace``, ``leading`` and ``trailing`` are those of the DPM-Solver family or, with ``convention="ddim"``, of
        DDIM, PNDM and Euler. For flow models ``linspace`` is FlowMatchEuler's grid (from 1 to the shifted 1/T) and
        ``trailing`` the one that Flux' pipeline asks for (1, 1 - 1/N, ..., 1/N); both are then shifted by the schedule.
        """
        _check_steps(n)
        if isinstance(schedule, Flow):
            if spacing not in ("linspace", "trailing"):
                raise GridError(unknown("timestep_spacing of a flow model", spacing, ("linspace", "trailing")))
            low = 1 / n if spacing == "trailing" else schedule.linspace_end
            values = schedule.shifted(torch.linspace(1, low, n, dtype=torch.float64, device="cpu"))
            return cls.sigmas(schedule, values, terminal=terminal, name=spacing)
        if not isinstance(schedule, DiscreteVP):
            raise GridError(f"{spacing} spacing needs a model with training timesteps; use karras or uniform_lambda")
        total = len(schedule.log_rho)
        usable = int((schedule.log_rho <= -lambda_min_clipped).sum())
        tau = spaced_timesteps(total, n, spacing, dpm=convention == "dpm", offset=offset, last=usable)
        if tau[-1] == 0:  # the smallest training sigma is evaluated already; diffusers would spend a call on a no-op
            terminal = "zero"
        return cls.timesteps(schedule, tau, terminal=terminal, name=spacing)

    @classmethod
    def karras(
        cls, schedule: NoiseSchedule, n: int, *, rho: float = 7.0, low: float | None = None, terminal: Terminal = "zero"
    ) -> Grid:
        """EDM's polynomial spacing between the training sigmas (2206.00364, eq. 5).

        Here and in the three rules that follow, ``low`` is the smallest sigma that is evaluated in place of the smallest of
        training. With ``terminal="zero"`` the last step leads from there to 0: a few steps should not spend one between
        two sigmas that are both nearly 0.
        """
        return cls._between(schedule, n, terminal, "karras", partial(spacing.karras, rho=rho), low)

    @classmethod
    def exponential(
        cls, schedule: NoiseSchedule, n: int, *, low: float | None = None, terminal: Terminal = "zero"
    ) -> Grid:
        """Uniform in log sigma between the training sigmas."""
        return cls._between(schedule, n, terminal, "exponential", spacing.exponential, low)

    @classmethod
    def beta(
        cls,
        schedule: NoiseSchedule,
        n: int,
        *,
        a: float = 0.6,
        b: float = 0.6,
        low: float | None = None,
        terminal: Terminal = "zero",
    ) -> Grid:
        """Beta(a, b) quantiles of sigma between the training sigmas (2407.12173)."""
        return cls._between(schedule, n, terminal, "beta", partial(spacing.beta, a=a, b=b), low)

    @classmethod
    def lu(cls, schedule: NoiseSchedule, n: int, *, low: float | None = None, terminal: Terminal = "zero") -> Grid:
        """diffusers' ``use_lu_lambdas``: N sigmas uniform in log sigma, then the end. Equal to :meth:`exponential`."""
        return cls._between(schedule, n, terminal, "lu", spacing.exponential, low)

    @classmethod
    def uniform_lambda(cls, schedule: NoiseSchedule, n: int, *, terminal: Terminal = "sigma_min") -> Grid:
        """Uniform in lambda over the training range, DPM-Solver's logSNR grid (2206.00927, section 3.4)."""
        _check_steps(n)
        hi, lo = _finite_range(schedule)
        if schedule.family == "flow":
            hi = 1 - lo  # sigma = 1 lies at lambda = -inf; the training step below it is the mirror image of the last
        ends = schedule.lam_from_sigma(f64([hi, lo])).tolist()
        k = n + 1 if terminal == "sigma_min" else n
        lam = ends[0] + spacing.ramp(k) * (ends[1] - ends[0])
        if terminal == "zero":
            lam = torch.cat([lam, f64([math.inf])])
        return cls.lambdas(schedule, lam, name="uniform_lambda")

    @classmethod
    def ays(
        cls,
        schedule: NoiseSchedule,
        n: int,
        *,
        family: Literal["sd", "sdxl", "svd"] = "sd",
        terminal: Terminal = "zero",
    ) -> Grid:
        """Align Your Steps (2404.14507): the published list of ``family``, log-linearly interpolated to n steps."""
        _check_steps(n)
        if schedule.family == "flow":
            raise GridError("Align Your Steps' lists were made for sd, sdxl and svd; a flow model needs another grid")
        return cls.sigmas(schedule, spacing.ays(family, n), terminal=terminal, name=f"ays:{family}")

    @classmethod
    def _between(
        cls, schedule: NoiseSchedule, n: int, terminal: Terminal, name: str, rule: Rule, low: float | None
    ) -> Grid:
        _check_steps(n)
        hi, lo = _finite_range(schedule)
        if isinstance(schedule, Flow):  # between the ends of the shifted grid, as FlowMatchEuler places them
            hi, lo = schedule.shifted(f64([1.0, schedule.linspace_end])).tolist()
        if low is not None:
            if not 0 < low < hi:
                raise GridError(f"the smallest sigma of a grid lies between 0 and the largest, {hi:g}; got low={low!r}")
            lo = float(low)
        k = n + 1 if terminal == "sigma_min" else n  # the smallest sigma is then the end, not an evaluation
        values = rule(hi, lo, k)
        values = values if terminal == "sigma_min" else torch.cat([values, f64([0.0])])
        return cls.lambdas(schedule, schedule.lam_from_sigma(values), name=name)

    @classmethod
    def named(
        cls,
        name: str,
        schedule: NoiseSchedule,
        n: int,
        *,
        convention: Literal["dpm", "ddim"] = "dpm",
        offset: int = 0,
        terminal: Terminal = "zero",
        lambda_min_clipped: float = -math.inf,
    ) -> Grid:
        """The grid that a config names: one of :data:`NAMES`, or the path of a saved grid (which fixes its own length).

        Rules take their options in parentheses: ``karras(rho=5, low=0.1)``, ``exponential(low=0.1)``, ``beta(a=1, b=1)``.

        Raises:
            GridError: unknown name, or a saved grid of another length.
            ArtifactError: a saved grid that cannot be read or belongs to another schedule.
        """
        if name.endswith(".json"):
            grid = cls.load(name, schedule)
            if grid.steps != n:
                raise GridError(f"the grid in {name} has {grid.steps} steps, {n} were asked for")
            return grid
        if name in spacing.SPACINGS:
            return cls.uniform_t(
                schedule, n, spacing=name, convention=convention, offset=offset, terminal=terminal,
                lambda_min_clipped=lambda_min_clipped,
            )  # fmt: skip
        if name == "ays" or name.startswith("ays:"):
            return cls.ays(schedule, n, family=name.partition(":")[2] or "sd", terminal=terminal)  # type: ignore[arg-type]
        if name == "uniform_lambda":
            return cls.uniform_lambda(schedule, n, terminal=terminal)
        rule, options = parse_grid(name)
        made: Grid = getattr(cls, rule)(schedule, n, terminal=terminal, **options)
        return replace(made, name=name)

    # -- files --------------------------------------------------------------------------------------------------------
    def save(self, path: str | Path) -> None:
        """Write the grid as JSON, atomically; floats keep every bit."""
        write_json(
            path,
            "Grid",
            {
                "name": self.name,
                "schedule": self.schedule.identity(),
                "fingerprint": self.schedule.fingerprint,
                "lam": [x if math.isfinite(x) else str(x) for x in self.lam.tolist()],  # JSON has no infinity
                "model_time": self.model_time.tolist(),
            },
        )

    @classmethod
    def load(cls, path: str | Path, schedule: NoiseSchedule) -> Grid:
        """Read a grid that was saved for the same noise schedule.

        Raises:
            ArtifactError: unreadable, of another kind or version, with unknown or missing keys, or for another schedule.
        """
        data = read_json(path, "Grid", required=("name", "schedule", "fingerprint", "lam", "model_time"))
        if data["fingerprint"] != schedule.fingerprint:
            raise ArtifactError(
                f"{path} was made for the schedule {json.dumps(data['schedule'])}, "
                f"this model's is {json.dumps(schedule.identity())}"
            )
        try:
            lam, model_time = (f64([float(x) for x in data[key]]) for key in ("lam", "model_time"))
        except (TypeError, ValueError) as error:
            raise ArtifactError(f"{path} holds something else than numbers in lam or model_time: {error}") from None
        return cls(schedule.t(lam), lam, model_time, schedule, str(data["name"]))


def _check_steps(n: int) -> None:
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise GridError(f"the number of steps must be a positive integer, got {n!r}")


def _terminal_lam(schedule: NoiseSchedule, terminal: Terminal) -> Tensor:
    if terminal == "zero":
        return f64([math.inf])
    if terminal == "sigma_min":
        return schedule.lam(f64([schedule.t_range[1]]))
    raise GridError(unknown("terminal", terminal, ("zero", "sigma_min")))


def _close(schedule: NoiseSchedule, sigmas: Tensor, terminal: Terminal) -> Tensor:
    """``sigmas`` with the end appended, unless it is there."""
    if len(sigmas) == 0:
        raise GridError("a grid needs at least one sigma, got an empty list")
    if sigmas[-1] == 0:
        return sigmas
    return torch.cat([sigmas, schedule.sigma_from_lam(_terminal_lam(schedule, terminal))])


def _finite_range(schedule: NoiseSchedule) -> tuple[float, float]:
    """The training sigmas' range; with zero terminal SNR the largest finite one, which rules in sigma need."""
    hi, lo = schedule.sigma_range
    if math.isinf(hi) and isinstance(schedule, DiscreteVP):
        hi = math.exp(schedule.log_rho[-2].item())
    return hi, lo
