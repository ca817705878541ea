"""What can be learned of a plan, as unconstrained numbers: where it looks, what it tells the network, what it adds up."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from fewstep.errors import FewstepError, unknown
from fewstep.samplers.grid import Grid
from fewstep.samplers.learn.teaching.problem import noisiest
from fewstep.samplers.plan import SolverPlan
from fewstep.samplers.schedule import NoiseSchedule, f64
from fewstep.samplers.solver import Solver

Part = Literal["grid", "times", "mix", "scale"]
PARTS: tuple[str, ...] = get_args(Part)
WINDOW = 0.5
"""How far a model time may leave its grid point, as a share of the smallest gap beside it (LD3)."""


class Parameters:
    """A plan whose numbers are functions of free, float64 tensors.

    The parts, each zero where the solver's own plan is:

        grid    gaps of the N evaluated lambdas, a softmax: they add up to the training range, with one more gap that no
                step takes, so that the last evaluation may lie anywhere (2405.15506, section 4.1)
        times   offsets in lambda of what the network is told, at most :data:`WINDOW` of a gap; the first is left alone
        mix     shares of past outputs in every row, taken from the newest output, so that rows stay exact for constant
                outputs (2505.21114; 2502.17423)
        scale   factors on every row's state and on the sum of its outputs: rows are then free (BNS, 2403.01329)

    Args:
        solver: what the plan is without ``mix`` and ``scale``; differentiable in the grid.
        grid: where to start; it should end at sigma = 0.
        parts: what is learned.

    Raises:
        FewstepError: an unknown part, or none.
    """

    def __init__(
        self, solver: Solver, schedule: NoiseSchedule, grid: Grid, parts: Sequence[Part] = ("grid", "times", "mix")
    ) -> None:
        for part in parts:
            if part not in PARTS:
                raise FewstepError(unknown("part of a plan", part, PARTS))
        if not parts:
            raise FewstepError(f"nothing is to be learned; name some of {', '.join(PARTS)}")
        self.solver, self.schedule, self.start, self.parts = solver, schedule, grid, tuple(parts)
        n = grid.steps
        self._begin = int(not bool(grid.lam[0].isfinite()))  # flows start at lambda = -inf, which no gap leads from
        evaluated = grid.lam[self._begin : n].detach()
        self._clean = float(schedule.lam(f64(schedule.t_range[1])))
        first = float(evaluated[0])
        if self._begin:  # the first gap is measured from a lambda that lies before every sensible second point
            first = min(noisiest(schedule), first - 0.1)
        knots = torch.cat([f64([first]), evaluated]) if self._begin else evaluated
        span = max(self._clean, float(evaluated[-1])) - first
        slack = max(first + span - float(knots[-1]), 1e-3 * span)  # a gap of 0 could not open again
        gaps = torch.cat([knots.diff(), f64([slack])])
        self._first, self._span = first, float(gaps.sum())
        self._log_gaps = torch.log(gaps / gaps.sum())
        self.values: dict[str, Tensor] = {}
        self._held: dict[str, Tensor] = {}
        told = schedule.lam(schedule.t_from_model_time(grid.model_time.detach()))[self._begin :]
        leaning = ((told - evaluated) / (WINDOW * _room(evaluated))).clamp(-0.99, 0.99)
        self._leaning = torch.cat([torch.zeros(self._begin, dtype=torch.float64), torch.atanh(leaning)])
        sizes: Mapping[str, tuple[int, ...]] = {
            "grid": (len(gaps),), "times": (n,), "mix": (n * (n - 1) // 2,), "scale": (n, 2),
        }  # fmt: skip
        for part in self.parts:
            self.values[part] = torch.zeros(sizes[part], dtype=torch.float64, requires_grad=True)

    def tensors(self) -> list[Tensor]:
        """The free tensors, to be optimised."""
        return list(self.values.values())

    @contextmanager
    def only(self, parts: Sequence[Part]) -> Iterator[None]:
        """Just these parts are free while this is open; the others stay what they are."""
        whole = self.values
        self.values, self._held = (
            {p: whole[p] for p in parts},
            {p: v.detach() for p, v in whole.items() if p not in parts},
        )
        try:
            yield
        finally:
            self.values, self._held = whole, {}

    def _value(self, part: str) -> Tensor | None:
        return self.values.get(part, self._held.get(part))

    def vector(self) -> Tensor:
        """All free numbers in one detached vector."""
        return torch.cat([v.detach().reshape(-1) for v in self.tensors()])

    def set(self, vector: Tensor) -> None:
        """Give the free numbers the values of :meth:`vector`'s result."""
        with torch.no_grad():
            at = 0
            for v in self.tensors():
                v.copy_(vector[at : at + v.numel()].reshape(v.shape))
                at += v.numel()

    def grid(self) -> Grid:
        """The grid as it is now; carries gradients where it is learned."""
        n, b = self.start.steps, self._begin
        lam = self.start.lam
        moved, shifts = self._value("grid"), self._value("times")
        if moved is not None:
            share = torch.softmax(self._log_gaps + moved, 0).cumsum(0)[:-1]
            inner = self._first + self._span * share
            lam = torch.cat([lam[:1], inner, lam[n:]])
        t = self.schedule.t(lam)
        told = lam[:n]
        shifts = self._leaning if shifts is None else self._leaning + shifts
        shifts = torch.cat([torch.zeros_like(shifts[:1]), shifts[1:]])  # the first is pure noise, as it says
        told = torch.cat([told[:b], told[b:] + torch.tanh(shifts[b:]) * WINDOW * _room(told[b:])])
        told_t = torch.cat([t[:b], self.schedule.t(told[b:].clamp(max=max(self._clean, float(self.start.lam[n - 1]))))])
        return Grid(t, lam, self.schedule.model_time(told_t), self.schedule, "learned")

    def plan(self) -> SolverPlan:
        """The plan as it is now."""
        plan = self.solver.compile(self.schedule, self.grid())
        mix, scale = self._value("mix"), self._value("scale")
        if mix is None and scale is None:
            return plan
        n = plan.steps
        output = torch.nn.functional.pad(plan.output, (0, n - plan.output.shape[1]))
        state = plan.state
        weight = output.sum(1, keepdim=True)
        if mix is not None:
            i, k = torch.tril_indices(n, n, -1)  # row i takes from the output k + 1 steps back
            older = torch.zeros(n, n, dtype=torch.float64).index_put((i, k + 1), mix)
            output = output + weight * torch.cat([-older[:, 1:].sum(1, keepdim=True), older[:, 1:]], 1)
        if scale is not None:
            on_state, on_outputs = scale.unbind(1)
            state = state * (1 + on_state[:, None])
            newest = torch.zeros_like(output)
            newest[:, 0] = 1
            output = output + newest * weight * on_outputs[:, None]
        return replace(plan, state=state, output=output, method=f"learned from {plan.method}")

    def frozen(self, provenance: Mapping[str, Any] | None = None) -> SolverPlan:
        """The plan as it is now, without gradients."""
        with torch.no_grad():
            plan = self.plan()
            fields: dict[str, Any] = {
                name: getattr(plan, name).detach().clone()
                for name in ("state", "output", "alpha", "sigma", "model_time", "in_scale")
            }  # fmt: skip
            return replace(plan, **fields, provenance=dict(provenance or {})).validate(strict=False)


def _room(lam: Tensor) -> Tensor:
    """The smaller gap beside each of these lambdas."""
    gaps = lam.diff()
    if not len(gaps):
        return torch.ones_like(lam)
    return torch.cat([gaps[:1], torch.minimum(gaps[:-1], gaps[1:]), gaps[-1:]])
