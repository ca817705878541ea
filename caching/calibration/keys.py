"""The steps to compute: what responses rank first, and what measures best."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from fewstep.caching.calibration.responses import Responses
from fewstep.caching.calibration.schedule import best_keys, even_keys, even_with_last, neighbours

Keys = tuple[int, ...]
RESTARTS = 4
"""Random schedules from which the search starts, beside the regular ones."""


def ranked(responses: Responses, count: int, orders: Sequence[int]) -> list[tuple[float, int, Keys]]:
    """Predicted error, degree of extrapolation and computed steps of the schedules that a local search comes by, best first."""
    rng, seen, steps = random.Random(0), set[tuple[float, int, Keys]](), responses.steps
    for order in orders:
        starts = [
            best_keys(steps, count, responses.cost(order)),
            even_keys(steps, count),
            even_with_last(steps, count),
            *((0, *sorted(rng.sample(range(1, steps), count - 1))) for _ in range(RESTARTS)),
        ]
        for start in dict.fromkeys(starts):
            keys, error = start, responses.error(start, order)
            while True:
                around = sorted((responses.error(near, order), near) for near in neighbours(keys, steps))
                seen |= {(e, order, near) for e, near in [*around[:4], (error, keys)]}
                if not around or around[0][0] >= error:
                    break
                error, keys = around[0]
    return sorted(seen)


def searched(
    responses: Responses,
    count: int,
    orders: Sequence[int],
    tries: int,
    error: Callable[[int, Keys], float],
) -> tuple[int, Keys]:
    """Degree and computed steps that err least where they are measured.

    In turn the best ranked of all is measured, and the best ranked neighbour of what measured best so far: to first order the
    responses know nothing of how reused steps fail to react to each other's errors.

    Args:
        responses: of the site.
        count: steps to compute.
        orders: degrees of extrapolation to choose from.
        tries: how many are measured.
        error: measures.
    """
    best, measured = ranked(responses, count, orders), dict[tuple[int, Keys], float]()
    for turn in range(max(tries, 1)):
        pool = best
        if turn % 2:
            order, keys = min(measured, key=lambda known: measured[known])
            pool = sorted((responses.error(near, order), order, near) for near in neighbours(keys, responses.steps))
        new = next(((order, keys) for _, order, keys in pool if (order, keys) not in measured), None)
        if new is not None:
            measured[new] = error(*new)
    return min(measured, key=lambda known: measured[known])
