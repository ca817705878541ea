"""allocate_bits: from a network, calibration data and a budget to a plan of mixed precision."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import nn

from fewstep.errors import FewstepError, unknown
from fewstep.quant.allocation import damage as damages
from fewstep.quant.allocation.options import Option, Table, chosen_plan, layer_options, mean_bits
from fewstep.quant.allocation.solve import closed_form, integer_program, nearest_options
from fewstep.quant.calibration.calls import Call, as_calls
from fewstep.quant.layer_plan import LayerPlan
from fewstep.quant.methods.base import SKIPPED
from fewstep.quant.methods.nearest import Nearest
from fewstep.quant.plan import FLOAT_BITS, QuantPlan, make_plan
from fewstep.quant.sites import Site, sites
from fewstep.quant.state import check_untouched, evaluating, unwrapped

CHOICES = ("int2:g64 x int8:row", "int4:g64 x int8:row", "int8:row x int8:row")


def allocate_bits(
    module: nn.Module,
    calibration: Any,
    *,
    budget: float,
    choices: Sequence[str] = CHOICES,
    sensitivity: Literal["measured", "hawq"] = "measured",
    solver: Literal["milp", "baq"] = "milp",
    keep: tuple[str, ...] = SKIPPED,
    costs: Mapping[tuple[str, str], float] | None = None,
    cost_budget: float | None = None,
    ties: Sequence[Sequence[str]] = (),
    may_keep: bool = False,
) -> QuantPlan:
    """Choose a format for each layer so that the network changes least within a budget of bits.

    Args:
        module: the float network; as it was afterwards.
        calibration: its calls, see :func:`~fewstep.quant.record`.
        budget: mean bits a weight over the layers that have a choice, scales included.
        choices: pairs of formats, ``"weight x activation"``.
        sensitivity: ``measured``, the change of the output with one layer quantised at a time; ``hawq``, from Hutchinson
            traces and weight errors, without running the network again for every choice.
        solver: ``milp``, exact; ``baq``, the closed form rounded to what there is.
        keep: roles and names that stay as they are and have no choice.
        costs: of (layer, choice), in any unit: measured latencies. 0 where left out.
        cost_budget: at most this sum of costs, with ``milp``.
        ties: layers that take the same choice.
        may_keep: whether leaving a layer in 16 bits is a choice too.

    Returns:
        A plan; its provenance holds the damages and what they add up to. Run it with ``MixedPrecision(plan)`` or
        ``quantize_(model, plan)``.

    Raises:
        FewstepError: no calibration, an unknown option, or a budget below what the narrowest choices need.

    Sources: MixDQ, 2405.17873; HAWQ-V2, 1911.03852; HAWQ-V3, 2011.10680; BAQ, 2506.05664.
    """
    calls = _calls(calibration)
    found = _table(unwrapped(module), calls, choices, sensitivity, keep, costs, may_keep)
    return _allocated(*found, budget, sensitivity, solver, cost_budget, ties)


def fewest_bits(
    module: nn.Module,
    calibration: Any,
    *,
    error: float,
    choices: Sequence[str] = CHOICES,
    sensitivity: Literal["measured", "hawq"] = "measured",
    keep: tuple[str, ...] = SKIPPED,
    may_keep: bool = False,
    rounds: int = 6,
) -> QuantPlan:
    """The narrowest plan of :func:`allocate_bits` whose output error, of the whole network, stays within ``error``.

    Damages of single layers do not quite add up; so the budget is bisected on what was asked for, the error itself.

    Args:
        module, calibration, choices, sensitivity, keep, may_keep: as for ``allocate_bits``.
        error: ||y_q - y|| / ||y|| on the calibration calls.
        rounds: halvings of the interval of budgets.

    Raises:
        FewstepError: where even the widest choices do more damage, or as ``allocate_bits``.

    Source: Augmenting Hessians with Inter-Layer Dependencies, 2306.04879, whose bisection this is, over budgets.
    """
    calls, model = _calls(calibration), unwrapped(module)
    base, table = _table(model, calls, choices, sensitivity, keep, None, may_keep)
    sizes = {name: base.numel(name) for name in table}
    total = sum(sizes.values())
    low, high = (
        sum(pick(option.bits for option in table[name]) * sizes[name] for name in table) / total for pick in (min, max)
    )
    best = _allocated(base, table, high, sensitivity, "milp", None, ())
    least = math.sqrt(output_noise(model, best, calls))
    if least > error:
        raise FewstepError(f"the widest choices have an output error of {least:.3%}; {error:.3%} needs wider ones")
    for _ in range(rounds):
        middle = (low + high) / 2
        plan = _allocated(base, table, middle, sensitivity, "milp", None, ())
        if math.sqrt(output_noise(model, plan, calls)) <= error:
            best, high = plan, middle
        else:
            low = middle
    return best


def _calls(calibration: Any) -> list[Call]:
    calls = as_calls(calibration)
    if not calls:
        raise FewstepError("formats are chosen by what they do to the network's calls; give some, see quant.record")
    return calls


def _table(
    model: nn.Module,
    calls: Sequence[Call],
    choices: Sequence[str],
    sensitivity: str,
    keep: tuple[str, ...],
    costs: Mapping[tuple[str, str], float] | None,
    may_keep: bool,
) -> tuple[QuantPlan, dict[str, list[Option]]]:
    """A plan with the widest choices, and the options of its layers with their damages."""
    if sensitivity not in ("measured", "hawq"):
        raise FewstepError(unknown("sensitivity", sensitivity, ("measured", "hawq")))
    check_untouched(model)
    with evaluating(model):
        base, open_sites, options = prepare(model, choices, keep)
        if sensitivity == "measured":
            found = damages.measured(model, open_sites, options, calls)
        else:
            found = damages.curvature(open_sites, options, damages.traces(model, open_sites, calls))
    return base, tabulated(base, options, found, costs or {}, may_keep)


def _allocated(
    base: QuantPlan,
    table: dict[str, list[Option]],
    budget: float,
    sensitivity: str,
    solver: str,
    cost_budget: float | None,
    ties: Sequence[Sequence[str]],
) -> QuantPlan:
    sizes = {name: base.numel(name) for name in table}
    if solver == "milp":
        choice = integer_program(table, sizes, budget, cost_budget=cost_budget, ties=ties)
    elif solver == "baq":
        middle = {name: options[len(options) // 2] for name, options in table.items()}
        law = {name: option.damage / sizes[name] * 4.0**option.bits for name, option in middle.items()}
        choice = nearest_options(table, closed_form(law, sizes, budget), sizes, budget)
    else:
        raise FewstepError(unknown("solver", solver, ("milp", "baq")))
    plan = chosen_plan(base, table, choice, f"allocate_bits({budget:g}, {sensitivity}, {solver})")
    return with_provenance(plan, base, table, choice, {"budget": budget, "sensitivity": sensitivity, "solver": solver})


def prepare(
    model: nn.Module, choices: Sequence[str], keep: tuple[str, ...]
) -> tuple[QuantPlan, list[Site], dict[str, dict[str, LayerPlan]]]:
    """A plan with the last choice everywhere, the layers that have a choice, and what they can choose from."""
    keeper = Nearest("int8:row", None, keep=keep)
    options = {site.name: {} if keeper.kept(site) else layer_options(site, choices) for site in sites(model)}

    def decide(site: Site) -> LayerPlan | str:
        there = options[site.name]
        return list(there.values())[-1] if there else keeper.kept(site) or f"takes none of {', '.join(choices)}"

    base = make_plan(model, decide, "allocate_bits")
    return base, [site for site in sites(model) if site.name in base.layers], options


def tabulated(
    base: QuantPlan,
    options: Mapping[str, Mapping[str, LayerPlan]],
    found: Mapping[str, Mapping[str, float]],
    costs: Mapping[tuple[str, str], float] = {},
    may_keep: bool = False,
) -> dict[str, list[Option]]:
    """Options with bits, damage and cost."""
    table: dict[str, list[Option]] = {}
    for name, by_choice in found.items():
        n, k = base.matrix(name)
        table[name] = [
            Option(
                options[name][choice],
                8 * options[name][choice].nbytes(n, k) / (n * k),
                value,
                costs.get((name, choice), 0.0),
            )
            for choice, value in by_choice.items()
        ]
        if may_keep:
            table[name].append(Option(None, float(FLOAT_BITS), 0.0, costs.get((name, "float"), 0.0)))
    return table


def with_provenance(
    plan: QuantPlan, base: QuantPlan, table: Table, choice: Mapping[str, int], settings: Mapping[str, Any]
) -> QuantPlan:
    """The plan with what it was made from."""
    from dataclasses import replace

    chosen = {name: options[choice[name]] for name, options in table.items()}
    found = {
        **settings,
        "bits": mean_bits(base, table, choice),
        "predicted_damage": sum(option.damage for option in chosen.values()),
        "damages": {name: [option.damage for option in options] for name, options in table.items()},
    }
    return replace(plan, provenance=found)


def output_noise(model: nn.Module, plan: QuantPlan, calls: Sequence[Call]) -> float:
    """Noise to signal of the network with a plan's formats, over the calls; the network is as it was afterwards."""
    from fewstep.quant.apply import dequantize_, quantize_

    report = quantize_(model, plan, calls)
    dequantize_(model)
    assert report.output_error is not None
    return report.output_error**2
