"""Restart sampling: jump back up in noise, solve down again, and let the fresh noise forget old errors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, ClassVar, Literal, NamedTuple

import torch

from fewstep.errors import FewstepError, GridError, unknown
from fewstep.samplers import spacing
from fewstep.samplers.grid import Grid
from fewstep.samplers.lagrange import Basis
from fewstep.samplers.plan import SolverPlan, widened
from fewstep.samplers.schedule import NoiseSchedule, f64
from fewstep.samplers.solver import Multistep, Solver, checked, points_of
from fewstep.samplers.solvers.dpm_solver import DPMSolver


class RestartInterval(NamedTuple):
    """``repeats`` times: re-noise from ``low`` up to ``high``, then solve down again with ``calls`` network calls.

    ``low`` and ``high`` are sigmas in diffusers' convention (sigma/alpha for vp and ve, sigma for flow); ``low`` is moved to
    the grid's nearest level. The published configurations [N, K, t_min, t_max] count points, and Heun's method calls the
    network twice between two of them: they are ``RestartInterval(2 * (N - 1), K, t_min, t_max)``.
    """

    calls: int
    repeats: int
    low: float
    high: float


@dataclass(frozen=True)
class Restart(Solver):
    """``base``, interrupted: whenever the state reaches an interval's low end it is noised again to the high end.

    With (alpha, sigma) at the two ends, the re-noising row is the forward process and calls no network:

        x_high = r x_low + sqrt(sigma_high^2 - r^2 sigma_low^2) z,    r = alpha_high / alpha_low

    Every stretch between two such rows is one grid to ``base``: a multistep history begins after the noise, goes on through
    the low end to where the next noise comes, and keeps full order there; it comes down only at the end of the whole run.
    Without intervals, or with no repeats, the plan is that of ``base``.

    The error that has gathered at the low end shrinks with every pass, because the part of the state that carries it is
    replaced by noise: for Gaussian data of variance s^2 an exactly solved pass multiplies the error of the variance by
    1 - c^2 / v_high and that of the mean by its root, c being the noise row's coefficient and v = alpha^2 s^2 + sigma^2.

    A plan of N grid steps costs N + sum calls * repeats network calls. ``lower_order_below`` of a multistep base is compared
    with the steps of the last stretch alone.

    Source: Restart Sampling for Improving Generative Processes, 2306.14878, algorithm 1. Its samples use Heun's method.
    The authors' code can also scale the noise (``S_noise``, 1.003 for the published EDM results) and add churn within a
    stretch; neither is here, so those results cannot be repeated exactly.
    """

    base: Solver = field(default_factory=DPMSolver)
    intervals: tuple[RestartInterval, ...] = ()
    spacing: Literal["karras", "time"] = "karras"
    """How a pass is laid out: EDM's polynomial in sigma, or even in the schedule's own time (as for Stable Diffusion)."""
    bases: ClassVar[tuple[Basis, ...]] = ("data", "noise")

    def __post_init__(self) -> None:
        intervals = tuple(_checked_interval(entry) for entry in self.intervals)
        object.__setattr__(self, "intervals", intervals)
        if self.spacing not in ("karras", "time"):
            raise FewstepError(unknown("spacing of restart passes", self.spacing, ("karras", "time")))

    @property
    def extra_calls(self) -> int:
        """Network calls on top of those of ``base``."""
        return sum(interval.calls * interval.repeats for interval in self.intervals)

    @property
    def convergence_order(self) -> int:
        """That of ``base``: a pass is as accurate as the steps of its own grid."""
        return self.base.convergence_order

    @property
    def consistent(self) -> bool:
        return self.base.consistent

    def compile(self, schedule: NoiseSchedule, grid: Grid) -> SolverPlan:
        points_of(schedule, grid)
        legs = self.legs(grid)
        plans = [_unlowered(self.base).compile(schedule, leg) for leg in legs[:-1]]
        plans.append(self.base.compile(schedule, legs[-1]))
        return checked(replace(_joined(plans), method=str(self), grid_name=grid.name), strict=self.consistent)

    def legs(self, grid: Grid) -> list[Grid]:
        """The stretches of falling noise, in the order of the run; re-noising joins each to the next.

        Raises:
            GridError: an interval whose high end lies below the grid's level at its low end, or above the model's noise.
        """
        passes: dict[int, list[Grid]] = {}
        for interval in self.intervals:
            # never the first level: nothing has been solved there yet
            levels = grid.noise_levels.detach()[1:]
            if interval.low > 0:
                levels = levels[levels > 0]  # on a coarse grid 0 may be the nearest, and no noise is no noise level
            if not len(levels):
                raise GridError(f"a restart at sigma {interval.low:g} needs a grid of more than one step")
            at = 1 + int((levels - interval.low).abs().argmin())
            if interval.repeats:
                passes.setdefault(at, []).extend([self._pass(interval, grid, at)] * interval.repeats)
        legs: list[Grid] = []
        pieces, done = [], 0
        for at in sorted(passes):
            pieces.append(_part(grid, done, at))
            legs += [_along(pieces), *passes[at][:-1]]
            pieces, done = passes[at][-1:], at
        if done < grid.steps:
            pieces.append(_part(grid, done, grid.steps))
        return [*legs, _along(pieces)]

    def _pass(self, interval: RestartInterval, grid: Grid, at: int) -> Grid:
        schedule = grid.schedule
        low, largest = float(grid.noise_levels[at].detach()), schedule.sigma_range[0]
        if not low < interval.high <= largest * (1 + 1e-9):
            raise GridError(
                f"a restart goes up from sigma {low:.6g} (the grid's level nearest to {interval.low:g}) to at most the "
                f"model's {largest:.6g}; got high={interval.high:g}"
            )
        n, high = interval.calls + 1, schedule.lam_from_sigma(f64([interval.high]))
        if self.spacing == "time":
            first = schedule.t(high)
            lam = schedule.lam(first + spacing.ramp(n)[1:-1] * (grid.t[at] - first))
        else:
            lam = schedule.lam_from_sigma(spacing.karras(interval.high, low, n)[1:-1])
        lam = torch.cat([high, lam, grid.lam[at : at + 1]])
        t = torch.cat([schedule.t(lam[:-1]), grid.t[at : at + 1]])
        return Grid(t, lam, schedule.model_time(t[:-1]), schedule, grid.name)


def _checked_interval(entry: Any) -> RestartInterval:
    try:
        interval = RestartInterval(*entry)
        whole = all(type(n) is int for n in interval[:2])
        if whole and interval.calls >= 1 and interval.repeats >= 0 and 0 <= interval.low < interval.high:
            return interval
    except TypeError:
        pass  # not four numbers
    raise FewstepError(
        "a restart interval is (calls, repeats, low, high) with whole calls >= 1, whole repeats >= 0 and "
        f"0 <= low < high, got {entry!r}"
    )


def _unlowered(solver: Solver) -> Solver:
    """``solver`` for a stretch that does not end the run: orders come down only where the whole run ends."""
    if not isinstance(solver, Multistep):
        return solver
    return replace(solver, lower_order_final=False, euler_at_final=False)


def _part(grid: Grid, begin: int, end: int) -> Grid:
    return Grid(
        grid.t[begin : end + 1], grid.lam[begin : end + 1], grid.model_time[begin:end], grid.schedule, grid.name
    )


def _along(pieces: Sequence[Grid]) -> Grid:
    """One grid along ``pieces``, of which each begins where the one before ends."""
    first, rest = pieces[0], pieces[1:]
    return Grid(
        torch.cat([first.t, *(piece.t[1:] for piece in rest)]),
        torch.cat([first.lam, *(piece.lam[1:] for piece in rest)]),
        torch.cat([piece.model_time for piece in pieces]),
        first.schedule,
        first.name,
    )


def _joined(plans: Sequence[SolverPlan]) -> SolverPlan:
    """``plans`` one after the other, a row of the forward process from the end of each to the start of the next."""
    if len(plans) == 1:
        return plans[0]
    parts = [plans[0]]
    for before, after in pairwise(plans):
        parts += [_renoising(before, after), after]
    columns: dict[str, Any] = {}
    for name in ("state", "output"):
        width = max(getattr(part, name).shape[1] for part in parts)
        columns[name] = torch.cat([widened(getattr(part, name), width) for part in parts])
    for name in ("noise", "constant", "model_time", "in_scale", "evaluate"):
        columns[name] = torch.cat([getattr(part, name) for part in parts])
    for name in ("alpha", "sigma"):  # a re-noising row has no level of its own: it leads from one plan's to the next's
        columns[name] = torch.cat([getattr(plan, name) for plan in plans])
    basis = tuple(b for part in parts for b in part.basis)
    return replace(plans[0], basis=basis, order=min(plan.order for plan in plans), **columns)


def _renoising(before: SolverPlan, after: SolverPlan) -> SolverPlan:
    """The single row from the last state of ``before`` to the first of ``after``."""
    r = after.alpha[0] / before.alpha[-1]
    kept = r * before.sigma[-1]
    noise = torch.sqrt((after.sigma[0] - kept) * (after.sigma[0] + kept))
    state = torch.zeros_like(before.state[:1, :1]) + r
    return replace(
        before,
        state=state,
        output=torch.zeros_like(before.output[:1, :1]),
        noise=noise.reshape(1),
        constant=torch.zeros_like(before.constant[:1]),
        model_time=after.model_time[:1],
        in_scale=torch.ones_like(before.in_scale[:1]),
        evaluate=torch.zeros(1, dtype=torch.bool, device="cpu"),
        basis=before.basis[-1:],
    )
