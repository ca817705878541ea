"""Runs a plan on a problem and keeps everything it saw: with gradients, and from any row on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fewstep.errors import PlanError
from fewstep.samplers.convert import conversion
from fewstep.samplers.learn.teaching.problem import Problem
from fewstep.samplers.plan import SolverPlan


@dataclass(frozen=True)
class Trace:
    """What a run saw: states X_0, ..., X_i and outputs m_0, ..., m_{i-1} in the bases of their rows, (n, ...) each."""

    states: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]

    @property
    def end(self) -> Tensor:
        """The last state."""
        return self.states[-1]

    def until(self, row: int) -> Trace:
        """What was seen before ``row`` called the network."""
        return Trace(self.states[: row + 1], self.outputs[:row])

    def summed(self, plan: SolverPlan) -> Trace:
        """With the state that ``plan`` makes of the last output, which none has been made of yet."""
        i = len(self.outputs) - 1
        state, output = plan.state[i].tolist(), plan.output[i].tolist()
        return Trace((*self.states, advance(state, output, list(self.states), list(self.outputs))), self.outputs)


def run(plan: SolverPlan, problem: Problem, *, begin: Trace | None = None, rows: int | None = None) -> Trace:
    """The trace of ``plan`` on the problem's noise; what the executor computes, but nothing is forgotten.

    Gradients flow to the plan's numbers, its model times included, and to the first state. With ``problem.checkpoint`` the
    activations of a network call are recomputed in the backward pass, so that memory does not grow with the steps.

    Args:
        begin: go on from here: the trace of a run of a plan whose first rows are the same.
        rows: stop before this row.

    Raises:
        PlanError: a plan that is stochastic, has rows without a call, or adds a constant: none of these is learned.
    """
    _learnable(plan)
    numbers = _Numbers(plan)
    trace = Trace((problem.start(plan),), ()) if begin is None else begin
    states, outputs = list(trace.states), list(trace.outputs)
    for i in range(len(outputs), plan.steps if rows is None else rows):
        x = states[-1]
        outputs.append(_output(numbers, i, x, problem))
        states.append(advance(numbers.state[i], numbers.output[i], states, outputs))
    return Trace(tuple(states), tuple(outputs))


def advance(state: list[Any], output: list[Any], states: list[Tensor], outputs: list[Tensor]) -> Tensor:
    """sum_k state[k] X_{i-k} + sum_k output[k] m_{i-k}."""
    pairs = [*zip(state, reversed(states), strict=False), *zip(output, reversed(outputs), strict=False)]
    total: Tensor | None = None
    for w, t in pairs:
        if isinstance(w, float) and w == 0.0:
            continue
        term = (w * t).to(t.dtype)
        total = term if total is None else total + term
    return torch.zeros_like(states[-1]) if total is None else total


class _Numbers:
    """The plan's coefficients as floats, or as 0-d tensors where they carry gradients."""

    def __init__(self, plan: SolverPlan) -> None:
        self.plan, tensors = plan, plan.requires_grad
        self.state, self.output = (
            [list(row.unbind()) for row in v] if tensors else v.tolist() for v in (plan.state, plan.output)
        )
        columns = (plan.model_time, plan.in_scale, *self._conversions())
        self.time, self.in_scale, self.p, self.q = (list(c.unbind()) if tensors else c.tolist() for c in columns)

    def _conversions(self) -> tuple[Tensor, Tensor]:
        plan = self.plan
        pairs = [
            conversion(plan.prediction, basis, plan.alpha[i], plan.sigma[i], plan.sigma_data)
            for i, basis in enumerate(plan.basis)
        ]
        return torch.stack([p for p, _ in pairs]), torch.stack([q for _, q in pairs])


def _output(numbers: _Numbers, i: int, x: Tensor, problem: Problem) -> Tensor:
    scale = numbers.in_scale[i]
    given = x if isinstance(scale, float) and scale == 1.0 else (x * scale).to(x.dtype)
    if problem.checkpoint and torch.is_grad_enabled():
        raw: Any = checkpoint(problem.network, given, numbers.time[i], problem.which, use_reentrant=False)
    else:
        raw = problem.network(given, numbers.time[i], problem.which)
    converted: Tensor = numbers.p[i] * x + numbers.q[i] * raw.to(x.dtype)
    return converted.to(x.dtype)


def _learnable(plan: SolverPlan) -> None:
    for what, there in (
        ("draws noise", plan.has_noise),
        ("has rows without a network call", not bool(plan.evaluate.all())),
        ("adds a constant tensor", bool((plan.constant != 0).any())),
        ("has coefficients a dimension", bool(plan.sample_shape)),
    ):
        if there:
            raise PlanError(f"plan {plan.method} {what}; learning works on deterministic plans of one call a row")


def rms(a: Tensor, b: Tensor) -> Tensor:
    """(n,): root mean square difference of every pair, in units of the latent."""
    return (a - b).flatten(1).square().mean(1).clamp(min=1e-20).sqrt()


def error(plan: SolverPlan, problem: Problem, *, batch: int = 64) -> Tensor:
    """(n,) float64: RMS distance of every sample that ``plan`` makes from its teacher's. Any plan will do here."""
    from fewstep.samplers.executor import sample

    parts = []
    with torch.no_grad():
        for at in range(0, len(problem), batch):
            part = problem.take(slice(at, at + batch))

            def network(x: Tensor, t: Any, which: Tensor = part.which) -> Tensor:
                return problem.network(x, t, which)

            parts.append(rms(sample(network, part.noise, plan), part.targets).double())
    return torch.cat(parts)
