"""Noise that belongs to a stretch of noise levels rather than to a call: one Brownian path a sample.

The reverse SDE of rate eta adds, between lambda_s and lambda_t, a weighted Ito integral of a Brownian motion B in lambda:

    sigma_t int_s^t sqrt(2 eta) e^{-eta (lambda_t - u)} dB(u)
        = sigma_t e^{-eta lambda_t} (W(e^{2 eta lambda_t}) - W(e^{2 eta lambda_s}))

The weight is deterministic, so the integral of sqrt(2 eta) e^{eta u} dB is a Brownian motion W on the clock of its variance,
tau = e^{2 eta lambda}, the signal-to-noise ratio for eta = 1. On that clock the noise of a row is an increment of W, without
approximation and for every family: two halves of a step add up to the whole one, and what is left between two step
counts is how the solver treats the network's output.

A method with another rate than the path's (DDIM with 0 < eta < 1 has the rate eta^2 in the limit) gets noise of exactly
its variance, but weighted by the path's e^{rate u}: its correlation with the right integral is 1 - (difference of rates)^2
h^2 / 24 + O(h^4), so the paths agree as steps get short.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fewstep.errors import FewstepError
from fewstep.samplers.generators import Generators, one_each

if TYPE_CHECKING:
    from fewstep.samplers.plan import SolverPlan

LOWEST, HIGHEST = -16.0, 16.0
"""lambdas beyond these, sigma/alpha = e^16 and e^-16, count as these: no model is trained there."""


class NoiseSource(ABC):
    """Standard normal noise for the rows of a plan; taken wherever generators are."""

    @abstractmethod
    def draw(self, plan: SolverPlan, row: int, like: Tensor) -> Tensor:
        """The noise of row ``row`` for a batch of the shape, dtype and device of ``like``."""

    @abstractmethod
    def only(self, sample: int) -> NoiseSource:
        """The source of the noise of one sample of the batch, alone."""


class BrownianPath(NoiseSource):
    """A Brownian motion W(tau), tau = e^{2 rate lambda}, for every sample of a batch.

    W is a function of the sample's seed and lambda alone: whatever the number of steps, the method, the batch or the
    order of the calls, the same noise levels see the same path. It is a virtual Brownian tree: a point is found by
    halving the range of lambda with Brownian bridges, each from a counter-based generator (Philox) whose key is the seed.
    Nothing is stored but the last point, as the next step begins there.

    Where a plan adds noise to go back to more of it (a restart), that noise and the path after it are fresh ones.

    Source: Scalable Gradients for Stochastic Differential Equations, 2001.01328, section 4 (the tree); the clock is the
    time change of Dambis, Dubins and Schwarz.

    Args:
        seeds: one whole number a sample of the batch, from 0 to 2^64 - 1.
        rate: eta of the SDE whose rows are increments of the path.
        depth: lambda is resolved to 32 / 2^depth; a row costs up to ``depth`` draws of a sample's size on the host.

    Raises:
        FewstepError: no seeds, a seed, rate or depth outside its range.
    """

    def __init__(self, seeds: Sequence[int], *, rate: float = 1.0, depth: int = 20) -> None:
        self.seeds = tuple(int(s) for s in seeds)
        if not self.seeds or not all(0 <= s < 2**64 for s in self.seeds):
            raise FewstepError(f"a Brownian path needs one seed a sample, each from 0 to 2^64 - 1, got {list(seeds)}")
        if not 0 < rate <= 16:
            raise FewstepError(f"the rate of a Brownian path lies above 0 and up to 16, got {rate}")
        if not 1 <= depth <= 40:
            raise FewstepError(f"the depth of a Brownian path is 1 to 40 halvings, got {depth}")
        self.rate, self.depth = float(rate), int(depth)
        self._last: dict[int, tuple[int, int, Array]] = {}

    @classmethod
    def from_generators(cls, generator: Generators, batch: int, *, rate: float = 1.0) -> BrownianPath:
        """A path with seeds drawn from ``generator``: one for the batch, one a sample, or torch's own for None."""
        if generator is None or isinstance(generator, torch.Generator):
            generators: Sequence[torch.Generator | None] = [generator] * batch
        else:
            generators = one_each(generator, batch)
        seeds = [
            int(torch.randint(2**62, (), generator=g, device="cpu" if g is None else g.device)) for g in generators
        ]
        return cls(seeds, rate=rate)

    def __deepcopy__(self, memo: object) -> BrownianPath:
        return self  # what it answers never changes

    def draw(self, plan: SolverPlan, row: int, like: Tensor) -> Tensor:
        """(W(tau_t) - W(tau_s)) / sqrt(tau_t - tau_s) for the noise levels s, t that the row leads between."""
        start, end, lap = plan.noise_spans[row]
        return self.increment(start, end, like, lap=lap)

    def only(self, sample: int) -> BrownianPath:
        """The path of one sample."""
        return BrownianPath(self.seeds[sample : sample + 1], rate=self.rate, depth=self.depth)

    def increment(self, start: float, end: float, like: Tensor, *, lap: int = 0) -> Tensor:
        """The path's increment between two lambdas as a standard normal, of the shape, dtype and device of ``like``.

        Raises:
            FewstepError: a batch that is not one sample a seed, or lambdas closer than the path resolves.
        """
        if len(self.seeds) != len(like):
            raise FewstepError(
                f"the Brownian path has {len(self.seeds)} seeds, the batch {len(like)} samples; one a sample is needed"
            )
        a, b = self._index(start), self._index(end)
        if a == b:
            raise FewstepError(
                f"the step from lambda = {start:g} to {end:g} is shorter than the path resolves "
                f"({(HIGHEST - LOWEST) / 2**self.depth:g}); give BrownianPath a larger depth"
            )
        scale = 1 / math.sqrt(abs(self._tau(b) - self._tau(a)))
        shape = tuple(like.shape[1:])
        # the start first: it is where the last step ended
        ends = [(self._point(i, lap, a, shape), self._point(i, lap, b, shape)) for i in range(len(like))]
        draws = [(w_b - w_a) * scale for w_a, w_b in ends]
        return torch.from_numpy(np.stack(draws)).to(dtype=like.dtype, device=like.device)

    def _index(self, lam: float) -> int:
        share = (min(max(lam, LOWEST), HIGHEST) - LOWEST) / (HIGHEST - LOWEST)
        return round(share * (1 << self.depth))

    def _tau(self, index: int) -> float:
        return math.exp(2 * self.rate * (LOWEST + (HIGHEST - LOWEST) * index / 2**self.depth))

    def _point(self, sample: int, lap: int, index: int, shape: tuple[int, ...]) -> Array:
        """W at ``index``; each halving is numbered as in a heap, from 1."""
        kept = self._last.get(sample)  # one read and one write: threads can share the path
        if kept is not None and kept[:2] == (lap, index) and kept[2].shape == shape:
            return kept[2]
        seed = self.seeds[sample]
        lo, hi, node = 0, 2**self.depth, 1
        w_lo = math.sqrt(self._tau(lo)) * _normal(seed, lap, 0, 0, shape)
        w_hi = w_lo + math.sqrt(self._tau(hi) - self._tau(lo)) * _normal(seed, lap, 0, 1, shape)
        while index not in (lo, hi):
            mid = (lo + hi) // 2
            t_lo, t_mid, t_hi = self._tau(lo), self._tau(mid), self._tau(hi)
            w = (t_mid - t_lo) / (t_hi - t_lo)
            z = _normal(seed, lap, node, 0, shape)
            w_mid = w_lo + w * (w_hi - w_lo) + math.sqrt(w * (t_hi - t_mid)) * z
            if index < mid:
                hi, w_hi, node = mid, w_mid, 2 * node
            else:
                lo, w_lo, node = mid, w_mid, 2 * node + 1
        found = w_lo if index == lo else w_hi
        self._last[sample] = (lap, index, found)
        return found


Array = np.ndarray[Any, np.dtype[np.float64]]


def _normal(seed: int, lap: int, node: int, which: int, shape: tuple[int, ...]) -> Array:
    """Standard normal numbers that depend on nothing but these; the low words of the counter number the draws."""
    bits = np.random.Philox(key=[seed, lap], counter=[0, 0, node, which])
    return np.random.Generator(bits).standard_normal(shape)
