"""The one loop: a plan, bound once to plain numbers, advances a small run state through its rows.

A step is a handful of fused multiply-adds with host floats: no coefficient arithmetic on 0-d tensors, no indexing of
device tensors, hence no host synchronisation, and constants under ``torch.compile``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Union

import torch
from torch import Tensor

from fewstep.errors import FewstepError, PlanError
from fewstep.samplers.convert import Hook, conversion
from fewstep.samplers.plan import SolverPlan

Number = Union[float, Tensor]
"""A coefficient: a host float, or a 0-d float64 tensor where gradients are wanted."""
Generators = Union[torch.Generator, Sequence[torch.Generator], None]


@dataclass(frozen=True)
class _Row:
    """One row with everything that can be known before the run."""

    evaluate: bool
    in_scale: Number
    convert: tuple[Number, Number]
    """(p, q): m = p X + q raw."""
    to_x0: tuple[Number, Number]
    """(u, v): x0 = u X + v m."""
    from_x0: tuple[Number, Number]
    """(u, v): m = u X + v x0, for hooks."""
    state: Number
    older_states: tuple[tuple[int, Number], ...]
    output: Number
    older_outputs: tuple[tuple[int, Number], ...]
    noise: Number
    constant: Number
    keep_state: bool
    """A later row reads X_i."""
    keep_output: bool
    """A later row reads m_i."""
    forget_states: tuple[int, ...]
    forget_outputs: tuple[int, ...]

    @property
    def is_tensor(self) -> bool:
        return isinstance(self.state, Tensor)


@dataclass
class Run:
    """What one trajectory has seen so far: the only mutable thing. Cheap to make and to copy."""

    i: int = 0
    """The row that comes next."""
    outputs: dict[int, Tensor] = field(default_factory=dict)
    states: dict[int, Tensor] = field(default_factory=dict)
    last: tuple[int, Tensor, Tensor, bool] | None = None
    """(row, X, output, whether it is converted) of the last step: :meth:`Executor.x0` is made of it when asked for."""


class Executor:
    """Runs one plan. Immutable after construction; any number of runs, threads included, share it.

    Args:
        plan: the plan; if its numbers require gradients they stay tensors and the result is differentiable.
        hook: applied to the predicted x0 of every step (thresholding, clipping).
        constant: mu, the tensor that ``plan.constant`` multiplies.

    Raises:
        PlanError: a conversion that divides by zero, or a plan with a constant column and no ``constant``.
    """

    def __init__(self, plan: SolverPlan, hook: Hook | None = None, constant: Tensor | None = None) -> None:
        if constant is None and bool((plan.constant != 0).any()):
            raise PlanError("this plan adds a constant tensor (its constant column); give it as constant=")
        self.plan, self.hook, self.constant = plan, hook, constant
        self.rows = _bind(plan)

    @cached_property
    def calls(self) -> tuple[int, ...]:
        """The rows that call the network, in order."""
        return tuple(i for i, row in enumerate(self.rows) if row.evaluate)

    def model_input(self, run: Run, x: Tensor) -> Tensor:
        """What the network is given at the state ``x``: x itself where the family does not scale it."""
        scale = self.rows[run.i].in_scale
        return x if isinstance(scale, float) and scale == 1.0 else (x * scale).to(x.dtype)

    def advance(
        self, run: Run, raw: Tensor, x: Tensor, *, generator: Generators = None, noise: Tensor | None = None
    ) -> Tensor:
        """The next state where the network is called, from its output ``raw`` at the state ``x``.

        Computed in float32 or better and cast back to the dtype of ``x``. Rows that call no network follow at once.

        Args:
            generator: for plans with noise, one for all or one a sample; noise is drawn on the generator's device.
            noise: a standard normal draw of the shape of ``x`` to use instead.
        """
        if run.i >= len(self.rows):
            raise FewstepError(f"this run is over: its {len(self.rows)} rows are done; start a new one")
        dtype = x.dtype
        x = x.float() if dtype in (torch.float16, torch.bfloat16) else x
        y = self._row(run, raw, x, generator, noise)
        while run.i < len(self.rows) and not self.rows[run.i].evaluate:
            y = self._row(run, None, y, generator, noise)
        return y if y.dtype == dtype else y.to(dtype)

    def x0(self, run: Run) -> Tensor:
        """The network's current idea of the clean sample, at the last step taken (previews, callbacks)."""
        if run.last is None:
            raise FewstepError("no step has been taken yet, so there is no predicted x0")
        i, x, m, converted = run.last
        return _combine(self._x0_terms(self.rows[i], x, m, converted))

    def _row(self, run: Run, raw: Tensor | None, x: Tensor, generator: Generators, noise: Tensor | None) -> Tensor:
        i, row = run.i, self.rows[run.i]
        if raw is None:
            terms: list[tuple[Number, Tensor]] = [(row.state, x)]
        elif row.keep_output or row.is_tensor or self.hook is not None:
            m = self._output(row, x, raw)
            terms = [(row.state, x), (row.output, m)]
            run.last = (i, x, m, True)
            if row.keep_output:
                run.outputs[i] = m
        else:
            # nobody reads this output again: fold the conversion into the row and save two passes over memory
            p, q = row.convert
            terms = [(row.state + row.output * p, x), (row.output * q, raw)]
            run.last = (i, x, raw, False)
        if row.keep_state:
            run.states[i] = x
        terms += [(w, run.states[j]) for j, w in row.older_states]
        terms += [(w, run.outputs[j]) for j, w in row.older_outputs]
        if self.constant is not None and not _is_zero(row.constant):
            terms.append((row.constant, self.constant.to(x)))
        if not _is_zero(row.noise):
            terms.append((row.noise, draw(x, generator) if noise is None else noise.to(x)))
        y = _combine(terms)
        for j in row.forget_states:
            run.states.pop(j, None)
        for j in row.forget_outputs:
            run.outputs.pop(j, None)
        run.i = i + 1
        return y

    def _output(self, row: _Row, x: Tensor, raw: Tensor) -> Tensor:
        """m, a tensor of our own: a compiled network may reuse the memory of ``raw`` at its next call."""
        if self.hook is None:
            p, q = row.convert
            return _combine([(p, x), (q, raw)])
        x0 = self.hook(_combine(self._x0_terms(row, x, raw, False)))
        u, v = row.from_x0
        return _combine([(u, x), (v, x0)])

    @staticmethod
    def _x0_terms(row: _Row, x: Tensor, m: Tensor, converted: bool) -> list[tuple[Number, Tensor]]:
        u, v = row.to_x0
        if converted:
            return [(u, x), (v, m)]
        p, q = row.convert
        return [(u + v * p, x), (v * q, m)]


def _is_zero(value: Number) -> bool:
    return isinstance(value, float) and value == 0.0


def _combine(terms: list[tuple[Number, Tensor]]) -> Tensor:
    """sum_j w_j t_j in the dtype of the first tensor; zero weights cost nothing and let no NaN through."""
    live = [(w, t) for w, t in terms if not _is_zero(w)]
    dtype = terms[0][1].dtype
    if not live:
        return torch.zeros_like(terms[0][1])
    (w, t), rest = live[0], live[1:]
    if not all(isinstance(w, float) for w, _ in live):
        total = w * t
        for w, t in rest:
            total = total + w * t
        return total.to(dtype)
    y = torch.mul(t if t.dtype == dtype else t.to(dtype), w)
    for w, t in rest:
        y.add_(t, alpha=w)
    return y


def draw(like: Tensor, generator: Generators) -> Tensor:
    """Standard normal noise of the shape, dtype and device of ``like``; sample i from generator i when a list is given."""
    if isinstance(generator, (list, tuple)):
        if len(generator) != len(like):
            raise FewstepError(f"{len(generator)} generators were given for a batch of {len(like)}; one a sample is needed")
        return torch.cat([draw(like[i : i + 1], g) for i, g in enumerate(generator)])
    device = generator.device if isinstance(generator, torch.Generator) else like.device
    noise = torch.randn(like.shape, generator=generator, device=device, dtype=like.dtype)  # type: ignore[call-overload]
    return noise.to(like.device)  # type: ignore[no-any-return]


def _bind(plan: SolverPlan) -> list[_Row]:
    """The rows of ``plan`` as plain numbers, with what each may forget."""
    n = plan.steps
    keep = plan.requires_grad
    number: Callable[[Tensor], Number] = (lambda v: v) if keep else (lambda v: float(v))
    state_reads = [_reads(plan.state[i], i) for i in range(n)]
    output_reads = [_reads(plan.output[i], i) for i in range(n)]
    last_state = _last_use(state_reads)
    last_output = _last_use(output_reads)
    rows = []
    for i in range(n):
        alpha, sigma = plan.alpha[i], plan.sigma[i]
        evaluate = bool(plan.evaluate[i])
        basis = plan.basis[i]
        one, zero = torch.ones_like(sigma), torch.zeros_like(sigma)
        convert = conversion(plan.prediction, basis, alpha, sigma, plan.sigma_data) if evaluate else (zero, zero)
        if basis == "data":
            to_x0, from_x0 = (zero, one), (zero, one)
        elif basis == "noise":
            to_x0, from_x0 = (1 / alpha, -sigma / alpha), (1 / sigma, -alpha / sigma)
        else:  # velocity u = eps - x0 of a flow, X = (1 - sigma) x0 + sigma eps
            to_x0, from_x0 = (one, -sigma), (1 / sigma, -1 / sigma)
        pair: Callable[[tuple[Tensor, Tensor]], tuple[Number, Number]] = lambda ab: (number(ab[0]), number(ab[1]))
        rows.append(
            _Row(
                evaluate=evaluate,
                in_scale=number(plan.in_scale[i]),
                convert=pair(convert),
                to_x0=pair(to_x0),
                from_x0=pair(from_x0),
                state=number(plan.state[i, 0]),
                older_states=tuple((j, number(plan.state[i, i - j])) for j in state_reads[i] if j != i),
                output=number(plan.output[i, 0]) if evaluate else 0.0,
                older_outputs=tuple((j, number(plan.output[i, i - j])) for j in output_reads[i] if j != i),
                noise=number(plan.noise[i]),
                constant=number(plan.constant[i]) if plan.constant[i] else 0.0,
                keep_state=last_state.get(i, i) > i,
                keep_output=last_output.get(i, i) > i,
                forget_states=tuple(j for j, last in last_state.items() if last == i),
                forget_outputs=tuple(j for j, last in last_output.items() if last == i),
            )
        )
    return rows


def _reads(weights: Tensor, i: int) -> list[int]:
    """Indices that a banded row reads."""
    return [i - int(k) for k in weights.detach().nonzero()[:, 0]]


def _last_use(reads: Sequence[Sequence[int]]) -> dict[int, int]:
    return {j: i for i, row in enumerate(reads) for j in row}


def sample(
    model: Callable[[Tensor, Any], Tensor],
    noise: Tensor,
    plan: SolverPlan,
    *,
    generator: Generators = None,
    hook: Hook | None = None,
    constant: Tensor | None = None,
    callback: Callable[[int, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """Run ``plan`` on a plain callable; no diffusers needed.

    Args:
        model: ``model(x, t) -> raw``, the network: x of the shape of ``noise`` (already scaled where the family scales
            it), t the row's model time as a float; its output is what ``plan.prediction`` says.
        noise: standard normal, (batch, ...); ``plan.init_scale`` times it is the first state.
        generator: source of the noise of stochastic plans, one for all or one a sample.
        hook, constant: see :class:`Executor`.
        callback: called after each step with (row, state, predicted x0).

    Returns:
        The last state, in the dtype of ``noise``.
    """
    executor, run = Executor(plan, hook, constant), Run()
    keep = plan.requires_grad
    x = noise * plan.init_scale
    for i in executor.calls:
        tau = plan.model_time[i] if keep else float(plan.model_time[i])
        x = executor.advance(run, model(executor.model_input(run, x), tau), x, generator=generator)
        if callback is not None:
            callback(i, x, executor.x0(run))
    return x
