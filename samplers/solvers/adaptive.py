"""Adaptive DPM-Solver: step sizes found during the run, and handed back as a plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fewstep.errors import FewstepError
from fewstep.samplers.convert import Hook
from fewstep.samplers.executor import Executor, Run
from fewstep.samplers.grid import Grid
from fewstep.samplers.lagrange import Basis
from fewstep.samplers.plan import SolverPlan
from fewstep.samplers.schedule import NoiseSchedule
from fewstep.samplers.solvers.dpm_solver import DPMSolverSinglestep, SolverType

Model = Callable[[Tensor, Any], Tensor]


class Adaptive(NamedTuple):
    """What :func:`sample_adaptive` returns."""

    sample: Tensor
    """The last state, in the dtype of the noise."""
    plan: SolverPlan
    """The accepted steps: run on the same noise it gives the same sample, on other noise it saves the search."""
    calls: int
    """Network calls in all; ``calls - plan.nfe`` went into rejected steps."""


def sample_adaptive(
    model: Model,
    noise: Tensor,
    schedule: NoiseSchedule,
    *,
    order: int = 3,
    basis: Basis = "data",
    solver_type: SolverType = "midpoint",
    atol: float = 0.0078,
    rtol: float = 0.05,
    first_step: float = 0.05,
    safety: float = 0.9,
    start: float | None = None,
    end: float | None = None,
    to_zero: bool = True,
    max_calls: int = 1000,
    hook: Hook | None = None,
) -> Adaptive:
    """DPM-Solver-12 (``order=2``) or -23 (``order=3``) with steps as long as the tolerances allow.

    A step of order p is compared with the one of order p - 1 that shares its network calls:

        E = max over samples of rms((x_high - x_low) / delta),  delta = max(atol, rtol max(|x_low|, |x_previous low|))

    It is accepted where E <= 1, and in any case h <- safety h E^(-1/p). A rejected step does not call the network again
    at its start. Step sizes follow from the whole batch; to make a sample depend on its noise alone, run the plan.

    Args:
        model: ``model(x, t) -> raw`` as in :func:`fewstep.samplers.sample`.
        noise: standard normal, (batch, ...).
        order, basis, solver_type: those of :class:`DPMSolverSinglestep`.
        atol, rtol: the authors' defaults are for images in [-1, 1].
        first_step: h of the first trial, in lambda.
        start, end: lambdas of the trajectory; by default the training range (the finite part of it).
        to_zero: whether one more call, a first-order step, leads from ``end`` to sigma = 0.
        max_calls: where to give up.
        hook: change of every predicted x0, as in :class:`Executor`. The plan knows nothing of it.

    Raises:
        FewstepError: an order other than 2 and 3, an error that is not a number, or more than ``max_calls`` calls.

    Source: DPM-Solver, 2206.00927, appendix C (adaptive step size); constants as in its code.
    """
    if order not in (2, 3):
        raise FewstepError(f"an adaptive DPM-Solver compares order 2 with 1 or 3 with 2, got order={order!r}")
    own = {"basis": basis, "solver_type": solver_type, "placing": "grid", "lower_order_final": False}
    high, low = (DPMSolverSinglestep(order=p, **own) for p in (order, order - 1))  # type: ignore[arg-type]
    shares = (1 / 2,) if order == 2 else (1 / 3, 2 / 3)
    whole = Grid.uniform_lambda(schedule, 1).lam.tolist()
    lam, end = whole[0] if start is None else float(start), whole[1] if end is None else float(end)
    if not lam < end:
        raise FewstepError(f"lambda grows from start to end, got start={lam:g}, end={end:g}")

    def plan_of(solver: DPMSolverSinglestep, levels: list[float], name: str = "custom") -> SolverPlan:
        return solver.compile(schedule, Grid.lambdas(schedule, levels, name=name))

    walk = _Walk.from_noise(model, noise, plan_of(low, [lam, end]).init_scale, hook, max_calls)
    h, levels = float(first_step), [lam]
    previous = walk.x
    while lam < end:
        # lam + (end - lam) may round to less than end, and no step can be made from there
        t = end if end - lam <= h * (1 + 1e-9) else lam + h
        between = [lam + r * (t - lam) for r in shares]
        where = f"at lambda {lam:g} of {end:g} with steps of {h:.3g}"
        better = walk.run(plan_of(high, [lam, *between, t]), where)
        worse = walk.run(plan_of(low, [lam, *between[: order - 2], t]), where)
        error = _error(better, worse, previous, atol, rtol)
        if error != error:
            raise FewstepError(
                f"the error of the step from lambda {lam:g} to {t:g} is not a number; the network diverged"
            )
        if error <= 1:
            levels += [*between, t]
            previous, lam = worse, t
            walk.accept(better)
        else:
            walk.reject()
        h = min(safety * h * error ** (-1 / order), end - lam) if error else end - lam

    if to_zero:
        levels.append(float("inf"))
        walk.accept(walk.run(plan_of(low, [lam, levels[-1]]), f"at lambda {lam:g}, before sigma = 0"))
    plan = plan_of(high, levels, "adaptive")
    found = {"atol": atol, "rtol": rtol, "batch": len(noise), "calls": walk.calls}
    plan = replace(plan, method=f"adaptive {plan.method}", provenance=found)
    return Adaptive(walk.x.to(noise.dtype), plan, walk.calls)


def _error(better: Tensor, worse: Tensor, previous: Tensor, atol: float, rtol: float) -> float:
    """E of :func:`sample_adaptive`; a step is accepted up to 1."""
    delta = torch.maximum(worse.abs(), previous.abs()).mul_(rtol).clamp_(min=atol)
    return float(((better - worse) / delta).square().flatten(1).mean(1).sqrt().max())


@dataclass
class _Walk:
    """The state that steps are tried from, and the outputs that are known there."""

    model: Model
    x: Tensor
    dtype: torch.dtype
    """What the network is given its states in."""
    hook: Hook | None
    max_calls: int
    raws: list[Tensor] = field(default_factory=list)
    """Outputs at x and at the stages of the step that is being tried: two orders share them."""
    calls: int = 0

    @staticmethod
    def from_noise(model: Model, noise: Tensor, scale: float, hook: Hook | None, max_calls: int) -> _Walk:
        x = noise * scale
        half = noise.dtype in (torch.float16, torch.bfloat16)
        return _Walk(model, x.float() if half else x, noise.dtype, hook, max_calls)

    def run(self, plan: SolverPlan, where: str) -> Tensor:
        """The plan's end from x; only outputs that are not known yet are called for."""
        executor, state, y = Executor(plan, self.hook), Run(), self.x
        for i, tau in enumerate(plan.model_time.tolist()):
            if i == len(self.raws):
                if self.calls == self.max_calls:
                    raise FewstepError(
                        f"no end after {self.max_calls} network calls, {where}; "
                        "allow a larger error (atol, rtol) or more calls (max_calls)"
                    )
                self.calls += 1
                self.raws.append(self.model(executor.model_input(state, y).to(self.dtype), tau))
            y = executor.advance(state, self.raws[i], y)
        return y

    def accept(self, x: Tensor) -> None:
        """Go on from ``x``."""
        self.x, self.raws = x, []

    def reject(self) -> None:
        """Try again from the same state, whose output stays known."""
        self.raws = self.raws[:1]
