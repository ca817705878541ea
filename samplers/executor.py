"""The one loop: a plan, bound once to plain numbers, advances a small run state through its rows.

A step is a handful of fused multiply-adds with host floats: no coefficient arithmetic on 0-d tensors, no indexing of
device tensors, hence no host synchronisation, and constants under ``torch.compile``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fewstep.errors import FewstepError, PlanError
from fewstep.samplers.brownian import NoiseSource
from fewstep.samplers.convert import Hook, Update, constant_share, conversion
from fewstep.samplers.generators import Generators as Generators
from fewstep.samplers.generators import one_each
from fewstep.samplers.plan import SolverPlan
from fewstep.samplers.scalar import Scalar

Randomness: TypeAlias = Generators | NoiseSource


@dataclass(frozen=True)
class _Row:
    """One row with everything that can be known before the run.

    Outputs are stored scaled, m' = X + (q/p) raw wherever p is not 0: that is one pass over memory in place of two, and
    the scale p goes into the weights of every row that reads m'.
    """

    evaluate: bool
    in_scale: Scalar
    convert: tuple[Scalar, Scalar]
    """(p, q): the stored output is p X + q raw."""
    to_x0: tuple[Scalar, Scalar]
    """(u, v): x0 = u X + v m'."""
    from_x0: tuple[Scalar, Scalar]
    """(u, v): m' = u X + v x0, for hooks."""
    reverting: tuple[Scalar, Scalar]
    """(in to_x0, in from_x0): the weight of mu there, in a mean-reverting process."""
    state: Scalar
    output: Scalar
    folded: tuple[Scalar, Scalar]
    """(weight of X, weight of raw), the row with its conversion folded in."""
    older_outputs: tuple[tuple[int, Scalar], ...]
    """(index, weight) of the past outputs that the row reads."""
    older_states: tuple[tuple[int, Scalar], ...]
    noise: Scalar
    constant: Scalar
    keep_state: bool
    """A later row reads X_i."""
    keep_output: bool
    """A later row reads m_i."""
    forget_outputs: tuple[int, ...]
    """What no later row reads."""
    forget_states: tuple[int, ...]
    draws: bool
    """The row needs a normal draw."""
    call_follows: bool
    """The next row calls the network, or there is none."""


@dataclass
class Run:
    """What one trajectory has seen so far: the only mutable thing. Cheap to make and to copy."""

    i: int = 0
    """The row that comes next."""
    outputs: dict[int, Tensor] = field(default_factory=dict)
    states: dict[int, Tensor] = field(default_factory=dict)
    last: tuple[int, Tensor, Tensor, bool] | None = None
    """(row, X, output, whether it is converted) of the last step: :meth:`Executor.x0` is made of it when asked for."""
    update: Tensor | None = None
    """What the last row added to the linear part of its state, for an :class:`Update` hook."""
    path: NoiseSource | None = None
    """The run's own source of noise, for those who keep one (schedulers with a Brownian path)."""


class Executor:
    """Runs one plan. Immutable after construction; any number of runs, threads included, share it.

    Args:
        plan: the plan; if its numbers require gradients they stay tensors and the result is differentiable.
        hook: applied to the predicted x0 of every step (thresholding, clipping).
        constant: mu, the tensor that ``plan.constant`` multiplies; it broadcasts against the states.
        update: applied to what the outputs add to each new state.

    Raises:
        PlanError: a conversion that divides by zero, or a plan with a constant column and no ``constant``.
    """

    def __init__(
        self,
        plan: SolverPlan,
        hook: Hook | None = None,
        constant: Tensor | None = None,
        update: Update | None = None,
    ) -> None:
        if plan.sample_shape:
            if constant is not None:
                raise PlanError("this plan brings its own constant tensors; it takes no constant=")
            constant = torch.ones(())
        elif constant is None and bool((plan.constant != 0).any()):
            raise PlanError("this plan adds a constant tensor (its constant column); give it as constant=")
        self.plan, self.hook, self.constant, self.update = plan, hook, constant, update
        self.rows = _bind(plan)
        self._own_shape = plan.sample_shape
        self._placed: dict[tuple[Any, ...], list[_Row]] = {}

    def __deepcopy__(self, memo: object) -> Executor:
        return self  # immutable: a copied scheduler shares it and copies only its run

    @cached_property
    def calls(self) -> tuple[int, ...]:
        """The rows that call the network, in order."""
        return tuple(i for i, row in enumerate(self.rows) if row.evaluate)

    def model_input(self, run: Run, x: Tensor) -> Tensor:
        """What the network is given at the state ``x``: x itself where the family does not scale it."""
        scale = self.rows[run.i].in_scale
        return x if isinstance(scale, float) and scale == 1.0 else (x * scale).to(x.dtype)

    def advance(
        self, run: Run, raw: Tensor, x: Tensor, *, generator: Randomness = None, noise: Tensor | None = None
    ) -> Tensor:
        """The next state where the network is called, from its output ``raw`` at the state ``x``.

        Computed in float32 or better and cast back to the dtype of ``x``. Rows that call no network follow at once.

        Args:
            generator: for plans with noise, one for all or one a sample (noise is drawn on the generator's device), or a
                :class:`NoiseSource` such as a Brownian path.
            noise: a standard normal draw of the shape of ``x`` to use instead.
        """
        if run.i >= len(self.rows):
            raise FewstepError(f"this run is over: its {len(self.rows)} rows are done; start a new one")
        dtype = x.dtype
        if dtype is torch.float16 or dtype is torch.bfloat16:
            x = x.float()
        y = self._row(run, raw, x, generator, noise)
        while not self.rows[run.i - 1].call_follows:
            if self.rows[run.i - 1].draws:
                noise = None  # used up: another row's noise is independent of it
            y = self._row(run, None, y, generator, noise)
        return y if y.dtype is dtype else y.to(dtype)

    def x0(self, run: Run) -> Tensor:
        """The network's current idea of the clean sample, at the last step taken (previews, callbacks)."""
        if run.last is None:
            raise FewstepError("no step has been taken yet, so there is no predicted x0")
        i, x, m, converted = run.last
        return self._x0(self.rows[i], x, m, converted)

    def _row(self, run: Run, raw: Tensor | None, x: Tensor, generator: Randomness, noise: Tensor | None) -> Tensor:
        i, row = run.i, (self._rows_like(x) if self._own_shape else self.rows)[run.i]
        if raw is None:
            y = _scaled(x, row.state)
        elif row.keep_output or self.hook is not None:
            m = self._output(row, x, raw)
            run.last = (i, x, m, True)
            if row.keep_output:
                run.outputs[i] = m
            y = _add(_scaled(x, row.state), m, row.output)
        else:
            # nobody reads this output again: the conversion is folded into the row
            run.last = (i, x, raw, False)
            u, v = row.folded
            y = _add(_scaled(x, u), raw, v)
        if row.keep_state:
            run.states[i] = x.clone()  # a pipeline may edit its latents in place
        for j, w in row.older_outputs:
            y = _add(y, run.outputs[j], w)
        if self.update is not None and raw is not None:
            linear = _scaled(x, row.state)
            change = y - linear
            y, run.update = linear + self.update(change, run.update), change
        for j, w in row.older_states:
            y = _add(y, run.states[j], w)
        if self.constant is not None:
            y = _add(y, self.constant.to(x), row.constant)
        if row.draws:
            y = _add(y, self._noise(i, x, generator) if noise is None else noise.to(x), row.noise)
        for j in row.forget_outputs:
            del run.outputs[j]
        for j in row.forget_states:
            del run.states[j]
        run.i = i + 1
        return y

    def _rows_like(self, x: Tensor) -> list[_Row]:
        """The rows of a plan with coefficients a dimension, these once on the device and in the dtype of ``x``."""
        key = (x.device, x.dtype, x.shape[1:])
        if key not in self._placed:
            own = self._own_shape
            if len(own) >= x.ndim or any(n not in (1, m) for n, m in zip(own[::-1], x.shape[::-1], strict=False)):
                raise PlanError(f"this plan was made for samples of shape {own}, got {tuple(x.shape[1:])}")
            self._placed[key] = _bind(self.plan, x)
        return self._placed[key]

    def _noise(self, i: int, x: Tensor, generator: Randomness) -> Tensor:
        return generator.draw(self.plan, i, x) if isinstance(generator, NoiseSource) else draw(x, generator)

    def _output(self, row: _Row, x: Tensor, raw: Tensor) -> Tensor:
        """m', a tensor of our own: a compiled network may reuse the memory of ``raw`` at its next call."""
        if self.hook is None:
            p, q = row.convert
            if isinstance(q, float) and p == 1.0:
                m = torch.add(x, raw, alpha=q)
                return m if m.dtype is x.dtype else m.to(x.dtype)
            return _add(_scaled(raw if raw.dtype is x.dtype else raw.to(x.dtype), q), x, p)
        x0 = self.hook(self._x0(row, x, raw, False))
        u, v = row.from_x0
        return self._reverted(_add(_scaled(x0, v), x, u), row.reverting[1])

    def _x0(self, row: _Row, x: Tensor, m: Tensor, converted: bool) -> Tensor:
        u, v = row.to_x0
        if not converted:
            p, q = row.convert
            u, v = u + v * p, v * q
        return self._reverted(_add(_scaled(m.to(x.dtype), v), x, u), row.reverting[0])

    def _reverted(self, y: Tensor, w: Scalar) -> Tensor:
        if self.constant is None or (isinstance(w, float) and w == 0.0):
            return y
        return _add(y, self.constant.to(y), w)


def _scaled(t: Tensor, w: Scalar) -> Tensor:
    """A new tensor w t; 0 t is 0 even where t is not finite."""
    if isinstance(w, float):
        return torch.mul(t, w) if w else torch.zeros_like(t)
    return (w * t).to(t.dtype)


def _add(y: Tensor, t: Tensor, w: Scalar) -> Tensor:
    """y + w t, in place where w is a plain number (y is then our own); a zero weight costs nothing and lets no NaN through."""
    if isinstance(w, float):
        return y.add_(t, alpha=w) if w else y
    return (y + w * t).to(y.dtype)


def draw(like: Tensor, generator: Generators) -> Tensor:
    """Standard normal noise of the shape, dtype and device of ``like``; sample i from generator i when a list is given."""
    if generator is not None and not isinstance(generator, torch.Generator):
        return torch.cat([draw(like[i : i + 1], g) for i, g in enumerate(one_each(generator, len(like)))])
    device = like.device if generator is None else generator.device
    return torch.randn(like.shape, generator=generator, device=device, dtype=like.dtype).to(like.device)


def _numbers(values: Tensor, like: Tensor | None = None) -> list[Any]:
    """Floats; tensors where they carry gradients, or where each is one number a dimension (placed like ``like``)."""
    if values.ndim > 1:
        return list((values if like is None else values.to(like)).unbind())
    return list(values.unbind()) if values.requires_grad else values.tolist()


def _is_zero(w: Scalar) -> bool:
    """Whether ``w`` can be left out; a weight that carries a gradient may be 0 just now."""
    return not w.requires_grad and bool((w == 0).all()) if isinstance(w, Tensor) else w == 0


def _bind(plan: SolverPlan, like: Tensor | None = None) -> list[_Row]:
    """The rows of ``plan`` as plain numbers (or tensors, see :func:`_numbers`), with what each may forget."""
    n = plan.steps
    p, q, to_x0, from_x0 = _conversions(plan)
    reverting = _reverting(plan, p, q, to_x0, from_x0)
    # the scale of each stored output, see _Row
    scaled = (p.detach() != 0) & plan.evaluate
    scale = torch.where(scaled, p, torch.ones_like(p))
    p, q = torch.where(scaled, torch.ones_like(p), p), q / scale
    to_x0, from_x0 = (to_x0[0], to_x0[1] * scale), (from_x0[0] / scale, from_x0[1] / scale)
    reverting = (reverting[0], reverting[1] / scale)
    weights = [
        [w * scale[i - k] if i >= k else w for k, w in enumerate(row.unbind())] for i, row in enumerate(plan.output)
    ]
    output = [_numbers(torch.stack(row), like) for row in weights]
    state = [_numbers(row, like) for row in plan.state]
    calls = plan.evaluate.tolist()
    outputs_read = [
        tuple((i - k, w) for k, w in enumerate(row[: i + 1]) if k and calls[i - k] and not _is_zero(w))
        for i, row in enumerate(output)
    ]
    states_read = [
        tuple((i - k, w) for k, w in enumerate(row[: i + 1]) if k and not _is_zero(w)) for i, row in enumerate(state)
    ]
    last_output = {j: i for i, read in enumerate(outputs_read) for j, _ in read}
    last_state = {j: i for i, read in enumerate(states_read) for j, _ in read}
    numbers = (p, q, *to_x0, *from_x0, *reverting, plan.in_scale, plan.noise)
    columns = (*map(_numbers, numbers), _numbers(plan.constant, like))
    rows = []
    for i, (pi, qi, xu, xv, mu, mv, x0c, mc, in_scale, noise, constant) in enumerate(zip(*columns, strict=True)):
        evaluate = bool(plan.evaluate[i])
        a, b = state[i][0], output[i][0] if evaluate else 0.0
        rows.append(
            _Row(
                evaluate=evaluate,
                in_scale=in_scale,
                convert=(pi, qi),
                to_x0=(xu, xv),
                from_x0=(mu, mv),
                reverting=(x0c, mc),
                state=a,
                output=b,
                folded=(a + b * pi, b * qi),
                older_outputs=outputs_read[i],
                older_states=states_read[i],
                noise=noise,
                constant=constant,
                keep_state=i in last_state,
                keep_output=i in last_output,
                forget_outputs=tuple(j for j, at in last_output.items() if at == i),
                forget_states=tuple(j for j, at in last_state.items() if at == i),
                draws=not (isinstance(noise, float) and noise == 0.0),
                call_follows=i + 1 == n or bool(plan.evaluate[i + 1]),
            )
        )
    return rows


Pair = tuple[Tensor, Tensor]


def _reverting(plan: SolverPlan, p: Tensor, q: Tensor, to_x0: Pair, from_x0: Pair) -> Pair:
    """The weights of mu that go with ``to_x0`` and ``from_x0``, since X - mu, m - kappa mu and x0 - mu is what they relate."""
    if not plan.reverting:
        return torch.zeros_like(p), torch.zeros_like(p)
    kappa = constant_share(plan.prediction, p, q)
    return 1 - to_x0[0] - to_x0[1] * kappa, kappa - from_x0[0] - from_x0[1]


def _conversions(plan: SolverPlan) -> tuple[Tensor, Tensor, Pair, Pair]:
    """(p, q), to_x0 and from_x0 of all rows, (N,) each; zeros where a row calls no network."""
    columns = [torch.zeros_like(plan.noise) for _ in range(6)]
    for basis in set(plan.basis):
        mine = torch.tensor([b == basis for b in plan.basis]) & plan.evaluate
        alpha, sigma = plan.alpha[:-1][mine], plan.sigma[:-1][mine]
        one, zero = torch.ones_like(sigma), torch.zeros_like(sigma)
        p, q = conversion(plan.prediction, basis, alpha, sigma, plan.sigma_data)
        if basis == "data":
            to_x0, from_x0 = (zero, one), (zero, one)
        elif basis == "noise":
            to_x0, from_x0 = (1 / alpha, -sigma / alpha), (1 / sigma, -alpha / sigma)
        else:  # velocity u = eps - x0 of a flow, X = (1 - sigma) x0 + sigma eps
            to_x0, from_x0 = (one, -sigma), (1 / sigma, -1 / sigma)
        columns = [c.masked_scatter(mine, v) for c, v in zip(columns, (p, q, *to_x0, *from_x0), strict=True)]
    p, q, xu, xv, mu, mv = columns
    return p, q, (xu, xv), (mu, mv)


def sample(
    model: Callable[[Tensor, Any], Tensor],
    noise: Tensor,
    plan: SolverPlan,
    *,
    generator: Randomness = None,
    hook: Hook | None = None,
    constant: Tensor | None = None,
    update: Update | None = None,
    callback: Callable[[int, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """Run ``plan`` on a plain callable; no diffusers needed.

    Args:
        model: ``model(x, t) -> raw``, the network: x of the shape of ``noise`` (already scaled where the family scales
            it), t the row's model time as a float; its output is what ``plan.prediction`` says.
        noise: standard normal, (batch, ...); ``plan.init_scale`` times it is the first state.
        generator: source of the noise of stochastic plans, one for all, one a sample, or a :class:`NoiseSource` such as
            :class:`~fewstep.samplers.BrownianPath`.
        hook, constant, update: see :class:`Executor`. A mean-reverting process starts around ``constant``.
        callback: called after each step with (row, state, predicted x0).

    Returns:
        The last state, in the dtype of ``noise``.
    """
    executor, run = Executor(plan, hook, constant, update), Run()
    keep = plan.requires_grad
    x = noise * plan.init_scale
    if constant is not None and plan.reverting:
        x = x + constant.to(x)
    for i in executor.calls:
        tau = plan.model_time[i] if keep else float(plan.model_time[i])
        x = executor.advance(run, model(executor.model_input(run, x), tau), x, generator=generator)
        if callback is not None:
            callback(i, x, executor.x0(run))
    return x
