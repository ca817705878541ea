"""Parallel sampling: many steps of one trajectory evaluated in one batch, repeated until they agree with each other.

A plan says every state from the network's outputs at the states before it. Picard iteration takes outputs at guessed states,
runs the plan's rows over them, and has better states. The first state that was not known before is exact after every round,
so the result is the sequential one after as many rounds as there are calls at the latest; where the outputs change
smoothly a window of states settles in a few rounds, and the network is waited for fewer times, though called more often.

Source: Parallel Sampling of Diffusion Models, 2305.16317, algorithm 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fewstep.errors import FewstepError
from fewstep.samplers.brownian import NoiseSource
from fewstep.samplers.convert import Hook, Update, conversion
from fewstep.samplers.executor import Executor, Randomness, Run, draw
from fewstep.samplers.generators import one_each
from fewstep.samplers.plan import SolverPlan

BatchedModel = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class ParallelResult:
    """What :func:`sample_parallel` found, and what it took."""

    sample: Tensor
    """(batch, ...), the last states."""
    rounds: int
    """Network calls one after the other, each on a batch."""
    evaluations: tuple[int, ...]
    """Network evaluations of every sample of the batch, all rounds together."""


def sample_parallel(
    model: BatchedModel,
    noise: Tensor,
    plan: SolverPlan,
    *,
    window: int | None = None,
    tolerance: float = 1e-3,
    spread: float | None = None,
    generator: Randomness = None,
    hook: Hook | None = None,
    constant: Tensor | None = None,
    update: Update | None = None,
) -> ParallelResult:
    """Run ``plan`` with the network calls of a sliding window of states in one batch.

    Each round evaluates the window's states, runs the rows over the outputs, and moves the window past the states that
    changed by no more than the tolerance. The samples of a batch move independently of each other, so a sample's result
    does not depend on its batch. Any plan runs: past outputs and states, stages, rows without a call, coefficients of
    every dimension's own, noise (drawn once a row, in the order of a sequential run).

    Between rounds a state moves, and what the network would say at the new place is guessed as raw + k (X_new - X_old), k
    being the slope of the exact network of Gaussian data with standard deviation ``spread``. That moves the way, not the
    result; on vp, where the data is taken as of unit variance, it is the iteration of the paper.

    Args:
        model: ``model(x, t, which) -> raw``: x (n, ...) states, scaled where the family scales them; t (n,) their model
            times; which (n,) int64 the sample of the batch that each belongs to, for conditions. n is at most ``window``
            times the batch.
        noise: standard normal, (batch, ...); ``plan.init_scale`` times it is the first state.
        window: the most states evaluated in a round, which bounds the memory; None: all.
        tolerance: how much a state may change in the last round, root mean square, in units of sqrt(alpha^2 spread^2 +
            sigma^2). 0 gives the result of :func:`~fewstep.samplers.sample`, to what the network's own sums differ by
            between batch sizes.
        spread: the data's standard deviation; None: EDM's sigma_data, else 1.
        generator: for plans with noise: one a sample, a :class:`~fewstep.samplers.BrownianPath`, or a single one for a
            batch of one.
        hook, constant, update: see :class:`Executor`.

    Raises:
        FewstepError: a window below 1, a negative tolerance, a spread that is not positive, one generator for a batch, or a
            network whose output has another shape than its input.
    """
    window = len(plan.evaluate) if window is None else window
    spread = plan.sigma_data if spread is None else spread
    if window < 1 or not tolerance >= 0 or not 0 < spread < math.inf:
        raise FewstepError(
            f"parallel sampling needs window >= 1, tolerance >= 0 and a finite spread > 0, got window={window}, "
            f"tolerance={tolerance}, spread={spread}"
        )
    shared = Executor(plan, hook, constant, update)
    executors = [shared] * len(noise)
    first = noise * plan.init_scale
    if constant is not None:
        if constant.ndim == noise.ndim and len(constant) == len(noise):
            executors = [Executor(plan, hook, c, update) for c in _each(constant)]
        if plan.reverting:
            first = first + constant.to(first)
    guesses = _guesses(shared, spread)
    trajectories = [
        _Trajectory(executor, guesses, x, _Recorded(source), window, tolerance)
        for executor, x, source in zip(executors, _each(first), _sources(plan, generator, len(noise)), strict=True)
    ]
    times = torch.tensor([plan.model_time[i] for i in shared.calls], dtype=torch.float64, device="cpu")
    times = times.to(torch.float64 if noise.dtype is torch.float64 else torch.float32)
    rounds = 0
    while waiting := [(k, c) for k, trajectory in enumerate(trajectories) for c in trajectory.window]:
        x = torch.cat([trajectories[k].model_input(c) for k, c in waiting])
        which, calls = (torch.tensor(v, device="cpu") for v in zip(*waiting, strict=True))
        raw = model(x, times[calls].to(x.device), which.to(x.device))
        if raw.shape != x.shape:
            raise FewstepError(f"the network answered shape {tuple(raw.shape)} to {tuple(x.shape)}; they must agree")
        for (k, c), answer in zip(waiting, _each(raw), strict=True):
            trajectories[k].hear(c, answer)
        active = [trajectory for trajectory in trajectories if trajectory.window]
        changes = torch.stack([change for trajectory in active for change in trajectory.sweep()])
        largest = iter(changes.tolist())  # the round's one wait for the device
        for trajectory in active:
            trajectory.move(largest)
        rounds += 1
    return ParallelResult(
        torch.cat([trajectory.states[0] for trajectory in trajectories]),
        rounds,
        tuple(trajectory.evaluations for trajectory in trajectories),
    )


@dataclass(frozen=True)
class _Guess:
    """What is known of the network at a call before it is made."""

    slope: float
    """d raw / d X where the data is Gaussian."""
    data: tuple[float, float]
    """(p, q) with x0 = p X + q raw."""
    scale: float
    """The standard deviation of X."""


def _guesses(executor: Executor, spread: float) -> list[_Guess]:
    """For every call, and one more for the last state, of which only the scale is used."""
    plan, rows = executor.plan, [*executor.calls]
    alpha, sigma = plan.alpha.detach()[rows], plan.sigma.detach()[rows]
    p, q = conversion(plan.prediction, "data", alpha, sigma, plan.sigma_data)
    variance = (alpha * spread) ** 2 + sigma**2
    slope = (alpha * spread**2 / variance - p) / q
    known = zip(slope.tolist(), p.tolist(), q.tolist(), variance.sqrt().tolist(), strict=True)
    last = torch.sqrt((plan.alpha[-1] * spread) ** 2 + plan.sigma[-1] ** 2)
    return [*(_Guess(k, (a, b), scale) for k, a, b, scale in known), _Guess(0.0, (0.0, 1.0), float(last))]


class _Trajectory:
    """One sample on its way: the run at the last state that is final, and guesses of the states after it."""

    def __init__(
        self, executor: Executor, guesses: list[_Guess], x: Tensor, noise: _Recorded, width: int, tolerance: float
    ) -> None:
        self.executor, self.guesses, self.noise, self.width, self.tolerance = executor, guesses, noise, width, tolerance
        self.total = len(executor.calls)
        self.begin, self.run = 0, Run()
        self.heard: dict[int, tuple[Tensor, Tensor]] = {}
        """(state, output) of the calls that were made, by call."""
        self.states = [x]
        """From ``begin`` on; the window's, and the state after it."""
        self.evaluations = 0
        self._extend()

    @property
    def window(self) -> range:
        """The calls that are to be made next; empty when the last state is final."""
        return range(self.begin, min(self.begin + self.width, self.total))

    def model_input(self, call: int) -> Tensor:
        return self.executor.model_input(Run(self.executor.calls[call]), self.states[call - self.begin])

    def hear(self, call: int, raw: Tensor) -> None:
        self.heard[call] = (self.states[call - self.begin], raw)
        self.evaluations += 1

    def sweep(self) -> list[Tensor]:
        """Run the rows over what was heard; how much each state after the first changed, in units of its scale."""
        before, self.states, self.runs = self.states, [self.states[0]], [self.run]
        self._extend()
        changes = []
        for old, new, guess in zip(before[1:], self.states[1:], self.guesses[self.begin + 1 :], strict=False):
            wide = torch.promote_types(new.dtype, torch.float32)
            changes.append((new.to(wide) - old.to(wide)).square().mean().sqrt() / guess.scale)
        self._changes = len(changes)
        return changes

    def move(self, changes: Iterator[float]) -> None:
        """Make the states up to the first that still changes the final ones, and begin there."""
        settled = [next(changes) <= self.tolerance for _ in range(self._changes)]
        steps = max(1, settled.index(False) if False in settled else len(settled))
        self.begin += steps
        self.run, self.states = self.runs[steps], self.states[steps:]
        self.heard = {c: said for c, said in self.heard.items() if c >= self.begin}
        self.noise.forget_before(self.run.i)
        self.runs = self.runs[steps:]
        self._extend()
        del self.runs

    def _extend(self) -> None:
        """States from the last one that is there to the window's end."""
        runs = getattr(self, "runs", [self.run])
        x, run = self.states[-1], runs[-1]
        for call in range(self.begin + len(self.states) - 1, self.window.stop):
            run = replace(run, outputs=dict(run.outputs), states=dict(run.states))
            x = self.executor.advance(run, self._output(call, x, run), x, generator=self.noise)
            self.states.append(x)
            runs.append(run)

    def _output(self, call: int, x: Tensor, run: Run) -> Tensor:
        """The network's output at ``x``: known, or guessed from another round's, from x0 one call earlier, from nothing."""
        guess = self.guesses[call]
        if call in self.heard:
            at, raw = self.heard[call]
            return raw if at is x else raw + (guess.slope * (x - at)).to(raw.dtype)
        if run.last is None:
            return guess.slope * x
        p, q = guess.data
        return ((self.executor.x0(run) - p * x) / q).to(x.dtype)


class _Recorded(NoiseSource):
    """The noise of one sample, drawn once a row and kept while rounds come back to it."""

    def __init__(self, source: Randomness) -> None:
        self.source = source
        self.kept: dict[int, Tensor] = {}

    def draw(self, plan: SolverPlan, row: int, like: Tensor) -> Tensor:
        if row not in self.kept:
            source = self.source
            self.kept[row] = (
                source.draw(plan, row, like) if isinstance(source, NoiseSource) else draw(like, source)
            ).clone()
        return self.kept[row]

    def only(self, sample: int) -> NoiseSource:
        return self

    def forget_before(self, row: int) -> None:
        self.kept = {i: z for i, z in self.kept.items() if i >= row}


def _each(batch: Tensor) -> list[Tensor]:
    """The samples of a batch, as batches of one."""
    return [batch[i : i + 1] for i in range(len(batch))]


def _sources(plan: SolverPlan, generator: Randomness, batch: int) -> Sequence[Randomness]:
    """The source of every sample's noise."""
    if not plan.has_noise or generator is None:
        return [None] * batch
    if isinstance(generator, NoiseSource):
        return [generator.only(i) for i in range(batch)]
    if isinstance(generator, torch.Generator):
        if batch == 1:
            return [generator]
        raise FewstepError(
            f"one generator was given for a batch of {batch}; the samples of a parallel run need one each, or a BrownianPath"
        )
    return one_each(generator, batch)
