"""The best steps to compute, by dynamic programming over what each reused step would cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from itertools import combinations

from fewstep.errors import FewstepError

Cost = Callable[[int, int, int], float]
"""``cost(step, key, earlier)``: what reusing at ``step`` costs when the last computed steps are ``key`` and, before it,
``earlier`` (-1 where there is none)."""


def best_keys(steps: int, count: int, cost: Cost) -> tuple[int, ...]:
    """The ``count`` steps, 0 among them, to compute such that the summed cost of all others is least.

    CacheQuant's dynamic programming schedule (arXiv 2503.01323) with a cost that may look at two computed steps: the state
    is the last two keys, so O(count steps^3) costs are summed.

    Raises:
        FewstepError: for fewer than one key, or more than there are steps.
    """
    if not 1 <= count <= steps:
        raise FewstepError(f"{count} of {steps} steps cannot be computed; give 1 to {steps}")

    @cache
    def run(key: int, earlier: int, end: int) -> float:
        return sum(cost(step, key, earlier) for step in range(key + 1, end))

    # best[(earlier, key)] is the least cost of all steps before key, and the keys up to and with it
    best: dict[tuple[int, int], tuple[float, tuple[int, ...]]] = {(-1, 0): (0.0, (0,))}
    for chosen in range(1, count):
        further: dict[tuple[int, int], tuple[float, tuple[int, ...]]] = {}
        for (earlier, key), (spent, keys) in best.items():
            for following in range(key + 1, steps - (count - 1 - chosen)):
                total = spent + run(key, earlier, following)
                state = (key, following)
                if state not in further or total < further[state][0]:
                    further[state] = (total, (*keys, following))
        best = further
    return min((spent + run(key, earlier, steps), keys) for (earlier, key), (spent, keys) in best.items())[1]


def even_keys(steps: int, count: int) -> tuple[int, ...]:
    """The first two steps, so that a line through values is known early, and the others at even distances."""
    if count < 3:
        return tuple(range(count))
    gap = (steps - 1) / (count - 1)
    return (0, *(int(1 + i * gap) for i in range(count - 1)))


def even_with_last(steps: int, count: int) -> tuple[int, ...]:
    """The first two steps and the last, and the others at even distances."""
    if count < 3:
        return tuple(range(count))
    return (0, *(round(1 + i * (steps - 2) / (count - 2)) for i in range(count - 1)))


def neighbours(keys: tuple[int, ...], steps: int) -> Iterator[tuple[int, ...]]:
    """All schedules in which one computed step, not the first, is another."""
    free = sorted({*range(1, steps)} - {*keys})
    for moved in keys[1:]:
        for place in free:
            yield tuple(sorted({*keys} - {moved} | {place}))


def affordable(share: float, reused: float, steps: int) -> int:
    """The most steps that can be computed in full within a share of the MACs."""
    return min(steps, int((share - reused) * steps / (1 - reused) + 1e-9)) if reused < 1 else 0


def total_cost(steps: int, keys: tuple[int, ...], cost: Cost) -> float:
    """The summed cost of the steps that are not computed."""
    spent, key, earlier = 0.0, 0, -1
    for step in range(1, steps):
        if step in keys:
            key, earlier = step, key
        else:
            spent += cost(step, key, earlier)
    return spent


def exhaustive(steps: int, count: int, cost: Cost) -> tuple[int, ...]:
    """:func:`best_keys` by trying all, for a few steps."""
    chosen = ((0, *rest) for rest in combinations(range(1, steps), count - 1))
    return min((total_cost(steps, keys, cost), keys) for keys in chosen)[1]
