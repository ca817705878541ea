"""Which option of each layer: least damage within a budget, as an integer program or in closed form."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from fewstep.errors import FewstepError
from fewstep.quant.allocation.options import Table


def integer_program(
    table: Table,
    sizes: Mapping[str, int],
    budget: float,
    *,
    cost_budget: float | None = None,
    ties: Sequence[Sequence[str]] = (),
) -> dict[str, int]:
    """The choice with the least sum of damages, mean bits at most ``budget``; exact, by HiGHS.

    Args:
        table: options of each layer.
        sizes: numbers in each layer's weight.
        budget: mean bits a weight.
        cost_budget: at most this sum of costs.
        ties: groups of layers that take the same option, by position; such as what adds up in a residual connection.

    Returns:
        For each layer the index of its option.

    Raises:
        FewstepError: where no choice meets the budgets.

    Source: HAWQ-V3, 2011.10680, eq. 8; MixDQ, 2405.17873, sec. 4.3. SciPy's ``milp``.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import coo_array

    names = list(table)
    offsets = np.cumsum([0, *(len(table[name]) for name in names)])
    count = int(offsets[-1])
    total = sum(sizes[name] for name in names)
    damage = np.array([option.damage for name in names for option in table[name]])
    bits = np.array([option.bits * sizes[name] / total for name in names for option in table[name]])
    rows = np.repeat(np.arange(len(names)), np.diff(offsets))
    one_each = coo_array((np.ones(count), (rows, np.arange(count))))
    limits = [LinearConstraint(one_each, 1, 1), LinearConstraint(bits[None], -np.inf, budget)]
    if cost_budget is not None:
        costs = np.array([option.cost for name in names for option in table[name]])
        limits.append(LinearConstraint(costs[None], -np.inf, cost_budget))
    place = {name: int(offset) for name, offset in zip(names, offsets[:-1], strict=True)}
    for group in ties:
        first = group[0]
        for other in group[1:]:
            if len(table[first]) != len(table[other]):
                raise FewstepError(
                    f"{first} and {other} are tied but have {len(table[first])} and {len(table[other])} options"
                )
            for i in range(len(table[first])):
                row = np.zeros(count)
                row[place[first] + i], row[place[other] + i] = 1, -1
                limits.append(LinearConstraint(row[None], 0, 0))
    # Damages span many orders of magnitude; the solver's tolerances are absolute.
    scale = float(damage.max()) or 1.0
    found = milp(damage / scale, integrality=np.ones(count), bounds=Bounds(0, 1), constraints=limits)
    if found.x is None:
        least = sum(min(o.bits for o in table[name]) * sizes[name] for name in names) / total
        raise FewstepError(f"no choice of formats has {budget:g} bits a weight; the least there is has {least:.3f}")
    return {
        name: int(np.argmax(found.x[a:b]))
        for name, a, b in zip(names, offsets[:-1], offsets[1:], strict=True)
    }  # fmt: skip


def closed_form(damages: Mapping[str, float], sizes: Mapping[str, int], budget: float) -> dict[str, float]:
    """Real bits for each layer with equal damage at the margin: b_l = B + log2(c_l / geometric mean) / 2.

    Args:
        damages: c_l, the damage a weight at some width, of which 4^(-b) is the law.
        sizes: numbers in each layer's weight; the mean is weighted by them.
        budget: B, mean bits.

    Source: BAQ: Efficient Bit Allocation Quantization, 2506.05664, eq. 13, here by layer.
    """
    total = sum(sizes[name] for name in damages)
    logs = {name: math.log2(max(value, 1e-300)) for name, value in damages.items()}
    mean = sum(sizes[name] * value for name, value in logs.items()) / total
    return {name: budget + 0.5 * (value - mean) for name, value in logs.items()}


def nearest_options(table: Table, bits: Mapping[str, float], sizes: Mapping[str, int], budget: float) -> dict[str, int]:
    """Options near real bits: the widest below each, then what gains most a bit is widened while the budget lasts."""
    total = sum(sizes[name] for name in table)
    order = {name: sorted(range(len(options)), key=lambda i, o=options: o[i].bits) for name, options in table.items()}  # type: ignore[misc]
    place = {
        name: max((j for j, i in enumerate(ranked) if table[name][i].bits <= bits[name]), default=0)
        for name, ranked in order.items()
    }

    def option(name: str, j: int) -> float:
        return table[name][order[name][j]].bits * sizes[name] / total

    used = sum(option(name, j) for name, j in place.items())
    while used > budget:  # the floor of some layers is above what was asked for them
        down = [n for n, j in place.items() if j > 0]
        if not down:
            raise FewstepError(f"no choice of formats has {budget:g} bits a weight; the least there is has {used:.3f}")
        name = min(down, key=lambda n: _loss(table, order, n, place[n]) / sizes[n])
        used -= option(name, place[name]) - option(name, place[name] - 1)
        place[name] -= 1
    while True:
        up = [
            n for n, j in place.items()
            if j + 1 < len(order[n]) and used + option(n, j + 1) - option(n, j) <= budget
        ]  # fmt: skip
        if not up:
            return {name: order[name][j] for name, j in place.items()}
        name = max(up, key=lambda n: _loss(table, order, n, place[n] + 1) / sizes[n])
        used += option(name, place[name] + 1) - option(name, place[name])
        place[name] += 1


def _loss(table: Table, order: Mapping[str, Sequence[int]], name: str, j: int) -> float:
    """What going from option j down to j - 1 costs in damage."""
    return table[name][order[name][j - 1]].damage - table[name][order[name][j]].damage
