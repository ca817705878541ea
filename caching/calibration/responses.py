"""How far a schedule moves the end of a trajectory, predicted from how far single reuses move it.

To first order the final latents move by the sum, over the steps that reuse, of what each prediction's error does alone. A
prediction sum_j w_j F(k_j) with weights that sum to 1 has the error sum_j w_j (F(k_j) - F(s)), so responses to the differences
F(k) - F(s) tell of every schedule and every linear predictor. They are measured for a few k a step; the others follow by
least squares on the features, which change smoothly along a trajectory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np

from fewstep.caching.calibration.runs import Runs
from fewstep.caching.calibration.traces import Matrix, Trace
from fewstep.caching.predictors import Extrapolate

PROBES = (1, 2, 4, 8, 16)
"""How many steps back responses are measured."""
SMALL = 0.5
"""Share of a difference that is applied: far ones would leave what is linear."""
RANK = 96
"""Directions in the space of final latents that are kept."""


class Responses:
    """Responses of the final latents to reuses of a site, or of several at once.

    Attributes:
        steps: of the trajectory.
        vectors: (steps, steps, rank): [s, k] the response to F(k) in the place of F(s), in coordinates in which squared
            lengths are mean squares over latents and samples.
    """

    def __init__(self, vectors: np.ndarray[tuple[int, int, int], np.dtype[np.float64]]) -> None:
        self.vectors, self.steps = vectors, len(vectors)
        self._reuse = lru_cache(maxsize=None)(self._of)

    @classmethod
    def measured(cls, runs: Runs, sites: Sequence[str], tick: Callable[[], None] = lambda: None) -> Responses:
        """Of the first samples of some runs: about five trajectories a step, each from that step on.

        Args:
            runs: the samples.
            sites: what is reused, all at the same steps.
            tick: is called after every step.
        """
        trace = Trace.of(runs, sites)
        products = trace.products()
        rows, places = [], list[tuple[int, list[int]]]()
        for step in range(1, runs.positions):
            past = [step - back for back in PROBES if back <= step]
            rows += [change.double().flatten().numpy() for change in trace.changed(step, past, SMALL)]
            places.append((step, past))
            tick()
        stacked = np.stack(rows) / np.sqrt(len(rows[0]))
        stacked = np.where(np.isfinite(stacked), stacked, 1e6)
        coordinates = _coordinates(stacked @ stacked.T)
        vectors = np.zeros((runs.positions, runs.positions, coordinates.shape[1]))
        begin = 0
        for step, past in places:
            mixture = _mixtures(products, step, past)  # (step, probes)
            vectors[step, :step] = mixture @ coordinates[begin : begin + len(past)]
            begin += len(past)
        return cls(vectors)

    def reuse(self, step: int, past: Sequence[int], order: int) -> Matrix:
        """(rank,) response to the polynomial of a degree through past values (newest first) in the place of F(step)."""
        return self._reuse(step, tuple(past[: order + 1]))

    def _of(self, step: int, past: tuple[int, ...]) -> Matrix:
        weights = Extrapolate(len(past) - 1).weights(past, step)
        made: Matrix = np.einsum("j,jr->r", np.array(weights), self.vectors[step, list(past)])
        return made

    def error(self, keys: Sequence[int], order: int) -> float:
        """Mean square of the change of the final latents that a schedule leads to."""
        total, past, chosen = np.zeros(self.vectors.shape[2]), list[int](), set(keys)
        for step in range(self.steps):
            if step in chosen:
                past.insert(0, step)
            else:
                total += self.reuse(step, past, order)
        return float(total @ total)

    def cost(self, order: int) -> Callable[[int, int, int], float]:
        """The steps' own mean squares, as :func:`~fewstep.caching.calibration.schedule.best_keys` adds them."""

        def cost(step: int, key: int, earlier: int) -> float:
            alone = self.reuse(step, (key,) if earlier < 0 else (key, earlier), min(order, 1))
            return float(alone @ alone)

        return cost


def _coordinates(gram: Matrix) -> Matrix:
    """(rows, rank) with these inner products, but for the smallest ones."""
    values, axes = np.linalg.eigh(gram)
    kept = values > 1e-14 * max(values[-1], 1e-300)
    made: Matrix = (axes[:, kept] * np.sqrt(values[kept]))[:, -RANK:]
    return made


def _mixtures(products: Matrix, step: int, probes: Sequence[int]) -> Matrix:
    """(step, probes) weights that make F(k) - F(step), k = 0 ... step - 1, of the probes' differences, by least squares."""
    past = [*range(step)]
    # inner products of differences to F(step)
    inner = (
        products[np.ix_(past, past)] - products[past, step][:, None] - products[past, step][None] + products[step, step]
    )
    own = inner[np.ix_(probes, probes)]
    own = own + 1e-9 * np.trace(own) / len(probes) * np.eye(len(probes)) + 1e-300 * np.eye(len(probes))
    made: Matrix = np.linalg.solve(own, inner[list(probes)][:, past]).T
    return made
